"""What the training of a preference model is made of, with weights or with shapes only.

update                                       each minibatch of labelled pairs
captions, texts ---> validation              accuracy on the validation pairs, by timestep
report                                       some of those pairs as the model sees them
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from spo_jax.data.placed_pairs import Tokenizers, blank_rows
from spo_jax.diffusion.schedule import make_schedule
from spo_jax.distributed.mesh import jit_on, replicated
from spo_jax.distributed.sharding import weight_sharding, weight_shardings
from spo_jax.errors import UserError
from spo_jax.evaluation.pair_accuracy import (
    PLAIN,
    SCORER,
    TOLD_0,
    AccuracyMeasure,
    AccuracyPrograms,
    AskedScorer,
    make_accuracy_programs,
)
from spo_jax.formats.base import base_of_config
from spo_jax.formats.pipeline import Pipeline
from spo_jax.models.clip import CLIPModel
from spo_jax.preference.scorers import ImageScorer, make_clip_scorer, score_pairs
from spo_jax.runs.assembly import Load, Program, key_shape, on_all, shapes_of, sharded, split
from spo_jax.runs.optimizer import make_optimizer, warmup_linear_decay
from spo_jax.runs.state import Optimizer, TrainState
from spo_jax.sampling.encode import make_encode_captions, prompt_shardings
from spo_jax.sampling.noisy_pairs import make_predict_clean, pair_keys
from spo_jax.spm.update import Relabel, SeenPairs, make_relabel, make_spm_update
from spo_jax.types import LabelledPairs


@dataclasses.dataclass(frozen=True)
class SPM:
    """See ``assembly.Assembly``."""

    config: ConfigDict
    mesh: Mesh
    pipeline: Pipeline  # the frozen base model, for images of the config's size
    clip: CLIPModel  # the preference model
    tokenizers: Tokenizers
    asked: dict[str, AskedScorer]  # the scorers that validation measures; the first is the preference model
    frozen: dict[str, PyTree]  # the base model's parameters by part, and the labeller's
    fixed: dict[str, PyTree]  # those of measured scorers that are not trained
    seen: SeenPairs
    relabel: Relabel | None  # None where the labels of the data stay
    learning_rate: optax.Schedule
    optimizer: Optimizer
    state: TrainState  # before the first step

    @property
    def scorer(self) -> ImageScorer:
        """The preference model."""
        return self.asked[SCORER].scorer

    def asked_params(self, params: PyTree) -> dict[str, PyTree]:
        """Parameters of the measured scorers by name, with ``params`` for the preference model."""
        return {**dict.fromkeys(self.asked, params), **self.fixed}

    @functools.cached_property
    def resident(self) -> dict[str, PyTree]:
        """What is on the devices all the time."""
        return shapes_of({**self.frozen, **self.fixed, **self.state.parts})

    @functools.cached_property
    def accuracy(self) -> AccuracyPrograms:
        """The programs of validation, as functions."""
        return make_accuracy_programs(self.pipeline, self.seen.predict_clean, self.asked, self.mesh)

    @functools.cached_property
    def measure(self) -> AccuracyMeasure:
        """The measurement of validation."""
        programs = AccuracyPrograms(*(self.programs[name].function for name in ("captions", "texts", "validation")))
        return AccuracyMeasure(programs, self.pipeline, self.asked, self.mesh)

    @functools.cached_property
    def programs(self) -> dict[str, Program]:
        """In the order in which they run."""
        made = (_update, _captions, _texts, _validation, _report)
        return {program.name: program for make in made for program in [make(self)]}

    @property
    def executions(self) -> dict[str, int]:
        """How often a whole run executes each program, if there are as many validation pairs as the config asks for."""
        config, validation = self.config, self.config.validation
        measured = 1 + math.ceil(config.num_steps / validation.every)  # before the first step, too
        batches = measured * math.ceil(validation.num_pairs / validation.batch_size)
        return {
            "update": config.num_steps * config.train.accumulation_steps,
            "captions": batches,
            "texts": batches,
            "validation": batches * len(validation.timesteps),
            "report": len(validation.timesteps),
        }


def assemble(config: ConfigDict, mesh: Mesh, load: type[Load]) -> SPM:
    """Makes what a run of the config needs, but the pairs.

    Args:
      config: checked, see ``spm/config.py``.
      mesh: the devices. It may be abstract if no program is run or compiled.
      load: gives weights or shapes.

    Raises:
      UserError: a network is not there, or something does not fit together.
    """
    loaded = load(functools.partial(weight_sharding, mesh), jnp.dtype(config.dtype), config.attention)
    pipeline = loaded.pipeline(base_of_config(config), config.height, config.width, remat=False)
    step_aware = config.scorer.step_aware
    clip, start = loaded.clip(config.scorer.init, "scorer", params_dtype=jnp.float32, step_aware=step_aware)
    frozen, fixed = dict(pipeline.params), {}
    if config.labels.judge:
        labeller_clip, frozen["labeller"] = loaded.clip(config.labels.judge, "labeller")
    if config.validation.plain:
        plain_clip, fixed[PLAIN] = loaded.clip(config.validation.plain, "plain")
    clip = clip.clone(remat=config.remat)
    tokenizer = loaded.tokenizer(config.scorer.tokenizer, pipeline.tokenizer, clip.tower)
    tokenizers, relabel = Tokenizers(pipeline, tokenizer), None
    if config.labels.judge:
        reads = loaded.tokenizer(config.labels.tokenizer, pipeline.tokenizer, labeller_clip.tower)
        tokenizers = tokenizers._replace(labeller=reads)
        # It sees the images themselves, as CLIP's own image processor would show them.
        relabel = make_relabel(make_clip_scorer(labeller_clip, antialias=True), config.labels.threshold)
    scorer = make_clip_scorer(clip)
    asked = {SCORER: AskedScorer(scorer, tokenizer)}
    if step_aware:
        asked[TOLD_0] = AskedScorer(scorer, tokenizer, step_aware=False)
    if config.validation.plain:
        reads = loaded.tokenizer("", tokenizer, plain_clip.tower)
        asked[PLAIN] = AskedScorer(make_clip_scorer(plain_clip), reads, step_aware=False)
    # Only the timesteps of training matter; the number of sampling steps plays no part.
    process = make_schedule(pipeline.scheduler_config, num_steps=1)
    check_timesteps(config, process.num_train_timesteps)
    predict_clean = make_predict_clean(pipeline, process, config.guidance_scale, config.chunk)
    train = config.train
    learning_rate = warmup_linear_decay(train.learning_rate, train.warmup_steps, config.num_steps, train.warmup)
    optimizer = make_optimizer(train, learning_rate)
    return SPM(
        config=config,
        mesh=mesh,
        pipeline=pipeline,
        clip=clip,
        tokenizers=tokenizers,
        asked=asked,
        frozen=frozen,
        fixed=fixed,
        seen=SeenPairs(make_encode_captions(pipeline), predict_clean, tuple(config.timesteps)),
        relabel=relabel,
        learning_rate=learning_rate,
        optimizer=optimizer,
        state=loaded.state(lambda params: TrainState.create(params, optimizer), start, mesh),
    )


def check_timesteps(config: ConfigDict, count: int) -> None:
    """Raises UserError if the config names a timestep that the base model, which has ``count``, does not have."""
    for name, highest in (
        ("timesteps", config.timesteps[1] - 1),
        ("validation.timesteps", max(config.validation.timesteps)),
    ):
        if highest >= count:
            raise UserError(f"config.{name} goes up to {highest}, but the base model's last timestep is {count - 1}.")


# ---------------------------------------------------------------------------------------------------------- programs
def _update(made: SPM) -> Program:
    """One minibatch of pairs, one gradient, one step of the optimizer."""
    update = make_spm_update(made.scorer, made.seen, made.optimizer, made.relabel)
    results = (weight_shardings(made.mesh, made.state), replicated(made.mesh))

    def shapes() -> tuple[PyTree, ...]:
        pairs = _pairs(made, made.config.train.batch_size)
        return *shapes_of((made.state, made.frozen)), pairs, key_shape(made.mesh)

    return Program("update", jit_on(made.mesh, update, donate_argnums=0, out_shardings=results), shapes)


def _captions(made: SPM) -> Program:
    """The base model's text encoders."""

    def shapes() -> tuple[PyTree, ...]:
        return shapes_of(_seen_params(made)), _pairs(made, made.config.validation.batch_size).tokens

    return Program("captions", made.accuracy.encode_captions, shapes)


def _texts(made: SPM) -> Program:
    """The measured scorers' text."""

    def shapes() -> tuple[PyTree, ...]:
        tokens = _pairs(made, made.config.validation.batch_size).scorer_tokens
        return shapes_of(made.asked_params(made.state.result)), dict.fromkeys(made.asked, tokens)

    return Program("texts", made.accuracy.encode_texts, shapes)


def _validation(made: SPM) -> Program:
    """Accuracy on a batch of validation pairs at one timestep."""

    def shapes() -> tuple[PyTree, ...]:
        mesh, pairs = made.mesh, _pairs(made, made.config.validation.batch_size)
        prompts, texts = made.programs["captions"].results, made.programs["texts"].results
        timestep = on_all(mesh, jax.ShapeDtypeStruct((), jnp.int32))
        return (
            shapes_of(_seen_params(made)),
            pairs.images,
            pairs.labels,
            pairs.weights,
            sharded(prompts, prompt_shardings(prompts, mesh)),
            split(mesh, texts),
            timestep,
            pairs.positions,
            key_shape(mesh),
        )

    return Program("validation", made.accuracy.measure_pairs, shapes)


def _report(made: SPM) -> Program:
    """Pairs as the preference model sees them at a timestep, and its scores."""
    scorer, seen = made.scorer, made.seen

    def look(
        frozen: dict[str, PyTree], params: PyTree, pairs: LabelledPairs, timestep: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        timesteps = jnp.full((len(pairs.images),), timestep)
        prompts, keys = seen.encode(frozen, pairs.tokens), pair_keys(key, pairs.positions)
        clean = seen.predict_clean(frozen, pairs.images, prompts, timesteps, keys)
        assert pairs.scorer_tokens is not None
        return clean, score_pairs(scorer, params, clean, scorer.encode_text(params, pairs.scorer_tokens), timesteps)

    def shapes() -> tuple[PyTree, ...]:
        mesh, pairs = made.mesh, _pairs(made, made.config.validation.batch_size)
        timestep = on_all(mesh, jax.ShapeDtypeStruct((), jnp.int32))
        return *shapes_of((made.frozen, made.state.result)), pairs, timestep, key_shape(mesh)

    return Program("report", jit_on(made.mesh, look, out_shardings=replicated(made.mesh)), shapes)


# ------------------------------------------------------------------------------------------------------------ pieces
def _seen_params(made: SPM) -> dict[str, PyTree]:
    """What validation reads."""
    return {**made.pipeline.params, "scorers": made.asked_params(made.state.result)}


def _pairs(made: SPM, size: int) -> LabelledPairs:
    """Shapes of so many pairs, split over the devices."""
    return split(made.mesh, blank_rows(made.tokenizers, size, made.pipeline.image_size))
