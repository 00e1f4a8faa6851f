"""Step-aware Preference Optimization (arXiv 2406.04314) for text-to-image diffusion models, in JAX."""

__version__ = "0.1.0"
