"""How the pictures of a pair are resized, cut and mirrored: what is drawn for a place in the stream, and nothing else.

Draws depend on the seed and on the position in the stream of pairs. So they are the same for any number of processes
and workers, for any batch size, and after a resume. All of them are always made, whatever is asked for: a run with
random crops mirrors the same pictures as one without.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

RESIZES = ("bicubic", "bilinear")
FLIPS = ("none", "shared", "independent")
CROPS = ("center", "shared", "independent")
_STREAM = 1  # of the draws, apart from those that others make of a seed


class Augmentation(NamedTuple):
    """What is done with the pictures of every pair.

    Attributes:
      resize: one of ``RESIZES``, both with antialias; Diffusion-DPO's code has "bilinear", PickScore's "bicubic".
      flip: whether pictures are mirrored with p = 0.5: "none"; "shared", one draw for both of a pair; "independent",
        one each, as Diffusion-DPO's code does it.
      crop: where a picture that does not have the aspect of the target is cut: "center"; "shared", at one random place
        for both of a pair; "independent", at one each.
    """

    resize: str = "bicubic"
    flip: str = "none"
    crop: str = "center"


class View(NamedTuple):
    """How one picture is looked at.

    Attributes:
      resize: one of ``RESIZES``.
      mirrored: whether left and right are exchanged, after the cut.
      place: of the cut, vertically and horizontally, in [0, 1): 0 is the top or left edge; None is the centre.
    """

    resize: str = "bicubic"
    mirrored: bool = False
    place: tuple[float, float] | None = None


NO_AUGMENTATION, CENTERED = Augmentation(), View()


def check_augmentation(augmentation: Augmentation) -> None:
    """Raises ValueError for a word that is none of ``RESIZES``, ``FLIPS`` and ``CROPS``."""
    for key, words in (("resize", RESIZES), ("flip", FLIPS), ("crop", CROPS)):
        if (word := getattr(augmentation, key)) not in words:
            raise ValueError(f"{key}={word!r} must be one of {', '.join(words)}.")


def draw_views(augmentation: Augmentation, seed: int, position: int) -> tuple[View, View]:
    """The views of the two pictures of the pair at a position in the stream of a seed (any integers, position >= 0)."""
    generator = np.random.default_rng([seed % 2**32, position, _STREAM])
    coins, places = generator.random(2) < 0.5, generator.random((2, 2))

    def view(picture: int) -> View:
        coin = coins[0 if augmentation.flip == "shared" else picture]
        vertical, horizontal = places[0 if augmentation.crop == "shared" else picture]
        return View(
            augmentation.resize,
            mirrored=augmentation.flip != "none" and bool(coin),
            place=None if augmentation.crop == "center" else (float(vertical), float(horizontal)),
        )

    return view(0), view(1)
