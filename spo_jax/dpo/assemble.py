"""What the method ``dpo`` is made of: networks, metrics, state and programs, with weights or with shapes only.

update                                       each minibatch of given pairs
errors                                       of validation pairs, by timestep
encode ---> metric texts ---> evaluation     base and tuned model, on held-out prompts
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NoReturn

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from spo_jax.data.placed_pairs import Tokenizers, blank_rows
from spo_jax.diffusion.guidance import make_guided_prediction
from spo_jax.diffusion.schedule import Schedule, make_schedule
from spo_jax.distributed.mesh import jit_on, replicated
from spo_jax.distributed.sharding import weight_sharding, weight_shardings
from spo_jax.dpo.update import PairView, make_dpo_update, make_pair_errors
from spo_jax.errors import UserError
from spo_jax.evaluation.metrics import Metric
from spo_jax.formats.base import base_of_config
from spo_jax.formats.pipeline import Pipeline
from spo_jax.formats.tokenizers import tokenize_prompts
from spo_jax.preference.losses import LossOptions
from spo_jax.preference.offline import OFFLINE, Offline
from spo_jax.runs.assembly import SAME_ROUNDING, Load, Program, key_shape, on_all, shapes_of, split
from spo_jax.runs.optimizer import make_optimizer, warmup_constant
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
from spo_jax.sampling.encode import make_encode_captions
from spo_jax.sampling.noisy_pairs import make_add_noise
from spo_jax.types import LabelledPairs, Tokenizer

NUM_TEXTS = 16  # prompts that are encoded at a time


@dataclasses.dataclass(frozen=True)
class DPO:
    """See ``assembly.Assembly`` and ``tuning.Tuning``."""

    config: ConfigDict
    mesh: Mesh
    held_out: list[str]  # prompts to measure on
    pipeline: Pipeline  # for images of the config's size
    metrics: dict[str, Metric]  # those that the config names
    params: dict[str, PyTree]  # frozen ones, by part
    process: Schedule
    view: PairView
    objective: Offline
    options: LossOptions  # with the strength that is used
    learning_rate: optax.Schedule
    optimizer: Optimizer
    state: TrainState  # before the first step

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None: no scorer reads the prompts."""
        return None

    @property
    def tokenizers(self) -> Tokenizers:
        """Those that read captions."""
        return Tokenizers(self.pipeline)

    @property
    def text_params(self) -> dict[str, PyTree]:
        """What encodes prompts."""
        return {part: self.params[part] for part in TEXT_ENCODERS if part in self.params}

    @property
    def pair_params(self) -> dict[str, PyTree]:
        """What pairs are seen with: the pipeline's."""
        return {part: self.params[part] for part in self.pipeline.params}

    @property
    def num_texts(self) -> int:
        """Prompts that are encoded at a time."""
        return min(NUM_TEXTS, len(self.held_out))

    @property
    def chunk(self) -> int:
        """0: a device decodes its share of the images at once."""
        return 0

    @functools.cached_property
    def resident(self) -> dict[str, PyTree]:
        """What is on the devices all the time."""
        return shapes_of({**self.params, **self.state.parts, "texts": held_out_shapes(self)})

    @functools.cached_property
    def programs(self) -> dict[str, Program]:
        """In the order in which they run."""
        errors = [_errors(self)] if self.config.data.validation else []
        made = (_update(self), *errors, encode_program(self), metric_texts_program(self), evaluation_program(self))
        return {program.name: program for program in made}

    @property
    def executions(self) -> dict[str, int]:
        """How often a whole run executes each program, if there are as many validation pairs as the config asks for."""
        config, validation = self.config, self.config.validation
        counts = {"update": config.num_steps * config.train.accumulation_steps}
        if config.data.validation:
            measured = math.ceil(config.num_steps / validation.every) if validation.every else 1
            batches = math.ceil(validation.num_pairs / validation.batch_size)
            counts["errors"] = measured * batches * len(validation.timesteps)
        return counts | evaluation_executions(self, config.num_steps)


def assemble(config: ConfigDict, mesh: Mesh, load: type[Load]) -> DPO:
    """Makes what a run of the config needs, but the pairs.

    Args:
      config: checked, see ``dpo/config.py``.
      mesh: the devices. It may be abstract if no program is run or compiled.
      load: gives weights or shapes.

    Raises:
      UserError: prompts or a network are not there, or something does not fit together.
    """
    loaded = load(functools.partial(weight_sharding, mesh), jnp.dtype(config.dtype), config.attention)
    held_out = loaded.prompts(config.evaluation.prompts, config.evaluation.num_prompts)
    adapters = loaded.adapters(config.lora.init)
    size = config.sampling.height, config.sampling.width
    pipeline = loaded.pipeline(base_of_config(config), *size, remat=config.remat)
    process = make_schedule(pipeline.scheduler_config, config.sampling.num_steps)
    highest, count = max(config.validation.timesteps), process.num_train_timesteps
    if highest >= count:
        raise UserError(
            f"config.validation.timesteps goes up to {highest}, but the base model's last timestep is {count - 1}."
        )
    metrics, metric_params = make_metrics(config, pipeline, loaded, _no_scorer)
    objective, loss, train = OFFLINE[config.loss.kind], config.loss, config.train
    learning_rate = warmup_constant(train.learning_rate, train.warmup_steps)
    optimizer = make_optimizer(train, learning_rate)
    view = PairView(
        encode=make_encode_captions(pipeline),
        add_noise=make_add_noise(pipeline, process),
        predict=make_guided_prediction(pipeline.unet.apply, 1.0),
        process=process,
        empty_tokens=tokenize_prompts(pipeline, [""]),
        empty_prompts=config.data.empty_prompts,
        true_size=config.data.size_condition == "true",
    )
    first_state = starting_state(config, optimizer, adapters, starts_as_reference=bool(config.lora.init))
    return DPO(
        config=config,
        mesh=mesh,
        held_out=held_out,
        pipeline=pipeline,
        metrics=metrics,
        params={**pipeline.params, **metric_params},
        process=process,
        view=view,
        objective=objective,
        options=LossOptions(beta=objective.beta if loss.beta is None else loss.beta),
        learning_rate=learning_rate,
        optimizer=optimizer,
        state=loaded.state(first_state, pipeline.params["unet"], mesh),
    )


def _no_scorer() -> NoReturn:
    raise AssertionError("config.check refuses preference_score")


# ------------------------------------------------------------------------------------------------------------ programs
def _update(made: DPO) -> Program:
    """One minibatch of pairs, one gradient, one step of the optimizer."""
    config, mesh = made.config, made.mesh
    update = make_dpo_update(made.view, made.objective, made.options, made.optimizer, config.loss.guard)
    results = (weight_shardings(mesh, made.state), replicated(mesh))
    function = jit_on(mesh, update, donate_argnums=0, out_shardings=results, compiler_options=SAME_ROUNDING)

    def shapes() -> tuple[PyTree, ...]:
        pairs = _pairs(made, config.train.batch_size)
        return *shapes_of((made.state, made.pair_params)), pairs, key_shape(mesh)

    return Program("update", function, shapes)


def _errors(made: DPO) -> Program:
    """Errors of policy and reference on a batch of validation pairs, all at one timestep."""
    config, mesh = made.config, made.mesh

    def shapes() -> tuple[PyTree, ...]:
        pairs = _pairs(made, config.validation.batch_size)
        timestep = on_all(mesh, jax.ShapeDtypeStruct((), jnp.int32))
        models = made.state.result, made.state.reference, made.pair_params
        return *shapes_of(models), pairs, timestep, key_shape(mesh)

    function = jit_on(mesh, make_pair_errors(made.view), out_shardings=replicated(mesh), compiler_options=SAME_ROUNDING)
    return Program("errors", function, shapes)


def _pairs(made: DPO, size: int) -> LabelledPairs:
    """Shapes of so many pairs, split over the devices."""
    return split(made.mesh, blank_rows(made.tokenizers, size, made.pipeline.image_size))
