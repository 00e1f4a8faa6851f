"""Pictures of the emoji world: colour emoji pasted on backgrounds of a named colour, dull and vivid.

The glyphs come from the Debian package ``fonts-noto-color-emoji``. They are rendered once, at every size in use, and
then pasted by whole pixels with NumPy, some thousand pictures a second on one core.

``python -m examples.emoji_world.pictures --check --sheet=sheet.png`` compares the names with those of Unicode CLDR
(Debian package ``unicode-cldr-core``), makes sure that each glyph has ink, and writes a contact sheet to look at.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import sys
from collections.abc import Sequence
from xml.etree import ElementTree

import numpy as np
from jaxtyping import Float, Int
from PIL import Image, ImageDraw, ImageFont

from spo_jax.emoji.world import COLOR_NAMES, COLORS, CONCEPTS, Prompt, caption
from spo_jax.errors import UserError

FONT_PATH = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
CLDR_PATH = "/usr/share/unicode/cldr/common/annotations/en.xml"
FONT_SIZE = 109  # the only size of the bitmaps in the font
GLYPH_SHAPE = (128, 136, 4)

SCALES = (0.75, 0.79, 0.83, 0.87, 0.91, 0.95)  # widths of the emoji, as parts of the picture's width
EMOJI_SATURATION = (0.35, 1.0)  # 1 = as drawn in the font, 0 = gray
MAX_GRADIENT = 0.12  # most darkening of the background from one edge to the other
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
# The gaps between the hues of world.COLORS, each kept 0.015 away from the nearest shade of a caption.
_UNSEEN_HUES = np.array(
    [(0.11, 0.13), (0.185, 0.295), (0.375, 0.47), (0.53, 0.585), (0.665, 0.735), (0.80, 0.865), (0.935, 0.97)]
)


def render_emoji(char: str, font_path: str = FONT_PATH) -> Float[np.ndarray, "128 136 4"]:
    """One emoji as the font draws it: float32 RGBA in [0, 1], alpha not multiplied in.

    Raises:
        UserError: the font is not installed.
    """
    if not os.path.isfile(font_path):
        raise UserError(f"The emoji font {font_path} is missing: install the Debian package fonts-noto-color-emoji.")
    picture = Image.new("RGBA", (GLYPH_SHAPE[1], GLYPH_SHAPE[0]), (0, 0, 0, 0))
    # The font places its bitmaps relative to a baseline; anchor them by their box instead.
    left, top, _, _ = _font(font_path).getbbox(char)
    ImageDraw.Draw(picture).text((-left, -top), char, font=_font(font_path), embedded_color=True)
    return np.asarray(picture, np.float32) / 255


@functools.cache
def _font(path: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, FONT_SIZE)


@functools.cache
def _sprites_of_width(size: int, width: int, margin: int) -> Float[np.ndarray, "n s s 4"]:
    """All concepts at one width, centred in a square with a margin; RGB multiplied by alpha, in [0, 1]."""
    height = round(width * GLYPH_SHAPE[0] / GLYPH_SHAPE[1])
    canvas = size + 2 * margin
    top, left = (canvas - height) // 2, (canvas - width) // 2
    sprites = np.zeros((len(CONCEPTS), canvas, canvas, 4), np.float32)
    for sprite, concept in zip(sprites, CONCEPTS, strict=True):
        glyph = render_emoji(concept.char)
        glyph[..., :3] *= glyph[..., 3:]
        # Channel by channel in float: resizing multiplied values keeps the edges free of a dark or coloured rim.
        channels = [
            Image.fromarray(channel).resize((width, height), Image.Resampling.LANCZOS)
            for channel in np.moveaxis(glyph, -1, 0).copy()
        ]
        small = np.clip(np.stack([np.asarray(channel) for channel in channels], -1), 0, 1)
        small[..., :3] = np.minimum(small[..., :3], small[..., 3:])
        sprite[top : top + height, left : left + width] = small
    return sprites


@functools.cache
def _sprite_bank(size: int) -> tuple[Float[np.ndarray, "k n p p 4"], int]:
    """The sprites at every scale with a margin of the greatest jitter (2 pixels of 32), and that margin."""
    margin = max(1, size // 16)
    return np.stack([_sprites_of_width(size, round(scale * size), margin) for scale in SCALES]), margin


def _rgb(hsv: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
    """HSV to RGB, all in [0, 1]; hues wrap around."""
    hue, saturation, value = (hsv[:, i, None] for i in range(3))
    wheel = (np.array([5.0, 3.0, 1.0]) + hue * 6) % 6
    return value - value * saturation * np.clip(np.minimum(wheel, 4 - wheel), 0, 1)


def named_backgrounds(rng: np.random.Generator, color_index: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n 3"]:
    """One random shade of each named colour, RGB in [0, 1], from the ranges in `spo_jax.emoji.world.COLORS`."""
    ranges = np.array([COLORS[name] for name in COLOR_NAMES])[color_index]  # [n, 3, 2]
    return _rgb(rng.uniform(ranges[..., 0], ranges[..., 1]))


def _paste(
    rng: np.random.Generator, concept_index: Int[np.ndarray, " n"], background: Float[np.ndarray, "n h w 3"]
) -> Float[np.ndarray, "n s s 3"]:
    """Paste emoji of random scale, place and saturation on backgrounds in [0, 1]; returns [-1, 1]."""
    count, size = len(concept_index), background.shape[1]
    bank, margin = _sprite_bank(size)
    scale = rng.integers(len(SCALES), size=count)
    shift = rng.integers(2 * margin + 1, size=(2, count))
    saturation = rng.uniform(*EMOJI_SATURATION, size=(count, 1, 1, 1)).astype(np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(bank, (size, size), axis=(2, 3))
    # Picking whole windows copies contiguous rows; the window axes come last and go in front of the channels.
    sprites = np.moveaxis(windows[scale, concept_index, shift[0], shift[1]], 1, -1)
    colors, alpha = sprites[..., :3], sprites[..., 3:]
    luma = (colors @ _LUMA)[..., None]
    pictures = luma + saturation * (colors - luma) + (1 - alpha) * background
    return np.clip(pictures * 2 - 1, -1, 1)


def _shaded(rng: np.random.Generator, colors: Float[np.ndarray, "n 3"], size: int) -> Float[np.ndarray, "n s 1 3"]:
    """Flat colours that darken a little upwards or downwards."""
    slope = rng.uniform(-MAX_GRADIENT, MAX_GRADIENT, size=(len(colors), 1))
    ramp = np.linspace(0, 1, size)
    shade = 1 - np.where(slope > 0, slope * ramp, -slope * (1 - ramp))
    return (shade[..., None] * colors[:, None])[:, :, None].astype(np.float32)


def compose(
    rng: np.random.Generator,
    concept_index: Int[np.ndarray, " n"],
    color_index: Int[np.ndarray, " n"],
    size: int = 32,
) -> Float[np.ndarray, "n s s 3"]:
    """Random pictures of given prompts.

    Shade of the background, a slight vertical gradient, scale, place (two pixels of 32 each way) and saturation of the
    emoji are drawn anew for each picture.

    Args:
        rng: source of all the randomness.
        concept_index: indices into `CONCEPTS`.
        color_index: indices into `COLOR_NAMES`.
        size: side in pixels.

    Returns:
        float32 [n, size, size, 3] in [-1, 1].

    Raises:
        UserError: the font is not installed.
    """
    concept_index, color_index = np.asarray(concept_index), np.asarray(color_index)
    return _paste(rng, concept_index, _shaded(rng, named_backgrounds(rng, color_index), size))


def unseen_backgrounds(
    rng: np.random.Generator, concept_index: Int[np.ndarray, " n"], size: int = 32
) -> Float[np.ndarray, "n s s 3"]:
    """Pictures on backgrounds that no caption names, to measure an autoencoder on what it was not trained on.

    Half of them are one colour whose hue lies between the named ones (saturation at least 0.4, value at least 0.5); the
    other half run sideways from one such colour to another. Arguments and result as in `compose`.
    """
    concept_index = np.asarray(concept_index)
    count = len(concept_index)

    def colors() -> Float[np.ndarray, "n 3"]:
        lows, highs = _UNSEEN_HUES[rng.integers(len(_UNSEEN_HUES), size=count)].T
        return _rgb(np.stack([rng.uniform(lows, highs), rng.uniform(0.4, 1, count), rng.uniform(0.5, 1, count)], 1))

    left, right = colors(), colors()
    flat = rng.random(count) < 0.5
    right[flat] = left[flat]
    ramp = np.linspace(0, 1, size)[:, None]
    background = left[:, None] * (1 - ramp) + right[:, None] * ramp  # [n, w, 3]
    return _paste(rng, concept_index, np.broadcast_to(background[:, None], (count, size, size, 3)).astype(np.float32))


def training_batch(
    rng: np.random.Generator, batch: int, prompts: Sequence[Prompt], size: int = 32
) -> tuple[Float[np.ndarray, "n s s 3"], Int[np.ndarray, " n"]]:
    """Random pictures of prompts drawn uniformly, with replacement.

    Args:
        rng: source of all the randomness.
        batch: number of pictures n.
        prompts: for instance `spo_jax.emoji.world.TRAIN_PROMPTS`.
        size: side in pixels.

    Returns:
        float32 images [n, size, size, 3] in [-1, 1], and int64 indices [n] into ``prompts``; the captions are
        ``world.captions(prompts)`` at these indices.

    Raises:
        UserError: the font is not installed.
    """
    index = rng.integers(len(prompts), size=batch)
    concept_index, color_index = np.asarray(prompts)[index].T
    return compose(rng, concept_index, color_index, size), index


def cldr_names(path: str = CLDR_PATH) -> dict[str, str]:
    """The short English name (`tts`) of each character in a CLDR annotation file.

    Raises:
        UserError: the file is missing.
    """
    if not os.path.isfile(path):
        raise UserError(f"The CLDR names {path} are missing: install the Debian package unicode-cldr-core.")
    annotations = ElementTree.parse(path).getroot().iter("annotation")
    return {entry.attrib["cp"]: entry.text or "" for entry in annotations if entry.get("type") == "tts"}


def _check() -> None:
    names = cldr_names()
    for concept in CONCEPTS:
        if names.get(concept.char) != concept.name:
            raise UserError(f"{concept.char} is {names.get(concept.char)!r} in CLDR, not {concept.name!r}.")
        ink = render_emoji(concept.char)[..., 3].mean()
        if ink < 0.05:
            raise UserError(f"The font has no glyph for {concept.char} ({concept.name}).")


def _sheet(path: str, columns: int = 16, zoom: int = 3) -> None:
    """Every concept once, on the colours in turn, enlarged without smoothing so that the 32 pixels show."""
    concepts = np.arange(len(CONCEPTS))
    pictures = compose(np.random.default_rng(0), concepts, concepts % len(COLOR_NAMES))
    rows = math.ceil(len(pictures) / columns)
    cells = np.full((rows * columns, 34, 34, 3), 1.0, np.float32)
    cells[: len(pictures), 1:-1, 1:-1] = pictures
    sheet = cells.reshape(rows, columns, 34, 34, 3).swapaxes(1, 2).reshape(rows * 34, columns * 34, 3)
    image = Image.fromarray(((sheet + 1) * 127.5 + 0.5).astype(np.uint8))
    image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(path)


def main(argv: Sequence[str] | None = None) -> int:
    """The command in this module's docstring; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.emoji_world.pictures", description="Check the emoji world."
    )
    parser.add_argument("--check", action="store_true", help="compare the names with CLDR, and look for ink")
    parser.add_argument("--sheet", metavar="PNG", help="write a contact sheet here")
    args = parser.parse_args(argv)
    try:
        if args.check:
            _check()
            print(f"{len(CONCEPTS)} concepts: names and glyphs agree; first caption: {caption(0, 0)!r}")
        if args.sheet:
            _sheet(args.sheet)
    except UserError as error:
        print(f"spo_jax: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
