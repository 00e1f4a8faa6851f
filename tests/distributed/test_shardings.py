"""Where every weight of the published models lies on eight devices, against recorded lists; and weights without a rule.

After a change that is meant: ``python -m tests.distributed.test_shardings`` writes the lists anew, see ``git diff``.
"""

import difflib
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from configs import sd15, sdxl, spm_sd15
from spo_jax.distributed.mesh import batch_sharding, jit_on, make_mesh
from spo_jax.distributed.sharding import partition_spec, path_names, weight_sharding, weight_shardings
from spo_jax.errors import UserError
from spo_jax.models import attention
from spo_jax.models.unet import UNet2DConditionModel
from spo_jax.planning.collectives import collectives
from spo_jax.planning.programs import make_run
from spo_jax.runs.optimizer import make_optimizer

FOLDER = Path(__file__).parents[1] / "golden" / "shardings"
CONFIGS = {"sd15": sd15, "sdxl": sdxl, "spm": spm_sd15}


def listing(name):
    """A line for each array that a run keeps: frozen weights, adapters or trained weights, optimizer state."""
    config = CONFIGS[name].get_config()
    config.mesh.data, config.mesh.fsdp = 1, 8
    resident = make_run(config, make_mesh(1, 8)).resident
    leaves = jax.tree_util.tree_flatten_with_path({k: v for k, v in resident.items() if k != "texts"})[0]
    lines = []
    for path, leaf in leaves:
        spec = ", ".join(str(axis) for axis in leaf.sharding.spec)
        lines.append(f"{'/'.join(path_names(path))} {list(leaf.shape)} ({spec})")
    return lines


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_lies_where_it_is_recorded(name):
    recorded = (FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    difference = list(difflib.unified_diff(recorded, listing(name), f"recorded/{name}", "now", n=0, lineterm=""))
    assert not difference, "\n".join(difference[:50])


def test_a_weight_without_a_rule_is_refused_by_name():
    with pytest.raises(UserError, match=r"No sharding rule knows the weight unet/new_layer/table of shape \(3, 4\)"):
        partition_spec("unet/new_layer/table", (3, 4))
    with pytest.raises(UserError, match="new_layer"):
        weight_shardings(make_mesh(1, 8), {"new_layer": {"kernel": jnp.zeros((8, 8))}})


def test_a_split_that_does_not_come_out_even_is_refused_with_the_numbers():
    with pytest.raises(UserError, match=r"fsdp = 8 cannot split .* \(20, 64\): 20 is no multiple of 8"):
        weight_sharding(make_mesh(1, 8), ("unet", "mid", "to_q", "kernel"), (20, 64))
    assert weight_sharding(make_mesh(8, 1), ("unet", "mid", "to_q", "kernel"), (20, 64)).shard_shape((20, 64)) == (
        20,
        64,
    )


@pytest.mark.parametrize("config", [sd15, sdxl], ids=["sd15", "sdxl"])
def test_adapters_of_every_layer_have_a_place_on_eight_devices(config):
    """Also of the convolutions from and to a few channels, which no eight devices can split."""
    config = config.get_config()
    unet = make_run(config, make_mesh(1, 8)).resident["unet"]
    flat = flax.traverse_util.flatten_dict(unet)
    adapters = {}
    for path, kernel in flat.items():
        if path[-1] == "kernel":
            *inputs, fan_out = kernel.shape
            adapters[(*path[:-1], "A")] = jax.ShapeDtypeStruct((*inputs, 3), jnp.float32)
            adapters[(*path[:-1], "B")] = jax.ShapeDtypeStruct((3, fan_out), jnp.float32)
    adapters = flax.traverse_util.unflatten_dict(adapters)
    state = jax.eval_shape(make_optimizer(config.train).init, {"lora": adapters})
    shardings = weight_shardings(make_mesh(1, 8), ({"lora": adapters}, state))
    split = [sharding.spec != P() for sharding in jax.tree.leaves(shardings)]
    assert sum(split) > 0.95 * len(split)


def count_constraints(jaxpr):
    """Also those of what it calls, once for each call."""
    called = (value for eqn in jaxpr.eqns for value in eqn.params.values() if hasattr(value, "jaxpr"))
    return sum(eqn.primitive.name == "sharding_constraint" for eqn in jaxpr.eqns) + sum(map(count_constraints, called))


def test_split_weights_travel_once_for_each_use_and_nothing_else_does():
    """A UNet, its weights and its batch split over eight devices, with attention in loops."""
    mesh, split = make_mesh(1, 8), batch_sharding(make_mesh(1, 8))
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=(1, 1), num_attention_heads=(2, 2),
        transformer_layers_per_block=(1, 1), cross_attention_dim=64, norm_num_groups=8,
    )  # fmt: skip
    inputs = ((8, 32, 32, 4), (8,), (8, 77, 64))
    params = jax.eval_shape(unet.init, jax.random.key(0), *(jnp.zeros(shape) for shape in inputs))["params"]
    shardings = weight_shardings(mesh, {"unet": params})["unet"]
    weights = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), params, shardings
    )
    batch = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=split) for shape in inputs]
    program = jit_on(mesh, lambda params, *batch: unet.apply({"params": params}, *batch), out_shardings=split)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "MAX_LOGITS", 1024)
        traced = program.trace(weights, *batch)
    traffic = collectives(traced.lower().compile().as_text())
    travelling = [4 * x.size for x in jax.tree.leaves(weights) if not x.sharding.is_fully_replicated]
    assert len(travelling) > 40
    assert traffic.bytes == {"all-gather": sum(travelling)}
    # A CPU's compiler would gather by itself, a TPU's not: the program has to ask for it.
    kernels = [path for path, _ in jax.tree_util.tree_leaves_with_path(weights) if path_names(path)[-1] == "kernel"]
    assert count_constraints(traced.jaxpr) == len(kernels)


def test_optimizer_state_lies_with_its_parameter():
    params = {"mid": {"to_q": {"kernel": jnp.zeros((256, 256)), "bias": jnp.zeros(256)}}}
    config = sd15.get_config().train
    for name, accumulation in (("adamw", 1), ("adamw", 4), ("adafactor", 1)):
        config.optimizer, config.accumulation_steps = name, accumulation
        state = make_optimizer(config).init(params)
        leaves = jax.tree_util.tree_flatten_with_path(weight_shardings(make_mesh(1, 8), state))[0]
        split = {"/".join(path_names(path)) for path, sharding in leaves if sharding.spec == P("fsdp", None)}
        moments = {"adamw": {"mu", "nu"}, "adafactor": set()}[name]
        assert {key.split("/")[-4] for key in split} == moments | ({"acc_grads"} if accumulation > 1 else set())


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for _name in CONFIGS:
        (FOLDER / f"{_name}.txt").write_text("\n".join(listing(_name)) + "\n", encoding="utf-8")
