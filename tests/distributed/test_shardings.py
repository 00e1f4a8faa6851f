"""Where the weights of the published models lie on eight devices, and weights without a rule."""

import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from configs import sd15, sdxl, spm_sd15
from spo_jax.distributed.mesh import batch_sharding, jit_on, make_mesh
from spo_jax.distributed.sharding import gathered, partition_spec, path_names, weight_sharding, weight_shardings
from spo_jax.errors import UserError
from spo_jax.kernels import attention, xla
from spo_jax.models.unet import UNet2DConditionModel
from spo_jax.planning.collectives import collectives
from spo_jax.planning.shapes import make_run
from spo_jax.runs.optimizer import make_optimizer

CONFIGS = {"sd15": sd15, "sdxl": sdxl, "spm": spm_sd15}
WHOLE, INPUTS, LAST = P(), P("fsdp", None), P(None, "fsdp")
CONV, PATCHES = P(None, None, "fsdp", None), P(None, None, None, "fsdp")

BLOCK = "unet/down_blocks_1/attentions_0/transformer_blocks_0"
ADAPTER = "lora/mid_block/attentions_0/transformer_blocks_0/attn1/to_q"
UNET = {
    "unet/conv_in/kernel": WHOLE,
    "unet/time_embedding/linear_1/kernel": INPUTS,
    "unet/down_blocks_0/resnets_0/conv1/kernel": CONV,
    "unet/down_blocks_0/resnets_0/norm1/scale": WHOLE,
    f"{BLOCK}/attn2/to_k/kernel": INPUTS,
    f"{BLOCK}/ff/net_2/kernel": INPUTS,
    f"{BLOCK}/ff/net_2/bias": WHOLE,
    "vae/decoder/up_blocks_0/resnets_0/conv1/kernel": CONV,
    "text_encoder/text_model/embeddings/token_embedding/embedding": LAST,
}
LIES = {
    "sd15": UNET
    | {
        "unet/down_blocks_1/attentions_0/proj_in/kernel": CONV,
        "scorer/vision_model/embeddings/patch_embedding/kernel": PATCHES,
        "scorer/vision_model/encoder/layers_0/adaLN_modulation_1/kernel": INPUTS,
        f"trained/{ADAPTER}/A": INPUTS,
        f"trained/{ADAPTER}/B": LAST,
    },
    "sdxl": UNET
    | {
        "unet/down_blocks_1/attentions_0/proj_in/kernel": INPUTS,
        "unet/add_embedding/linear_1/kernel": INPUTS,
        "text_encoder_2/text_projection/kernel": INPUTS,
        f"trained/{ADAPTER}/B": LAST,
    },
    "spm": UNET
    | {
        "trained/logit_scale": WHOLE,
        "trained/t_embedder/mlp_0/kernel": INPUTS,
        "trained/vision_model/embeddings/position_embedding/embedding": LAST,
        "trained/vision_model/encoder/layers_0/self_attn/out_proj/kernel": INPUTS,
        "plain/visual_projection/kernel": INPUTS,
    },
}


@functools.cache
def resident(name):
    """Every array that a run keeps, by its path: frozen weights, adapters or trained weights, optimizer state."""
    config = CONFIGS[name].get_config()
    config.mesh.data, config.mesh.fsdp = 1, 8
    trees = make_run(config, make_mesh(1, 8)).resident
    leaves = jax.tree_util.tree_flatten_with_path({k: v for k, v in trees.items() if k != "texts"})[0]
    return {"/".join(path_names(path)): leaf for path, leaf in leaves}


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_of_each_kind_lie_where_they_should(name):
    assert {path: resident(name)[path].sharding.spec for path in LIES[name]} == LIES[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_what_every_device_holds_whole_is_small(name):
    whole = [leaf.size for leaf in resident(name).values() if leaf.sharding.spec == WHOLE]
    assert max(whole) < 50_000 and sum(whole) < 1e-3 * sum(leaf.size for leaf in resident(name).values())


@pytest.mark.parametrize("name", CONFIGS)
def test_kernels_are_split_along_their_inputs_and_everything_else_along_its_last_axis(name):
    """Split output features would make the compiler send activations about instead of weights."""
    for path, leaf in resident(name).items():
        if leaf.sharding.spec != WHOLE:
            inputs = path.endswith(("/kernel", "/A")) and "patch_embedding" not in path  # of three colours
            assert leaf.sharding.spec.index("fsdp") - leaf.ndim == (-2 if inputs else -1), path


@pytest.mark.parametrize("name", CONFIGS)
def test_optimizer_state_lies_with_its_weight(name):
    weights = {path.removeprefix("trained/"): x for path, x in resident(name).items() if path.startswith("trained/")}
    state = [(path, leaf) for path, leaf in resident(name).items() if path.startswith("optimizer/") and leaf.ndim > 1]
    assert len(state) >= 2 * len([leaf for leaf in weights.values() if leaf.ndim > 1])
    for path, leaf in state:
        (weight,) = (weights[path.split("/", n)[-1]] for n in range(9) if path.split("/", n)[-1] in weights)
        assert leaf.sharding == weight.sharding, path


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
    state = jax.eval_shape(make_optimizer(config.train).transformation.init, {"lora": adapters})
    shardings = weight_shardings(make_mesh(1, 8), ({"lora": adapters}, state))
    split = [sharding.spec != P() for sharding in jax.tree.leaves(shardings)]
    assert sum(split) > 0.95 * len(split)


def test_a_weight_that_is_split_is_gathered_where_it_is_used():
    """A CPU's compiler would gather by itself, a TPU's not: the program has to ask for it."""
    for mesh, asked in ((make_mesh(1, 8), True), (make_mesh(8, 1), False)):
        weight = jax.device_put(jnp.zeros((16, 4)), weight_sharding(mesh, ("unet", "to_q", "kernel"), (16, 4)))
        text = jit_on(mesh, lambda weight: gathered(weight) + 1).lower(weight).as_text()
        assert ("sharding_constraint" in text) == asked


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
        patch.setattr(attention, "SMALL_LOGITS", 1024)
        patch.setattr(xla, "SAMPLE_LOGITS", 1024)
        traffic = collectives(program.lower(weights, *batch).compile().as_text())
    travelling = [4 * x.size for x in jax.tree.leaves(weights) if not x.sharding.is_fully_replicated]
    assert len(travelling) > 40
    assert traffic.bytes == {"all-gather": sum(travelling)}


def test_optimizer_state_lies_with_its_parameter():
    params = {"mid": {"to_q": {"kernel": jnp.zeros((256, 256)), "bias": jnp.zeros(256)}}}
    config = sd15.get_config().train
    for name, accumulation in (("adamw", 1), ("adamw", 4), ("adafactor", 1)):
        config.optimizer, config.accumulation_steps = name, accumulation
        state = make_optimizer(config).transformation.init(params)
        leaves = jax.tree_util.tree_flatten_with_path(weight_shardings(make_mesh(1, 8), state))[0]
        split = {"/".join(path_names(path)) for path, sharding in leaves if sharding.spec == P("fsdp", None)}
        moments = {"adamw": {"mu", "nu"}, "adafactor": set()}[name]
        assert {key.split("/")[-4] for key in split} == moments | ({"acc_grads"} if accumulation > 1 else set())
