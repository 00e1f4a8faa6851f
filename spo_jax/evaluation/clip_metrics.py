"""Published metrics that are a CLIP, or a CLIP and a little more: PickScore, HPSv2, aesthetic, CLIP score.

They share networks and differ in everything else: the resize, the tokenizer, the scale. ``docs/metrics.md`` has it in
one table.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float, PyTree

from spo_jax.errors import UserError, notice
from spo_jax.evaluation.image_metric import ImageMetric, ScorePictures
from spo_jax.evaluation.metric_places import AESTHETIC_FILE, CLIP_L, HPSV2_FILES, PLACES
from spo_jax.evaluation.preprocess import RESIZES, TORCHVISION, TRANSFORMERS, clip_pixels, hpsv2_pixels
from spo_jax.files import sha256_of
from spo_jax.formats.hub import missing, pinned, remote_of, resolve_model
from spo_jax.formats.open_clip import cleaned, open_clip_ids, read_open_clip
from spo_jax.formats.pipeline import read_clip
from spo_jax.formats.tokenizers import ClipTokenizer, cut_warning, read_tokenizer, tokenize
from spo_jax.formats.weights import TRANSFORMERS_STEM, open_file, read_params, weight_files
from spo_jax.models.aesthetic import AestheticHead
from spo_jax.models.clip import CLIPModel

_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
AESTHETIC_WIDTH = 768  # of the embeddings of OpenAI's ViT-L/14

Settings = dict[str, str | int | float]
Prepare = Callable[[np.ndarray], np.ndarray]  # uint8 [H, W, 3] to pixels float32 [s, s, 3]
Embed = Callable[[Iterable[np.ndarray]], np.ndarray]  # rows of one shape to unit-length embeddings float32 [n, E]


@dataclasses.dataclass(frozen=True)
class MetricOptions:
    """How metrics are computed.

    Attributes:
      dtype: of networks and parameters; in float32 products have full precision on every device.
      batch_size: images, or captions, that a network sees at a time.
      tokenizer: a folder or a name on the hub; None takes the one beside the weights, or else CLIP_L's.
      hpsv2_resize: one of ``preprocess.RESIZES``. HPSv2's own table was made with "tensor".
      aesthetic_clip: the ViT-L/14 of OpenAI that the aesthetic predictor sits on.
    """

    dtype: DTypeLike = jnp.float32
    batch_size: int = 16
    tokenizer: str | None = None
    hpsv2_resize: str = "tensor"
    aesthetic_clip: str = CLIP_L


class Towers(NamedTuple):
    """A CLIP that is ready to embed: see ``Embed``; ``scale`` is its exp(logit_scale)."""

    images: Embed
    texts: Embed
    scale: float


# ----------------------------------------------------------------------------------------------------------- openers
def open_pickscore(place: str | None, options: MetricOptions) -> ImageMetric:
    """PickScore v1: exp(logit_scale), about 100, times the cosine; papers print this."""
    return _open_plain("pickscore", "PickScore", "What people preferred on Pick-a-Pic.", place, options, own_scale=True)


def open_clip_score(name: str, place: str | None, options: MetricOptions) -> ImageMetric:
    """The CLIP score, 100 times the cosine of each image and its caption: "clip" of OpenAI, "clip_h" of LAION."""
    title = {"clip": "CLIP score (ViT-L/14)", "clip_h": "CLIP score (ViT-H/14)"}[name]
    return _open_plain(name, title, "How well an image fits its prompt, by a CLIP.", place, options, own_scale=False)


def _open_plain(
    name: str, title: str, meaning: str, place: str | None, options: MetricOptions, *, own_scale: bool
) -> ImageMetric:
    place = place or PLACES[name]
    with _naming(name):
        path = resolve_model(place)
        clip, params = read_clip(path, step_aware=False, dtype=options.dtype)
        tokenizer, source = tokenizer_of(clip, path, options)
        weights = _sources(place, weight_files(path, TRANSFORMERS_STEM))
    towers = make_towers(clip, params, options)
    scale = towers.scale if own_scale else 100.0
    prepare = functools.partial(clip_pixels, size=clip.image_size, rule=TRANSFORMERS)
    score = cosine_score(towers, prepare, functools.partial(_clip_ids, tokenizer), scale)
    settings = weights | source | {"resize": "pil_crop, crop of transformers"} | _common(options) | {"scale": scale}
    return ImageMetric(title, meaning, score, settings)


def open_hpsv2(name: str, place: str | None, options: MetricOptions) -> ImageMetric:
    """HPSv2 ("hpsv2") or HPSv2.1 ("hpsv2.1"): 100 times the cosine. The two have different scales."""
    resize = options.hpsv2_resize
    with _naming(name):
        if resize not in RESIZES:
            raise UserError(f"the resize {resize!r} is not known; choose one of {', '.join(RESIZES)}.")
        place = place or PLACES[name]
        path = _file_in(place, HPSV2_FILES[name])
        clip, params = read_open_clip(path, options.dtype)
        tokenizer, source = tokenizer_of(clip, path, options)
        weights = _sources(place, [path])
    towers = make_towers(clip, params, options)
    prepare = functools.partial(hpsv2_pixels, size=clip.image_size, resize=resize)
    score = cosine_score(towers, prepare, functools.partial(_hpsv2_ids, tokenizer), 100.0)
    settings = weights | source | {"resize": resize} | _common(options) | {"scale": 100.0}
    title = {"hpsv2": "HPSv2", "hpsv2.1": "HPSv2.1"}[name]
    return ImageMetric(title, "What people preferred on HPD v2.", score, settings)


def open_aesthetic(place: str | None, options: MetricOptions) -> ImageMetric:
    """LAION's aesthetic predictor V2: a linear map of the unit-length embedding of OpenAI's ViT-L/14."""
    with _naming("aesthetic"):
        place = place or PLACES["aesthetic"]
        path = _file_in(place, AESTHETIC_FILE)
        head = read_aesthetic_head(path)
        clip_path = resolve_model(options.aesthetic_clip)
        clip, params = read_clip(clip_path, step_aware=False, dtype=options.dtype)
        if clip.projection_dim != AESTHETIC_WIDTH:
            raise UserError(
                f"The CLIP in {clip_path} has embeddings of {clip.projection_dim} numbers, not {AESTHETIC_WIDTH}; the "
                "aesthetic predictor needs OpenAI's ViT-L/14."
            )
        weights = _sources(place, [path])
        below = _sources(options.aesthetic_clip, weight_files(clip_path, TRANSFORMERS_STEM), "clip")
    towers = make_towers(clip, params, options)
    prepare = functools.partial(clip_pixels, size=clip.image_size, rule=TORCHVISION)

    def score(pictures: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
        _check_pairs(pictures, prompts)
        return aesthetic_scores(head, towers.images(map(prepare, pictures)))

    settings = weights | below | {"resize": "pil_crop, crop of torchvision"} | _common(options) | {"scale": 1.0}
    meaning = "How much people liked an image, of the image alone."
    return ImageMetric("Aesthetic V2", meaning, score, settings, reads_prompts=False)


# ------------------------------------------------------------------------------------------------------------ scoring
def make_towers(clip: CLIPModel, params: PyTree, options: MetricOptions) -> Towers:
    """The two halves of a CLIP, each compiled for one size of batch."""
    precise = "highest" if jnp.dtype(options.dtype) == jnp.float32 else None

    def half(method: Callable[..., jax.Array]) -> Embed:
        @jax.jit
        def program(params: PyTree, rows: jax.Array) -> jax.Array:
            with jax.default_matmul_precision(precise):
                features = clip.apply({"params": params}, rows, method=method).astype(jnp.float32)
            return features / jnp.linalg.norm(features, axis=-1, keepdims=True)

        return lambda rows: in_batches(functools.partial(program, params), options.batch_size, rows)

    scale = float(np.exp(np.asarray(params["logit_scale"], np.float32)))
    return Towers(half(clip.image_features), half(clip.text_features), scale)


def cosine_score(
    towers: Towers, prepare: Prepare, ids_of: Callable[[list[str]], np.ndarray], scale: float
) -> ScorePictures:
    """``scale`` times the cosine of each image and its caption; a caption that comes again is embedded once."""

    def score(pictures: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
        _check_pairs(pictures, prompts)
        if not prompts:
            return np.zeros(0, np.float32)
        places = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        texts = towers.texts(ids_of(list(places)))[[places[prompt] for prompt in prompts]]
        images = towers.images(map(prepare, pictures))
        return np.float32(scale) * (images * texts).sum(axis=-1)

    return score


def in_batches(
    program: Callable[..., jax.Array], batch_size: int, *columns: Iterable[np.ndarray]
) -> Float[np.ndarray, "n ..."]:
    """What ``program`` gives for columns of as many rows, in batches of one size; the last is filled with its last row.

    Rows of a column have one shape. They are made while they are asked for, so that only one batch of prepared images
    is in memory.
    """
    results: list[np.ndarray] = []
    rows = zip(*columns, strict=True)
    while batch := list(itertools.islice(rows, batch_size)):
        filled = [*batch, *[batch[-1]] * (batch_size - len(batch))]
        results.append(np.asarray(program(*map(np.stack, zip(*filled, strict=True))))[: len(batch)])
    return np.concatenate(results) if results else np.zeros((0, 1), np.float32)


def read_aesthetic_head(path: Path) -> PyTree:
    """The parameters of LAION's predictor V2, float32, from its file; UserError if it is missing or another's."""
    rows = jnp.zeros((1, AESTHETIC_WIDTH))
    shapes = jax.eval_shape(lambda: AestheticHead().init(jax.random.key(0), rows))["params"]
    weights = open_file(path)
    first = weights.arrays.get("layers.0.weight")
    if first is None or first.shape != (1024, AESTHETIC_WIDTH):
        raise UserError(
            f"Weight file {path} is not the aesthetic predictor V2, whose layers.0.weight is [1024, 768]; give "
            f"{AESTHETIC_FILE} (V1's heads, such as sa_0_4_vit_l_14_linear.pth, are other metrics)."
        )
    return read_params(weights, shapes)


@jax.jit
def _apply_head(params: PyTree, embeddings: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        return AestheticHead().apply({"params": params}, embeddings)


def aesthetic_scores(params: PyTree, embeddings: Float[np.ndarray, "n 768"]) -> Float[np.ndarray, " n"]:
    """The predictor V2 on unit-length embeddings; on others it gives 20 to 30."""
    return np.asarray(_apply_head(params, embeddings)) if len(embeddings) else np.zeros(0, np.float32)


# ------------------------------------------------------------------------------------------------------------- pieces
def _check_pairs(pictures: Sequence[np.ndarray], prompts: Sequence[str]) -> None:
    if len(pictures) != len(prompts):
        raise ValueError(f"{len(pictures)} images and {len(prompts)} prompts")


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Puts the metric's name before the sentence of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"Metric {name}: {error}") from error


def _file_in(place: str, file: str) -> Path:
    """The weight file that ``place`` is, or that lies under this name in the folder or repository that it is."""
    remote = remote_of(place)
    if remote is not None and not remote.is_file:
        inside = f"{remote.inside}/{file}" if remote.inside else file
        place = str(dataclasses.replace(remote, inside=inside, revision=remote.revision or "main"))
    path = resolve_model(place)
    if path.is_dir():
        path = path / file
    if not path.is_file():
        raise UserError(missing(path, "Weight file"))
    return path


def tokenizer_of(clip: CLIPModel, path: Path, options: MetricOptions) -> tuple[ClipTokenizer, Settings]:
    """The tokenizer, fitted to the text tower, and where it is from; ``path`` is the weights' file or folder.

    It is that of the options, or one beside the weights, in their folder or in ``tokenizer`` next to it as a pipeline
    has it, or else CLIP_L's.
    """
    folder = path if path.is_dir() else path.parent
    for beside in (folder, folder.parent / "tokenizer"):
        files = ([*names, "tokenizer_config.json"] for names in _VOCABULARIES)
        if not options.tokenizer and any(all((beside / name).is_file() for name in names) for names in files):
            return read_tokenizer(beside, clip.tower), {"tokenizer": "beside the weights"}
    source = options.tokenizer or CLIP_L
    return read_tokenizer(source, clip.tower), {"tokenizer": _named(source)}


def _clip_ids(tokenizer: ClipTokenizer, texts: list[str]) -> np.ndarray:
    if warning := cut_warning([tokenizer], texts):
        notice(warning)
    return tokenize(tokenizer, texts)


def _hpsv2_ids(tokenizer: ClipTokenizer, texts: list[str]) -> np.ndarray:
    if warning := cut_warning([tokenizer], [cleaned(text) for text in texts]):
        notice(warning)
    return open_clip_ids(tokenizer, texts)


def _sources(place: str, files: Sequence[Path], what: str = "weights") -> Settings:
    """Where weights are from, with the commit, and the SHA-256 of each file."""
    return {what: _named(place), **{f"sha256 of {file.name}": sha256_of(file) for file in files}}


def _named(place: str) -> str:
    """The name with its commit, or the path."""
    remote = remote_of(place)
    return str(dataclasses.replace(pinned(remote), sha256="")) if remote else str(place)


def _common(options: MetricOptions) -> Settings:
    return {"images": "8-bit", "dtype": jnp.dtype(options.dtype).name}
