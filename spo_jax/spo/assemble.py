"""What SPO is made of: networks, scorer, metrics, state and programs, with weights or with shapes only.

encode ---> pool ---> score ---> arrange ---> exchange ---> update        each batch of prompts
encode ---> text of metrics ---> evaluation                    base and tuned model, on held-out prompts
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from spo_jax.diffusion.guidance import make_guided_prediction
from spo_jax.diffusion.schedule import Schedule, check_trainable, make_schedule
from spo_jax.distributed.mesh import batch_sharding, jit_on, replicated
from spo_jax.distributed.offload import weight_placement
from spo_jax.distributed.pieces import piece_size
from spo_jax.distributed.sharding import weight_shardings
from spo_jax.errors import UserError
from spo_jax.evaluation.metrics import Metric, NamedScorer
from spo_jax.formats.base import base_of_config
from spo_jax.formats.pipeline import Pipeline
from spo_jax.formats.scorers import function_scorer
from spo_jax.preference.losses import OBJECTIVES, LossOptions, Objective
from spo_jax.preference.scorers import (
    SCORERS,
    Scorer,
    ScorerSetup,
    make_clip_scorer,
)
from spo_jax.runs.assembly import (
    SAME_ROUNDING,
    Load,
    Program,
    key_shape,
    on_all,
    shapes_of,
    sharded,
    split,
)
from spo_jax.runs.optimizer import make_optimizer
from spo_jax.runs.state import Optimizer, TrainState
from spo_jax.runs.tuning import (
    TEXT_ENCODERS,
    encode_program,
    evaluation_executions,
    evaluation_program,
    held_out_shapes,
    make_metrics,
    metric_texts_program,
    starting_state,
)
from spo_jax.sampling.encode import prompt_shardings
from spo_jax.sampling.generate import make_decode
from spo_jax.spo.exchange import arrange, make_exchange
from spo_jax.spo.rollout import make_draw_pool, make_score_pool, num_used_steps
from spo_jax.spo.update import make_loss, make_update
from spo_jax.types import Pool, PromptBatch, Tokenizer


@dataclasses.dataclass(frozen=True)
class SPO:
    """See ``assembly.Assembly`` and ``tuning.Tuning``."""

    config: ConfigDict
    mesh: Mesh
    prompts: list[str]  # to train on
    held_out: list[str]  # to measure on
    pipeline: Pipeline  # for images of the config's size
    scorer: Scorer
    tokenizer: Tokenizer  # of the scorer's text
    metrics: dict[str, Metric]  # those that the config names
    params: dict[str, PyTree]  # frozen ones, by part
    process: Schedule
    objective: Objective
    optimizer: Optimizer
    state: TrainState  # before the first update

    @property
    def text_params(self) -> dict[str, PyTree]:
        """What encodes prompts."""
        return {part: self.params[part] for part in (*TEXT_ENCODERS, *self.scorer.text_parts) if part in self.params}

    @property
    def pool_params(self) -> dict[str, PyTree]:
        """What the pool reads; the scorer only where the best or worst candidate goes on."""
        scored = self.config.sampling.continuation != "random"
        return {part: self.params[part] for part in ("unet", *self.scorer.parts * scored)}

    @property
    def score_params(self) -> dict[str, PyTree]:
        """What the scores are computed with."""
        return {part: self.params[part] for part in self.scorer.parts}

    @property
    def num_texts(self) -> int:
        """Prompts that are encoded at a time."""
        return self.config.prompts_per_batch

    @property
    def chunk(self) -> int:
        """Images that a device decodes and scores at a time, at most."""
        return self.config.scorer.chunk

    @functools.cached_property
    def resident(self) -> dict[str, PyTree]:
        """What is on the devices all the time."""
        return shapes_of({**self.params, **self.state.parts, "texts": held_out_shapes(self)})

    @functools.cached_property
    def programs(self) -> dict[str, Program]:
        """In the order in which they run."""
        own = (make(self) for make in (_pool, _score, _arrange, _exchange, _update))
        made = (encode_program(self, self.scorer), *own, metric_texts_program(self), evaluation_program(self))
        return {program.name: program for program in made}

    @property
    def executions(self) -> dict[str, int]:
        """How often a whole run executes each program, if every pair is valid."""
        config, batches = self.config, self.config.num_batches
        pairs = config.prompts_per_batch * num_used_steps(config, self.process)
        updates = batches * math.ceil(pairs / config.train.minibatch_size)
        shown = evaluation_executions(self, batches)
        return {
            "encode": batches + shown["encode"],
            "pool": batches,
            "score": batches,
            "arrange": batches,
            "exchange": updates,
            "update": updates,
            "metric texts": shown["metric texts"],
            "evaluation": shown["evaluation"],
        }


def assemble(config: ConfigDict, mesh: Mesh, load: type[Load]) -> SPO:
    """Makes what a run of the config needs.

    Args:
      config: checked, see ``spo/config.py``.
      mesh: the devices. It may be abstract if no program is run or compiled.
      load: gives weights or shapes.

    Raises:
      UserError: prompts or a network are not there, or something does not fit together.
    """
    loaded = load(weight_placement(mesh, offload=config.offload), jnp.dtype(config.dtype), config.attention)
    prompts = loaded.prompts(config.prompts)
    held_out = loaded.prompts(config.evaluation.prompts, config.evaluation.num_prompts)
    adapters = loaded.adapters(config.lora.init)
    size = config.sampling.height, config.sampling.width
    pipeline = loaded.pipeline(base_of_config(config), *size, remat=config.remat)
    process = make_schedule(pipeline.scheduler_config, config.sampling.num_steps)
    check_trainable(process)
    num_used_steps(config, process)  # refuses a range of timesteps that no pair is drawn from
    preference, scorer_params = _image_scorer(config, pipeline, mesh, loaded)
    setup = ScorerSetup(config.scorer, preference and preference.scorer, make_decode(pipeline), mesh.size)
    scorer = SCORERS[config.scorer.kind](setup)
    metrics, metric_params = make_metrics(config, pipeline, loaded, lambda: _of_finished_images(config, preference))
    params = {**pipeline.params, **scorer_params, **metric_params}
    optimizer = make_optimizer(config.train)
    return SPO(
        config=config,
        mesh=mesh,
        prompts=prompts,
        held_out=held_out,
        pipeline=pipeline,
        scorer=scorer,
        tokenizer=pipeline.tokenizer if preference is None else preference.tokenizer,
        metrics=metrics,
        params=params,
        process=process,
        objective=OBJECTIVES[config.loss.kind],
        optimizer=optimizer,
        state=loaded.state(starting_state(config, optimizer, adapters), params["unet"], mesh),
    )


def _image_scorer(
    config: ConfigDict, pipeline: Pipeline, mesh: Mesh, loaded: Load
) -> tuple[NamedScorer | None, dict[str, PyTree]]:
    """The scorer of images behind SPO's, if it has one, and its parameters."""
    settings = config.scorer
    if settings.fn:
        size = piece_size(config.prompts_per_batch * config.sampling.num_candidates, mesh.size, settings.chunk)
        tokenizer = loaded.tokenizer(settings.tokenizer, pipeline.tokenizer, None)
        scorer = function_scorer(settings.fn, num_images=size, image_size=pipeline.image_size, tokenizer=tokenizer)
        return NamedScorer(scorer, "scorer", tokenizer), {"scorer": {}}
    if settings.kind != "image":
        return None, {}
    clip, params = loaded.clip(settings.path, "scorer")
    tokenizer = loaded.tokenizer(settings.tokenizer, pipeline.tokenizer, clip.tower)
    return NamedScorer(make_clip_scorer(clip), "scorer", tokenizer), {"scorer": params}


def _of_finished_images(config: ConfigDict, preference: NamedScorer | None) -> NamedScorer:
    """The scorer of images behind SPO's, for the metric that asks it."""
    if preference is None:
        raise UserError(
            f"config.evaluation.metrics has preference_score, but the scorer {config.scorer.kind!r} reads latents, "
            "no finished images; leave preference_score out."
        )
    return preference


# --------------------------------------------------------------------------------------------------------- programs
def _pool(made: SPO) -> Program:
    """The candidates of a batch of prompts."""
    pool = make_draw_pool(made.config, made.pipeline, made.scorer, made.process, made.mesh)
    function = jit_on(made.mesh, pool, out_shardings=_pool_shardings(made))

    def shapes() -> tuple[PyTree, ...]:
        return *shapes_of((made.pool_params, sampler(made, made.state))), _batch(made), key_shape(made.mesh)

    return Program("pool", function, shapes)


def _score(made: SPO) -> Program:
    """Their scores, and pairs of them."""
    score = make_score_pool(made.config, made.scorer)
    function = jit_on(made.mesh, score, out_shardings=batch_sharding(made.mesh, axis=1))

    def shapes() -> tuple[PyTree, ...]:
        pool = sharded(made.programs["pool"].results, _pool_shardings(made))
        return shapes_of(made.score_params), pool, _batch(made).scorer_text, key_shape(made.mesh)

    return Program("score", function, shapes)


def _arrange(made: SPO) -> Program:
    """The order of the pairs."""

    def shapes() -> tuple[PyTree, ...]:
        pairs, scores = made.programs["score"].results
        return key_shape(made.mesh), *split(made.mesh, (pairs.valid, scores), axis=1)

    return Program("arrange", jax.jit(arrange, out_shardings=replicated(made.mesh)), shapes)


def _exchange(made: SPO) -> Program:
    """A minibatch of pairs, spread over the devices."""

    def shapes() -> tuple[PyTree, ...]:
        pairs, _ = made.programs["score"].results
        order, count, *_ = made.programs["arrange"].results
        numbers = on_all(made.mesh, (order, count, jax.ShapeDtypeStruct((), jnp.int32)))
        return _batch(made), split(made.mesh, pairs, axis=1), *numbers

    return Program("exchange", jax.jit(make_exchange(made.mesh, made.config.train.minibatch_size)), shapes)


def _update(made: SPO) -> Program:
    """One minibatch of pairs, one gradient, one step of the optimizer."""
    config, mesh = made.config, made.mesh
    predict = make_guided_prediction(made.pipeline.unet.apply, config.sampling.guidance_scale)
    options = LossOptions(config.loss.beta, config.loss.clip_range, config.sampling.eta)
    update = make_update(make_loss(predict, made.process, made.objective, options), made.optimizer)
    results = (weight_shardings(mesh, made.state), replicated(mesh))
    function = jit_on(mesh, update, donate_argnums=0, out_shardings=results, compiler_options=SAME_ROUNDING)

    def shapes() -> tuple[PyTree, ...]:
        prompts, pairs, mask = made.programs["exchange"].results
        prompts = sharded(prompts, prompt_shardings(prompts, mesh))
        return *shapes_of((made.state, made.params["unet"])), prompts, *split(mesh, (pairs, mask))

    return Program("update", function, shapes)


# ------------------------------------------------------------------------------------------------------------ pieces
def sampler(made: SPO, state: TrainState) -> PyTree:
    """The variables that sample pools: what is trained, or its average where the objective reads that."""
    return state.average if made.objective.reads_average else state.trained


def _pool_shardings(made: SPO) -> PyTree:
    """Where the arrays of a pool lie: prompts are split over the devices."""
    prompts: PyTree = batch_sharding(made.mesh, axis=1)
    times: PyTree = replicated(made.mesh)
    return Pool(prompts, prompts, None, times, times, made.config.sampling.num_inner_steps, x0=prompts)


def _batch(made: SPO) -> PromptBatch:
    """Shapes of a batch of prompts, split over the devices."""
    prompts = made.programs["encode"].results
    return sharded(prompts, prompt_shardings(prompts, made.mesh))
