"""Attention: one function, and the kinds of it that platforms have."""
