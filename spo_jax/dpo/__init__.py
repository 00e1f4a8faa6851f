"""Diffusion-DPO and its kin: preference optimization on given pairs of images (arXiv 2311.12908)."""
