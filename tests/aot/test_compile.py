"""Programs of real size compiled for hardware that is not here: a quarter of an hour on an idle machine.

pip install -r requirements-plan.txt
bash launch/test.sh -m slow -n 0 -s tests/aot
"""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from configs import sd15, tiny
from spo_jax.planning.compile import compile_program
from spo_jax.planning.estimate import abstract_run, estimate_program, resident_bytes
from spo_jax.planning.targets import parse_target

pytestmark = pytest.mark.slow

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason="jax[cuda12] is not installed"
)


def small(**overrides):
    """SD1.5 with as little work as shows the memory of a step: one prompt and one pair."""
    config = sd15.get_config()
    config.prompts_per_batch = config.train.minibatch_size = 1
    config.sampling.num_steps, config.sampling.num_plain_steps = 3, 1
    config.update_from_flattened_dict(overrides)
    return config


@pytest.mark.parametrize(
    "target, program, overrides",
    [
        pytest.param("v5e:1x1", "evaluation", {"evaluation.batch_size": 4}, marks=needs_libtpu),
        pytest.param("v5e:1x1", "update", {"remat": False}, marks=needs_libtpu),
        pytest.param("h100", "evaluation", {"evaluation.batch_size": 4}, marks=needs_cuda),
    ],
)
def test_estimated_peak_memory_is_within_20_percent(target, program, overrides):
    config, target = small(**overrides), parse_target(target)
    answer = compile_program(config, target.name, program)
    assert answer.status == "compiled", answer.message
    _, extra, own = estimate_program(config, target, program)
    stays = sum(resident_bytes(abstract_run(config, target)).values())
    exact = stays + answer.own
    print(f"{target.name} {program}: {exact / 2**30:.2f} GiB, estimated {(stays + extra + own) / 2**30:.2f}")
    assert stays + extra + own == pytest.approx(exact, rel=0.2)


@needs_libtpu
def test_what_does_not_fit_is_said_by_the_compiler():
    answer = compile_program(small(prompts_per_batch=40, **{"scorer.chunk": 0}), "v5e:1x1", "pool")
    assert answer.status == "too large"
    assert answer.own > parse_target("v5e:1x1").limit


@needs_libtpu
def test_with_fsdp_weights_and_their_gradients_travel_and_no_activations():
    config, target = tiny.get_config(), parse_target("v5e:2x4")
    config.update_from_flattened_dict({"lora.rank": 0, "mesh.data": 1, "mesh.fsdp": 8, "dtype": "bfloat16"})
    answer = compile_program(config, target.name, "update")
    assert answer.status == "compiled", answer.message
    traffic = answer.traffic
    trained = jax.tree.leaves(abstract_run(config, target).resident["trained"])
    size = sum(leaf.size for leaf in trained) * jnp.dtype(config.dtype).itemsize
    print(f"{target.name} update: {traffic.bytes} bytes, {size} of weights")
    assert traffic.bytes["all-gather"] <= 2 * size, "of the network that learns and of the base model, once"
    assert traffic.bytes["reduce-scatter"] > 0
    assert "all-to-all" not in traffic.bytes
