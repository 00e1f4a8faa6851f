"""Reading and writing the checkpoint formats of others: diffusers pipeline folders, transformers models, LoRA files."""
