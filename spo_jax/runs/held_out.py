"""Held-out prompts of a run that tunes a UNet: encoding, images and scores of base and tuned model, sheets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from spo_jax import rng
from spo_jax.distributed.offload import to_device
from spo_jax.distributed.processes import is_main_process
from spo_jax.errors import UserError, first_line, notice
from spo_jax.evaluation.image_metric import ImageMetric
from spo_jax.evaluation.image_metrics import MetricOptions, open_metric
from spo_jax.evaluation.measure import Measured, Texts, measure
from spo_jax.formats.tokenizers import cut_warning, tokenize, tokenizers_of
from spo_jax.images import grid, to_uint8, write_png
from spo_jax.runs.loop import Loop
from spo_jax.runs.tuning import Tuning, metric_params, reading_metrics, text_metric_params
from spo_jax.sampling.encode import tokens_of
from spo_jax.types import PromptBatch

READABLE_WIDTH = 96  # pixels; smaller images, as of the emoji, are enlarged on validation sheets


class HeldOut(NamedTuple):
    """The held-out prompts of a run, encoded for the networks and for the metrics, and the key of their noise."""

    prompts: PromptBatch
    texts: Texts
    key: jax.Array


def cut_texts(made: Tuning, texts: Sequence[str], what: str) -> str | None:
    """What to tell a user of texts that are longer than a tokenizer takes."""
    tokenizers = tokenizers_of(made.pipeline)
    return cut_warning(tokenizers if made.tokenizer is None else [*tokenizers, made.tokenizer], texts, what)


def encode_texts(made: Tuning, texts: Sequence[str]) -> PromptBatch:
    """Encodes any number of prompts, ``made.num_texts`` at a time; all devices have the result."""
    params = to_device(made.text_params)

    def encode(some: list[str]) -> PromptBatch:
        return made.programs["encode"](params, *tokens_of(made.pipeline, made.tokenizer, some))

    pieces = list(in_pieces(encode, texts, made.num_texts))
    if len(pieces) == 1:
        return pieces[0]
    rows = [(piece.embeddings, piece.scorer_text, piece.added) for piece in pieces]
    embeddings, scorer_text, added = jax.tree.map(lambda *parts: jnp.concatenate(parts), *rows)
    return pieces[0].replace(embeddings=embeddings, scorer_text=scorer_text, added=added)


def encode_held_out(made: Tuning) -> HeldOut:
    """Encodes the held-out prompts, ``made.num_texts`` at a time."""
    metrics, params = reading_metrics(made), to_device(text_metric_params(made))

    def encode(some: list[str]) -> Texts:
        tokens = {name: tokenize(tokenizer, some) for name, (_, tokenizer) in metrics.items()}
        return made.programs["metric texts"](params, tokens)

    pieces = list(in_pieces(encode, made.held_out, made.num_texts))
    texts = jax.tree.map(lambda *rows: jnp.concatenate(rows), *pieces)
    key = rng.stream(jax.random.key(made.config.seed), "evaluation")
    return HeldOut(encode_texts(made, made.held_out), texts, key)


def measure_model(made: Tuning, trained: PyTree, held_out: HeldOut) -> Measured:
    """Images of the UNet with the variables ``trained``, and their scores; all processes get all of them."""
    params, size = to_device(metric_params(made)), min(made.config.evaluation.batch_size, len(made.held_out))
    program, encoded = made.programs["evaluation"], (held_out.prompts, held_out.texts)
    return measure(program, params, trained, encoded, held_out.key, batch_size=size, mesh=made.mesh)


def measure_images(made: Tuning, models: dict[str, Measured]) -> dict[str, ImageMetric]:
    """Adds the scores of the metrics that see finished images, by the first process; returns these metrics.

    One that cannot be loaded, or does not fit the device beside the run, is told and left out.
    """
    found: dict[str, ImageMetric] = {}
    for text in made.config.evaluation.metrics:
        if text in made.metrics:
            continue
        name, _, place = text.partition("=")
        try:
            metric = open_metric(name, place or None, MetricOptions())
            scored = [metric.score(list(to_uint8(measured.images)), made.held_out) for measured in models.values()]
        except (UserError, jax.errors.JaxRuntimeError) as error:
            notice(f"config.evaluation.metrics: {name} is left out. {first_line(error)}")
            continue
        for measured, scores in zip(models.values(), scored, strict=True):
            measured.scores[name] = scores
        found[name] = metric
    return found


def measure_curve(made: Tuning, loop: Loop, held_out: HeldOut) -> dict[str, float]:
    """Means of the tuned model on the held-out prompts by metric, ``evaluation/NAME``, for the row of a step."""
    measured = measure_model(made, loop.state.result, held_out)
    if is_main_process():
        measure_images(made, {"tuned": measured})
    return {f"evaluation/{name}": float(np.mean(scores)) for name, scores in measured.scores.items()}


def untrained(trained: PyTree) -> PyTree:
    """The base model in the form of ``trained``: adapters of zeros, so that the program for tuned adapters serves it.

    In full fine-tuning that is {}: nothing is laid over the base weights.
    """
    adapters = {name: part for name, part in trained.items() if name == "lora"}
    return jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), adapters)


def show_validation(made: Tuning, loop: Loop, held_out: HeldOut) -> None:
    """Writes a sheet of images of the first held-out prompts."""
    some = held_out.prompts.map_rows(itemgetter(slice(made.config.validation.num_prompts)))
    images = measure_model(made, loop.state.result, held_out._replace(prompts=some)).images
    if is_main_process():
        sheet = grid(to_uint8(images))
        zoom = max(1, READABLE_WIDTH // images.shape[2])
        write_png(loop.workdir / sheet_of(loop), sheet, zoom)
        loop.show("validation", sheet)


def sheet_of(loop: Loop) -> str:
    """The file of the sheet of the last step, in the workdir: ``validation/batch_000020.png``."""
    return f"validation/{loop.unit.name}_{loop.finished:06d}.png"


def in_pieces(function: Callable[[list[str]], PyTree], texts: Sequence[str], size: int) -> Iterator[PyTree]:
    """``function`` of ``size`` texts at a time, so that one program serves any number of them.

    The last piece is filled up with texts from the start, and its result cut; arrays whose first axis is not ``size``
    (those of the negative prompt) stay as they are.
    """
    for start in range(0, len(texts), size):
        result = function([texts[i % len(texts)] for i in range(start, start + size)])
        left = len(texts) - start
        yield result if left >= size else jax.tree.map(lambda x, left=left: x[:left] if len(x) == size else x, result)
