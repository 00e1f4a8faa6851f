"""The plan compiles what training runs: the same programs, on the same shapes, dtypes and shardings, as often."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import dpo_tiny, spm_tiny, tiny
from spo_jax import methods
from spo_jax.data.builder import write_split
from spo_jax.distributed.mesh import make_mesh, replicated
from spo_jax.planning.shapes import Shapes
from tests.preference_data import record
from tests.small_pipeline import small_pipeline


def spo_config(folder):
    """On eight devices; the last batch of held-out prompts is not full."""
    c = tiny.get_config()
    c.model, c.scorer.fn = str(small_pipeline()), "tests.scorers:brightness"
    c.num_batches, c.prompts_per_batch, c.train.minibatch_size, c.pairs.threshold = 1, 8, 8, 0.0
    c.sampling.num_steps, c.sampling.num_plain_steps, c.sampling.num_candidates = 3, 1, 2
    c.evaluation.num_prompts, c.evaluation.batch_size, c.validation.every = 20, 8, 2
    return c


def write_pairs(folder):
    write_split(folder / "pairs", "train", [record(i) for i in range(16)])
    write_split(folder / "pairs", "validation", [record(i) for i in range(20, 30)])


def dpo_config(folder):
    """Two minibatches a step."""
    write_pairs(folder)
    c = dpo_tiny.get_config()
    c.model = str(small_pipeline())
    c.data.train, c.data.validation = (f"{folder / 'pairs'}@{split}" for split in ("train", "validation"))
    c.num_steps, c.train.batch_size, c.train.accumulation_steps, c.train.warmup_steps = 2, 8, 2, 0
    c.validation.num_pairs, c.validation.batch_size, c.validation.timesteps = 8, 8, (0, 701)
    c.log_every = c.checkpoint.every = c.validation.every = 1
    c.sampling.num_steps, c.evaluation.num_prompts, c.evaluation.batch_size = 2, 20, 8
    return c


def spm_config(folder):
    write_pairs(folder)
    c = spm_tiny.get_config()
    c.model, c.labels.judge, c.validation.plain = str(small_pipeline()), "emoji:model/clip", "emoji:model/clip"
    c.data.train, c.data.validation = (f"{folder / 'pairs'}@{split}" for split in ("train", "validation"))
    c.num_steps, c.train.batch_size, c.train.warmup_steps = 1, 8, 0
    c.validation.num_pairs, c.validation.batch_size, c.validation.timesteps = 8, 8, (0, 701)
    c.log_every = c.checkpoint.every = c.validation.every = 1
    return c


def described(tree, mesh):
    """Shape, dtype and sharding of each leaf; what comes from the host lies on all devices."""

    def one(x):
        sharding = replicated(mesh) if isinstance(x, np.ndarray | np.generic) else x.sharding
        if len(sharding.device_set) == 1:  # as of jnp.int32(3)
            sharding = replicated(mesh)
        return x.shape, x.dtype, sharding

    return jax.tree.map(one, tree)


def same(a, b):
    (shape, dtype, sharding), (other_shape, other_dtype, other) = a, b
    return (shape, dtype) == (other_shape, other_dtype) and sharding.is_equivalent_to(other, len(shape))


@pytest.mark.parametrize(("method", "make"), [("spo", spo_config), ("dpo", dpo_config), ("spm", spm_config)])
def test_training_calls_the_programs_that_are_planned_with_what_is_planned(method, make, tmp_path, monkeypatch):
    config, mesh, calls = make(tmp_path), make_mesh(-1, 1), {}
    recipe = methods.module_of(method, "recipe")
    assemble = recipe.assemble

    def recorded(*args):
        made = assemble(*args)

        def record_calls(program):
            def function(*arguments):
                calls.setdefault(program.name, []).append(described(arguments, mesh))
                return program.function(*arguments)

            return dataclasses.replace(program, function=function)

        made.__dict__["programs"] = {name: record_calls(program) for name, program in made.programs.items()}
        return made

    with config.unlocked():
        config.mesh.data, config.mesh.fsdp = -1, 1
    monkeypatch.setattr(recipe, "assemble", recorded)
    methods.train(config, tmp_path / "run")
    plan = methods.module_of(method, "assemble").assemble(config, mesh, Shapes)
    assert set(calls) == set(plan.programs), "all that is planned is run, and all that is run is planned"
    counts = {name: len(arguments) for name, arguments in calls.items()}
    assert counts == {name: plan.executions[name] for name in plan.programs}, "as often as the plan says"
    leaf = {"is_leaf": lambda x: isinstance(x, tuple) and len(x) == 3 and isinstance(x[2], jax.sharding.Sharding)}
    for name, program in plan.programs.items():
        planned = jax.tree.leaves(described(program.arguments, mesh), **leaf)
        for call in calls[name]:
            given = jax.tree.leaves(call, **leaf)
            assert len(planned) == len(given), name
            different = [(a, b) for a, b in zip(planned, given, strict=True) if not same(a, b)]
            assert not different, f"{name}: {different[:3]}"
