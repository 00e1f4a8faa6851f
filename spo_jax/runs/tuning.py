"""What methods share that tune the UNet of a pipeline: adapters or all of it, and its evaluation on held-out prompts.

    encode ---> metric texts ---> evaluation     base and tuned model, from the same noise

A method's assembly is a ``Tuning``; its programs "encode", "metric texts" and "evaluation" are made here, and
``held_out.py`` and ``result.py`` run them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from spo_jax import rng
from spo_jax.diffusion.schedule import Schedule
from spo_jax.distributed.mesh import jit_on, replicated, round_up
from spo_jax.evaluation.measure import make_measure_batch
from spo_jax.evaluation.metrics import METRICS, EncodeText, Metric, MetricSetup, NamedScorer
from spo_jax.formats.lora import starting_lora
from spo_jax.formats.pipeline import Pipeline
from spo_jax.formats.tokenizers import tokenize
from spo_jax.preference.scorers import Scorer, make_clip_scorer
from spo_jax.runs.assembly import (
    Assembly,
    Load,
    Program,
    key_shape,
    on_all,
    on_device,
    shapes_of,
    sharded,
    split,
)
from spo_jax.runs.state import Optimizer, TrainState
from spo_jax.sampling.encode import make_encode, prompt_shardings, tokens_of
from spo_jax.sampling.generate import SamplingOptions
from spo_jax.types import PromptBatch, Tokenizer

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
CLIP = "clip"  # the part of the CLIP that ``config.evaluation.judge`` names


class Tuning(Assembly, Protocol):
    """An assembly that tunes the UNet of a pipeline.

    Its ``programs`` have "encode", "metric texts" and "evaluation" beside its own, and ``resident["texts"]`` is what
    ``held_out_shapes`` gives.
    """

    @property
    def config(self) -> ConfigDict:
        """With the keys of ``tuning_config``."""

    @property
    def mesh(self) -> Mesh:
        """The devices."""

    @property
    def held_out(self) -> Sequence[str]:
        """The prompts to measure on."""

    @property
    def pipeline(self) -> Pipeline:
        """For images of the config's size."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Of the text of a scorer that training asks; None where it asks none, and prompts are without such a text."""

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """Those of ``config.evaluation.metrics`` that a program computes."""

    @property
    def params(self) -> Mapping[str, PyTree]:
        """Frozen parameters by part: the pipeline's, and those of scorer and metrics."""

    @property
    def text_params(self) -> dict[str, PyTree]:
        """Those that encode prompts."""

    @property
    def process(self) -> Schedule:
        """Of ``config.sampling.num_steps``."""

    @property
    def state(self) -> TrainState:
        """Before the first step, of ``starting_state``."""

    @property
    def num_texts(self) -> int:
        """Prompts that are encoded at a time."""

    @property
    def chunk(self) -> int:
        """Images that a device decodes and scores at a time, at most; 0 for its share of the batch."""


# ---------------------------------------------------------------------------------------------------------- assembling
def make_metrics(
    config: ConfigDict, pipeline: Pipeline, loaded: Load, preference: Callable[[], NamedScorer]
) -> tuple[dict[str, Metric], dict[str, PyTree]]:
    """The metrics that the config names, and the parameters that only they read.

    Args:
      config: of the run.
      pipeline: its first tokenizer is that of the CLIP.
      loaded: gives weights or shapes.
      preference: opens the scorer that training asks, for the metric ``preference_score``; UserError if there is none.

    Raises:
      UserError: a network is not there, or ``preference`` raises it.
    """
    params: dict[str, PyTree] = {}

    @functools.cache
    def of_clip() -> NamedScorer:
        clip, params[CLIP] = loaded.clip(config.evaluation.judge, CLIP, step_aware=False)
        return NamedScorer(make_clip_scorer(clip), CLIP, loaded.tokenizer("", pipeline.tokenizer, clip.tower))

    setup = MetricSetup(preference, of_clip)
    # The others score finished images: see ``held_out.measure_images``.
    return {name: METRICS[name](setup) for name in config.evaluation.metrics if name in METRICS}, params


def starting_state(
    config: ConfigDict, optimizer: Optimizer, adapters: str, *, starts_as_reference: bool = False
) -> Callable[[PyTree], TrainState]:
    """Makes the state before the first step of the UNet's parameters: adapters, or with rank 0 a float32 copy of all.

    Args:
      config: of the run.
      optimizer: of the state.
      adapters: names those to start from, as ``Load.adapters`` gives it; empty for fresh ones.
      starts_as_reference: the adapters are the reference, as they are at the start.
    """

    def first_state(unet: PyTree) -> TrainState:
        if config.lora.rank == 0:
            return TrainState.create({"params": jax.tree.map(lambda x: jnp.array(x, jnp.float32), unet)}, optimizer)
        key = rng.stream(jax.random.key(config.seed), "lora")
        lora = {"lora": starting_lora(key, unet, config.lora.rank, adapters or None)}
        return TrainState.create(lora, optimizer, starts_as_reference=starts_as_reference)

    return first_state


def held_out_shapes(made: Tuning) -> tuple[PromptBatch, dict[str, jax.ShapeDtypeStruct]]:
    """Shapes of the encoded held-out prompts, and of the metrics' texts of them."""

    def all_rows(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((len(made.held_out), *x.shape[1:]), x.dtype)

    prompts = made.programs["encode"].results.map_rows(all_rows)
    return on_all(made.mesh, (prompts, jax.tree.map(all_rows, made.programs["metric texts"].results)))


def evaluation_executions(made: Tuning, steps: int) -> dict[str, int]:
    """How often a run of so many steps of its loop executes each of the three programs for what it shows."""
    config, count = made.config, len(made.held_out)
    texts = math.ceil(count / made.num_texts)
    images = round_up(min(config.evaluation.batch_size, count), made.mesh.size)
    sheets = math.ceil(steps / config.validation.every) if config.validation.every else 0
    shown = math.ceil(min(config.validation.num_prompts, count) / images)
    curve = math.ceil(steps / config.evaluation.every) if config.evaluation.every else 0
    return {
        "encode": texts,
        "metric texts": texts,
        # Of base and tuned model, curves, and the sheets.
        "evaluation": (2 + curve) * math.ceil(count / images) + sheets * shown,
    }


# ------------------------------------------------------------------------------------------------------------ programs
def encode_program(made: Tuning, scorer: Scorer | None = None) -> Program:
    """Text encoders, and the text of the scorer if there is one, of ``made.num_texts`` prompts."""
    function = jit_on(made.mesh, make_encode(made.pipeline, scorer))
    blank = [""] * made.num_texts

    def shapes() -> tuple[PyTree, ...]:
        return on_device(made.text_params), *on_all(made.mesh, tokens_of(made.pipeline, made.tokenizer, blank))

    return Program("encode", function, shapes)


def metric_texts_program(made: Tuning) -> Program:
    """What metrics read of some prompts."""
    metrics = reading_metrics(made)

    def texts(params: dict[str, PyTree], tokens: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {name: encode(params, tokens[name]) for name, (encode, _) in metrics.items()}

    def shapes() -> tuple[PyTree, ...]:
        blank = [""] * made.num_texts
        tokens = {name: tokenize(tokenizer, blank) for name, (_, tokenizer) in metrics.items()}
        return on_device(text_metric_params(made)), on_all(made.mesh, tokens)

    return Program("metric texts", jit_on(made.mesh, texts), shapes)


def evaluation_program(made: Tuning) -> Program:
    """Images of some held-out prompts, and their scores."""
    config, mesh = made.config, made.mesh
    options = SamplingOptions(config.sampling.guidance_scale, config.evaluation.eta)
    program = make_measure_batch(made.pipeline, made.process, made.metrics, mesh, options, made.chunk)

    def shapes() -> tuple[PyTree, ...]:
        rows = round_up(min(config.evaluation.batch_size, len(made.held_out)), mesh.size)
        prompts, texts = made.resident["texts"]
        prompts = prompts.map_rows(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype))
        params = on_device(metric_params(made))
        variables = {"params": params["unet"], **shapes_of(made.state.result)}
        prompts = sharded(prompts, prompt_shardings(prompts, mesh))
        numbers = split(mesh, jax.ShapeDtypeStruct((rows,), jnp.int32))
        return params, variables, prompts, texts, key_shape(mesh), numbers

    return Program("evaluation", jit_on(mesh, program, out_shardings=replicated(mesh)), shapes)


# -------------------------------------------------------------------------------------------------------------- pieces
def reading_metrics(made: Tuning) -> dict[str, tuple[EncodeText, Tokenizer]]:
    """How the metrics encode prompts, and with which tokenizer; of those that read prompts."""
    return {
        name: (metric.encode_text, metric.tokenizer)
        for name, metric in made.metrics.items()
        if metric.encode_text is not None and metric.tokenizer is not None
    }


def text_metric_params(made: Tuning) -> dict[str, PyTree]:
    """What the metrics read of prompts is made with."""
    return {part: made.params[part] for name in reading_metrics(made) for part in made.metrics[name].parts}


def metric_params(made: Tuning) -> dict[str, PyTree]:
    """What an evaluation reads."""
    read = [part for metric in made.metrics.values() for part in metric.parts]
    return {part: made.params[part] for part in ("unet", "vae", *read)}
