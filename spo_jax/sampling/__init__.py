"""The programs of a pipeline: text to embeddings, noise to pictures."""
