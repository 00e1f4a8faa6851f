"""Colourfulness of a picture: a reward that needs no network, and that people's judgement agrees with."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def colorfulness(images: Float[Array, "*n h w 3"]) -> Float[Array, "*n"]:
    """Colourfulness metric M3 of each picture.

    With the opponent axes ``rg = R - G`` and ``yb = (R + G) / 2 - B`` it is
    ``sqrt(std(rg)^2 + std(yb)^2) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2)``, on pixel values of 0 to 255. Gray pictures
    score 0, about 15 is "slightly colourful", about 109 "extremely colourful". Values outside [-1, 1], as a decoder may
    give them, are clipped first, because a stored picture could not show them.

    Args:
        images: RGB values in [-1, 1], any leading axes, any float type.

    Returns:
        One float32 score >= 0 per picture, in units of 8-bit pixel values.

    Source: D. Hasler and S. Suesstrunk, "Measuring colourfulness in natural images", SPIE 5007, 2003.
    """
    red, green, blue = jnp.moveaxis((jnp.clip(images.astype(jnp.float32), -1, 1) + 1) * 127.5, -1, 0)
    red_green = red - green
    yellow_blue = 0.5 * (red + green) - blue
    axes = (-2, -1)
    spread = jnp.sqrt(red_green.var(axes) + yellow_blue.var(axes))
    offset = jnp.sqrt(red_green.mean(axes) ** 2 + yellow_blue.mean(axes) ** 2)
    return spread + 0.3 * offset
