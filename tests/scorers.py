"""Scorers that a config can name as ``tests.scorers:NAME``."""


def brightness(images, tokens, timesteps):
    """Prefers bright images, strongly."""
    return 10 * images.mean((1, 2, 3))
