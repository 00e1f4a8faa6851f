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

from spo_jax import rng
from spo_jax.diffusion.guidance import make_guided_prediction
from spo_jax.diffusion.schedule import Schedule, check_trainable, make_schedule
from spo_jax.distributed.mesh import batch_sharding, jit_on, replicated, round_up
from spo_jax.distributed.offload import weight_placement
from spo_jax.distributed.pieces import piece_size
from spo_jax.distributed.sharding import weight_shardings
from spo_jax.errors import UserError
from spo_jax.evaluation.measure import make_measure_batch
from spo_jax.evaluation.metrics import METRICS, EncodeText, Metric, MetricSetup, NamedScorer
from spo_jax.formats.base import base_of_config
from spo_jax.formats.lora import starting_lora
from spo_jax.formats.pipeline import Pipeline
from spo_jax.formats.scorers import function_scorer
from spo_jax.formats.tokenizers import tokenize
from spo_jax.preference.losses import OBJECTIVES, LossOptions, Objective
from spo_jax.preference.scorers import (
    SCORERS,
    Scorer,
    ScorerSetup,
    make_clip_scorer,
)
from spo_jax.runs.assembly import (
    Load,
    Program,
    key_shape,
    on_all,
    on_device,
    shapes_of,
    sharded,
    split,
)
from spo_jax.runs.optimizer import make_optimizer
from spo_jax.runs.state import Optimizer, TrainState
from spo_jax.sampling.encode import make_encode, prompt_shardings, tokens_of
from spo_jax.sampling.generate import SamplingOptions, make_decode
from spo_jax.spo.exchange import arrange, make_exchange
from spo_jax.spo.rollout import make_draw_pool, make_score_pool, num_used_steps
from spo_jax.spo.update import make_loss, make_update
from spo_jax.types import Pool, PromptBatch, Tokenizer

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
CLIP = "clip"  # the part of the CLIP that ``config.evaluation.judge`` names


@dataclasses.dataclass(frozen=True)
class SPO:
    """See ``assembly.Assembly``."""

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
    def metric_params(self) -> dict[str, PyTree]:
        """What an evaluation reads."""
        read = [part for metric in self.metrics.values() for part in metric.parts]
        return {part: self.params[part] for part in ("unet", "vae", *read)}

    @functools.cached_property
    def resident(self) -> dict[str, PyTree]:
        """What is on the devices all the time."""
        return shapes_of({**self.params, **self.state.parts, "texts": self.held_out_shapes})

    @functools.cached_property
    def held_out_shapes(self) -> tuple[PromptBatch, dict[str, jax.ShapeDtypeStruct]]:
        """Shapes of the encoded held-out prompts, and of the metrics' texts of them."""

        def all_rows(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((len(self.held_out), *x.shape[1:]), x.dtype)

        prompts = self.programs["encode"].results.map_rows(all_rows)
        return on_all(self.mesh, (prompts, jax.tree.map(all_rows, self.programs["metric texts"].results)))

    @functools.cached_property
    def programs(self) -> dict[str, Program]:
        """In the order in which they run."""
        made = (_encode, _pool, _score, _arrange, _exchange, _update, _metric_texts, _evaluation)
        return {program.name: program for make in made for program in [make(self)]}

    @property
    def executions(self) -> dict[str, int]:
        """How often a whole run executes each program, if every pair is valid."""
        config, batches, count = self.config, self.config.num_batches, len(self.held_out)
        pairs = config.prompts_per_batch * num_used_steps(config, self.process)
        updates = batches * math.ceil(pairs / config.train.minibatch_size)
        held_out = math.ceil(count / config.prompts_per_batch)
        images = round_up(min(config.evaluation.batch_size, count), self.mesh.size)
        sheets = math.ceil(batches / config.validation.every) if config.validation.every else 0
        shown = math.ceil(min(config.validation.num_prompts, count) / images)
        curve = math.ceil(batches / config.evaluation.every) if config.evaluation.every else 0
        return {
            "encode": batches + held_out,
            "pool": batches,
            "score": batches,
            "arrange": batches,
            "exchange": updates,
            "update": updates,
            "metric texts": held_out,
            # Of base and tuned model, curves, and the sheets.
            "evaluation": (2 + curve) * math.ceil(count / images) + sheets * shown,
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
    metrics, metric_params = _metrics(config, pipeline, loaded, preference)
    params = {**pipeline.params, **scorer_params, **metric_params}
    optimizer = make_optimizer(config.train)

    def first_state(unet: PyTree) -> TrainState:
        """Adapters, or with rank 0 a float32 copy of the whole UNet."""
        if config.lora.rank == 0:
            return TrainState.create({"params": jax.tree.map(lambda x: jnp.array(x, jnp.float32), unet)}, optimizer)
        key = rng.stream(jax.random.key(config.seed), "lora")
        return TrainState.create({"lora": starting_lora(key, unet, config.lora.rank, adapters or None)}, optimizer)

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
        state=loaded.state(first_state, params["unet"], mesh),
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


def _metrics(
    config: ConfigDict, pipeline: Pipeline, loaded: Load, preference: NamedScorer | None
) -> tuple[dict[str, Metric], dict[str, PyTree]]:
    """The metrics that the config names, and the parameters that only they read."""
    params: dict[str, PyTree] = {}

    def of_preference() -> NamedScorer:
        if preference is None:
            raise UserError(
                f"config.evaluation.metrics has preference_score, but the scorer {config.scorer.kind!r} reads latents, "
                "no finished images; leave preference_score out."
            )
        return preference

    @functools.cache
    def of_clip() -> NamedScorer:
        clip, params[CLIP] = loaded.clip(config.evaluation.judge, CLIP, step_aware=False)
        return NamedScorer(make_clip_scorer(clip), CLIP, loaded.tokenizer("", pipeline.tokenizer, clip.tower))

    setup = MetricSetup(of_preference, of_clip)
    # The others score finished images: see ``spo/evaluation.py``.
    return {name: METRICS[name](setup) for name in config.evaluation.metrics if name in METRICS}, params


# --------------------------------------------------------------------------------------------------------- programs
def _encode(made: SPO) -> Program:
    """Text encoders, and the scorer's text, of a batch of prompts."""
    function = jit_on(made.mesh, make_encode(made.pipeline, made.scorer))
    blank = [""] * made.config.prompts_per_batch

    def shapes() -> tuple[PyTree, ...]:
        return on_device(made.text_params), *on_all(made.mesh, tokens_of(made.pipeline, made.tokenizer, blank))

    return Program("encode", function, shapes)


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

    def shapes() -> tuple[PyTree, ...]:
        prompts, pairs, mask = made.programs["exchange"].results
        prompts = sharded(prompts, prompt_shardings(prompts, mesh))
        return *shapes_of((made.state, made.params["unet"])), prompts, *split(mesh, (pairs, mask))

    return Program("update", jit_on(mesh, update, donate_argnums=0, out_shardings=results), shapes)


def _metric_texts(made: SPO) -> Program:
    """What metrics read of some prompts."""
    metrics = reading_metrics(made)

    def texts(params: dict[str, PyTree], tokens: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {name: encode(params, tokens[name]) for name, (encode, _) in metrics.items()}

    def shapes() -> tuple[PyTree, ...]:
        blank = [""] * made.config.prompts_per_batch
        tokens = {name: tokenize(tokenizer, blank) for name, (_, tokenizer) in metrics.items()}
        return on_device(text_metric_params(made)), on_all(made.mesh, tokens)

    return Program("metric texts", jit_on(made.mesh, texts), shapes)


def _evaluation(made: SPO) -> Program:
    """Images of some held-out prompts, and their scores."""
    config, mesh = made.config, made.mesh
    options = SamplingOptions(config.sampling.guidance_scale, config.evaluation.eta)
    program = make_measure_batch(made.pipeline, made.process, made.metrics, mesh, options, config.scorer.chunk)

    def shapes() -> tuple[PyTree, ...]:
        rows = round_up(min(config.evaluation.batch_size, len(made.held_out)), mesh.size)
        prompts, texts = made.held_out_shapes
        prompts = prompts.map_rows(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype))
        params = on_device(made.metric_params)
        variables = {"params": params["unet"], **shapes_of(made.state.result)}
        prompts = sharded(prompts, prompt_shardings(prompts, mesh))
        numbers = split(mesh, jax.ShapeDtypeStruct((rows,), jnp.int32))
        return params, variables, prompts, texts, key_shape(mesh), numbers

    return Program("evaluation", jit_on(mesh, program, out_shardings=replicated(mesh)), shapes)


# ------------------------------------------------------------------------------------------------------------ pieces
def sampler(made: SPO, state: TrainState) -> PyTree:
    """The variables that sample pools: what is trained, or its average where the objective reads that."""
    return state.average if made.objective.reads_average else state.trained


def reading_metrics(made: SPO) -> dict[str, tuple[EncodeText, Tokenizer]]:
    """How the metrics encode prompts, and with which tokenizer; of those that read prompts."""
    return {
        name: (metric.encode_text, metric.tokenizer)
        for name, metric in made.metrics.items()
        if metric.encode_text is not None and metric.tokenizer is not None
    }


def text_metric_params(made: SPO) -> dict[str, PyTree]:
    """What the metrics read of prompts is made with."""
    names = reading_metrics(made)
    return {part: made.params[part] for name in names for part in made.metrics[name].parts}


def _pool_shardings(made: SPO) -> PyTree:
    """Where the arrays of a pool lie: prompts are split over the devices."""
    prompts: PyTree = batch_sharding(made.mesh, axis=1)
    times: PyTree = replicated(made.mesh)
    return Pool(prompts, prompts, None, times, times, made.config.sampling.num_inner_steps, x0=prompts)


def _batch(made: SPO) -> PromptBatch:
    """Shapes of a batch of prompts, split over the devices."""
    prompts = made.programs["encode"].results
    return sharded(prompts, prompt_shardings(prompts, made.mesh))
