"""The compiled programs of a training run, with the shapes of their arguments in place of arrays."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from spo_jax.diffusion.schedule import make_schedule
from spo_jax.distributed.mesh import batch_sharding, jit_on, replicated, round_up
from spo_jax.distributed.offload import in_host_memory, weight_placement
from spo_jax.distributed.sharding import weight_sharding, weight_shardings
from spo_jax.evaluation.measure import make_measure_batch
from spo_jax.evaluation.pair_accuracy import PLAIN, SCORER, TOLD_0, Judge, make_measure_pairs
from spo_jax.formats.base import base_of_config
from spo_jax.formats.hub import exists, with_strength
from spo_jax.formats.pipeline import Pipeline, with_image_size
from spo_jax.formats.scorers import load_function
from spo_jax.formats.tokenizers import tokenize, tokenize_prompts
from spo_jax.planning.shapes import clip_shapes, device_bytes, pipeline_shapes
from spo_jax.preference.scorers import Scorer, make_clip_scorer, make_function_scorer
from spo_jax.runs.optimizer import make_optimizer, warmup_linear_decay
from spo_jax.sampling.encode import encode_prompts, make_encode, make_encode_captions
from spo_jax.sampling.noisy_pairs import make_predict_clean
from spo_jax.spm.update import make_relabel, make_spm_update
from spo_jax.spo.programs import ENCODE_PARTS, POOL_PARTS, Programs, compile_programs, starting_state
from spo_jax.spo.rollout import make_score_latents
from spo_jax.types import JudgedPairs, TrainState


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a run.

    Attributes:
      name: what it does, such as "update".
      function: compiled by ``jax.jit``, as in training.
      arguments: trees of ``jax.ShapeDtypeStruct`` with shardings.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run keeps on its devices and what it computes there.

    Attributes:
      resident: trees of shapes with shardings that are there all the time, by what they are: parts of ``params``, the
        parts of the state, and texts.
      programs: by name, in the order in which they run. To make one may need seconds, of tracing.
    """

    resident: dict[str, Any]
    programs: dict[str, Callable[[], tuple[Any, tuple[Any, ...]]]]

    def program(self, name: str) -> Program:
        """The program of that name."""
        return Program(name, *self.programs[name]())


def make_run(config: ConfigDict, mesh: Any) -> Run:
    """The run of a config on a mesh, which may be abstract as long as ``programs`` is not called.

    Raises:
      UserError: there is no config of a model.
    """
    return _spo(config, mesh) if config.method == "spo" else _spm(config, mesh)


def extra_bytes(program: Program, run: Run) -> int:
    """Bytes on a device of the arguments that are not ``run.resident``."""
    there = {id(leaf) for leaf in jax.tree.leaves(run.resident)}
    return device_bytes([leaf for leaf in jax.tree.leaves(program.arguments) if id(leaf) not in there])


# --------------------------------------------------------------------------------------------------------------- SPO
def _spo(config: ConfigDict, mesh: Mesh) -> Run:
    dtype = jnp.dtype(config.dtype)
    place = weight_placement(mesh, offload=config.offload)
    pipeline = with_tokenizers(pipeline_shapes(base_of_config(config), dtype, place))
    pipeline = with_image_size(pipeline, config.sampling.height, config.sampling.width)
    pipeline = dataclasses.replace(pipeline, unet=pipeline.unet.clone(remat=config.remat))
    scorer, scorer_params = _scorer(config.scorer.path, config.scorer.fn, dtype, place)
    clip, judge_params = clip_shapes(config.evaluation.judge, dtype, place, step_aware=False, what="judge")
    judge = make_clip_scorer(clip)
    params = {**pipeline.params, "scorer": scorer_params, "judge": judge_params}
    on_device = _on_device(params)  # as programs get them: what waits in the host's memory is an argument of its own
    schedule = make_schedule(pipeline.scheduler_config, config.sampling.num_steps)
    optimizer = make_optimizer(config.train)

    def first_state(unet: Any) -> TrainState:
        start = config.copy_and_resolve_references()
        if not exists(with_strength(start.lora.init)[0]):
            start.lora.init = ""  # mostly the same shapes as fresh adapters, and its file need not be here
        return starting_state(start, optimizer, jax.random.key(0), unet)

    state = _sharded(jax.eval_shape(first_state, params["unet"]), lambda tree: weight_shardings(mesh, tree))
    encode = make_encode(pipeline, scorer)
    num_texts = config.evaluation.num_prompts
    held_out, judge_text = jax.eval_shape(
        lambda params: (
            encode_prompts(encode, params, pipeline, pipeline.tokenizer, [""] * num_texts),
            judge.encode_text(params["judge"], tokenize(pipeline.tokenizer, [""] * num_texts)),
        ),
        on_device,
    )
    held_out, judge_text = _sharded((held_out, judge_text), lambda tree: jax.tree.map(lambda _: replicated(mesh), tree))
    resident = {
        **params,
        "trained": state.trained,
        "optimizer": (state.step, state.opt_state),
        "average": state.average,
        "texts": (held_out, judge_text),
    }

    def everywhere(tree: Any) -> Any:
        return _sharded(tree, lambda t: jax.tree.map(lambda _: replicated(mesh), t))

    def split(tree: Any) -> Any:
        return _sharded(tree, lambda t: jax.tree.map(lambda _: batch_sharding(mesh), t))

    pool_params = {name: params[name] for name in POOL_PARTS}

    @functools.cache  # tracing takes seconds, and several programs want the same
    def prompts() -> Any:
        size = config.prompts_per_batch
        batch = jax.eval_shape(
            lambda p: encode_prompts(encode, p, pipeline, pipeline.tokenizer, [""] * size), on_device
        )
        return _prompt_shards(mesh, batch)

    def key() -> Any:
        return everywhere(jax.eval_shape(lambda: jax.random.key(0)))

    @functools.cache
    def compiled() -> Programs:
        return compile_programs(config, pipeline, scorer, schedule, optimizer, mesh, state)

    scalar = everywhere(jax.ShapeDtypeStruct((), jnp.int32))

    def encoding():
        tokens, negative = everywhere(
            (
                jax.eval_shape(lambda: tokenize_prompts(pipeline, [""] * config.prompts_per_batch)),
                jax.eval_shape(lambda: tokenize_prompts(pipeline, [""])),
            )
        )
        return jit_on(mesh, encode), (
            {name: on_device[name] for name in ENCODE_PARTS if name in on_device},
            tokens,
            None if pipeline.force_zeros_for_empty_prompt else negative,
            tokens[0],
        )

    def pool():
        return compiled().pool, (pool_params, state.trained, prompts(), key())

    def score():
        shape = (config.prompts_per_batch, config.sampling.num_candidates, *pipeline.latent_shape)
        options = {"step_aware": config.scorer.step_aware, "chunk": config.scorer.chunk, "num_devices": mesh.size}
        candidates = split(jax.ShapeDtypeStruct(shape, jnp.float32))
        return jit_on(mesh, make_score_latents(pipeline, scorer, **options)), (
            pool_params,
            prompts(),
            candidates,
            scalar,
        )

    def exchange():
        made = compiled()
        pairs, scores = jax.eval_shape(made.pool, pool_params, state.trained, prompts(), key())
        order, count, *_ = everywhere(jax.eval_shape(made.arrange, key(), pairs.valid, scores))
        by_prompt = batch_sharding(mesh, axis=1)
        pairs = _sharded(pairs, lambda tree: jax.tree.map(lambda _: by_prompt, tree))
        return made.exchange, (prompts(), pairs, order, count, scalar)

    def update():
        function, arguments = exchange()
        taken, pairs, mask = jax.eval_shape(function, *arguments)
        return compiled().update, (state, params["unet"], _prompt_shards(mesh, taken), *split((pairs, mask)))

    def evaluation():
        options = {"guidance_scale": config.sampling.guidance_scale, "eta": config.evaluation.eta}
        options["chunk"] = config.scorer.chunk
        measure = make_measure_batch(pipeline, scorer, judge, schedule, mesh, **options)
        rows = round_up(min(config.evaluation.batch_size, num_texts), mesh.size)
        some = held_out.map_rows(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype))
        weights = pool_params | {"judge": on_device["judge"]}, {"params": params["unet"], **state.trained}
        rest = _prompt_shards(mesh, some), judge_text, key(), split(jax.ShapeDtypeStruct((rows,), jnp.int32))
        return jit_on(mesh, measure, out_shardings=replicated(mesh)), weights + rest

    programs = {
        "encode": encoding,
        "pool": pool,
        "score": score,
        "exchange": exchange,
        "update": update,
        "evaluation": evaluation,
    }
    return Run(resident, programs)


# --------------------------------------------------------------------------------------------------------------- SPM
def _spm(config: ConfigDict, mesh: Mesh) -> Run:
    dtype = jnp.dtype(config.dtype)
    place = functools.partial(weight_sharding, mesh)
    pipeline = with_tokenizers(pipeline_shapes(base_of_config(config), dtype, place))
    pipeline = with_image_size(pipeline, config.height, config.width)
    options = {"step_aware": config.scorer.step_aware, "known_plain": False}
    clip, start = clip_shapes(config.scorer.init, dtype, place, what="scorer", params_dtype=jnp.float32, **options)
    scorer = make_clip_scorer(clip.clone(remat=config.remat))
    frozen, relabel = dict(pipeline.params), None
    if config.labels.judge:
        judge, frozen["judge"] = clip_shapes(config.labels.judge, dtype, place, step_aware=True, what="judge")
        relabel = make_relabel(make_clip_scorer(judge, antialias=True), config.labels.threshold)
    judges, fixed = {SCORER: Judge(scorer, pipeline.tokenizer)}, {}
    if config.scorer.step_aware:
        judges[TOLD_0] = Judge(scorer, pipeline.tokenizer, step_aware=False)
    if config.validation.plain:
        plain, fixed[PLAIN] = clip_shapes(config.validation.plain, dtype, place, step_aware=True, what="plain")
        judges[PLAIN] = Judge(make_clip_scorer(plain), pipeline.tokenizer, step_aware=False)
    schedule = make_schedule(pipeline.scheduler_config, num_steps=1)
    predict_clean = make_predict_clean(pipeline, schedule, config.guidance_scale, config.chunk)
    encode = make_encode_captions(pipeline)
    rate, warmup_steps = config.train.learning_rate, config.train.warmup_steps
    learning_rate = warmup_linear_decay(rate, warmup_steps, config.num_steps, config.train.warmup)
    optimizer = make_optimizer(config.train, learning_rate)

    def first_state(start: Any) -> TrainState:
        average = None if not config.train.ema_decay else start
        return TrainState(jnp.zeros((), jnp.int32), start, optimizer.init(start), average)

    state = _sharded(jax.eval_shape(first_state, start), lambda tree: weight_shardings(mesh, tree))
    resident = {
        **frozen,
        **fixed,
        "trained": state.trained,
        "optimizer": (state.step, state.opt_state),
        "average": state.average,
    }

    def split(tree: Any) -> Any:
        return _sharded(tree, lambda t: jax.tree.map(lambda _: batch_sharding(mesh), t))

    def everywhere(tree: Any) -> Any:
        return _sharded(tree, lambda t: jax.tree.map(lambda _: replicated(mesh), t))

    def pairs_of(size: int) -> JudgedPairs:
        def rows(*shape: int, dtype: Any) -> Any:
            return jax.ShapeDtypeStruct((size, *shape), dtype)

        tokens = jax.eval_shape(lambda: tokenize_prompts(pipeline, [""] * size))
        pairs = JudgedPairs(
            images=rows(2, *pipeline.image_size, 3, dtype=jnp.uint8),
            tokens=tokens,
            scorer_tokens=tokens[0],
            judge_tokens=tokens[0] if config.labels.judge else None,
            labels=rows(2, dtype=jnp.float32),
            weights=rows(dtype=jnp.float32),
            positions=rows(dtype=jnp.uint32),
        )
        return split(pairs)

    key = everywhere(jax.eval_shape(lambda: jax.random.key(0)))

    def update():
        update = make_spm_update(
            encode,
            predict_clean,
            scorer,
            optimizer,
            timesteps=tuple(config.timesteps),
            relabel=relabel,
            ema_decay=config.train.ema_decay or 0.0,
        )
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        update = jit_on(mesh, update, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
        return update, (state, frozen, pairs_of(config.train.batch_size), key)

    def validation():
        seen = pairs_of(config.validation.batch_size)
        judges_params = dict.fromkeys(judges, state.trained) | fixed
        prompts = jax.eval_shape(encode, frozen, seen.tokens)
        texts = jax.eval_shape(
            lambda p, tokens: {name: judge.scorer.encode_text(p[name], tokens) for name, judge in judges.items()},
            judges_params,
            seen.scorer_tokens,
        )
        measure = jit_on(mesh, make_measure_pairs(predict_clean, judges), out_shardings=replicated(mesh))
        scalar = everywhere(jax.ShapeDtypeStruct((), jnp.int32))
        batch = (seen.images, seen.labels, seen.weights, _prompt_shards(mesh, prompts), split(texts))
        return measure, ({**pipeline.params, "judges": judges_params}, *batch, scalar, seen.positions, key)

    return Run(resident, {"update": update, "validation": validation})


# ------------------------------------------------------------------------------------------------------------ pieces
class BlankTokenizer:
    """Stands for a tokenizer where only shapes count."""

    def __init__(self, length: int) -> None:
        self.model_max_length = length

    def __call__(self, texts: list[str], **_: Any) -> dict[str, np.ndarray]:
        return {"input_ids": np.zeros((len(texts), self.model_max_length), np.int32)}


def with_tokenizers(pipeline: Pipeline) -> Pipeline:
    """The pipeline with a ``BlankTokenizer`` for each text encoder, of the length that the encoder takes."""

    def blank(encoder: Any) -> BlankTokenizer:
        return BlankTokenizer(encoder.config.get("max_position_embeddings", 77))

    second = None if pipeline.text_encoder_2 is None else blank(pipeline.text_encoder_2)
    return dataclasses.replace(pipeline, tokenizer=blank(pipeline.text_encoder), tokenizer_2=second)


def _scorer(path: str, fn: str, dtype: Any, place: Any) -> tuple[Scorer, Any]:
    if fn:
        return make_function_scorer(load_function(fn)), {}
    clip, params = clip_shapes(path, dtype, place, step_aware=True, what="scorer")
    return make_clip_scorer(clip), params


def _sharded(tree: Any, shardings: Callable[[Any], Any]) -> Any:
    """The shapes of ``tree`` with the shardings that the function gives for it."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings(tree)
    )


def _on_device(tree: Any) -> Any:
    """The shapes of ``tree`` in the memory of devices; those that are there already are the same objects."""

    def one(leaf: Any) -> Any:
        there = leaf.sharding.with_memory_kind("device")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there) if in_host_memory(leaf) else leaf

    return jax.tree.map(one, tree)


def _prompt_shards(mesh: Any, prompts: Any) -> Any:
    """The shapes of a batch of prompts, split over the devices as ``rollout.shard_prompts`` does it."""
    everywhere = jax.tree.map(lambda _: replicated(mesh), prompts)
    return _sharded(prompts, lambda _: everywhere.map_rows(lambda _: batch_sharding(mesh)))
