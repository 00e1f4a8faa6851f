"""Prompts: reading them and the order in which they are used."""
