"""LoRA files of others: the layouts that are read, the kohya layout as written, merging, and starting from a file."""

import re

import chex
import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers import UNet2DConditionModel as TorchUNet
from diffusers.utils import convert_state_dict_to_kohya
from hypothesis import given, settings
from hypothesis import strategies as st

from spo_jax.errors import UserError
from spo_jax.formats import names
from spo_jax.formats.lora import FILE_NAME, read_lora
from spo_jax.formats.lora_write import write_kohya, write_lora
from spo_jax.formats.pipeline import read_unet
from spo_jax.formats.safetensors_io import read_tensors, write_tensors
from spo_jax.models.layers import Dense
from spo_jax.models.lora import init_lora, merge_lora
from tests.golden_data import FOLDER

LAYOUTS = ["peft", "before peft", "processor", "processor without prefix", "kohya", "kohya original"]


@pytest.fixture(scope="module")
def params():
    return read_unet(FOLDER / "unet")[1]


@pytest.fixture(scope="module")
def adapters(params):
    return random_adapters(params, rank=3)


def random_adapters(params, rank, deviation=1.0):
    generator = np.random.default_rng(1)
    fresh = init_lora(jax.random.key(0), params, rank)
    return jax.tree.map(lambda x: jnp.asarray(deviation * generator.standard_normal(x.shape), jnp.float32), fresh)


def flat(tree):
    return flax.traverse_util.flatten_dict(tree)


def respelled(key, layout, layers_per_block=2):
    """A key ``unet.<module>.lora_A.weight`` in another layout, spelled with nothing of the reader's."""
    down = "lora_A" in key
    module = key.removeprefix("unet.").split(".lora_")[0]
    matrix = "down" if down else "up"
    if layout == "before peft":
        return f"unet.{module}.lora.{matrix}.weight"
    if layout.startswith("processor"):
        block, projection = re.fullmatch(r"(.+)\.(to_[qkv]|to_out)(?:\.0)?", module).groups()
        return f"{'' if 'without' in layout else 'unet.'}{block}.processor.{projection}_lora.{matrix}.weight"
    if layout == "kohya original":
        parts = module.split(".")
        if parts[0] == "mid_block":
            parts[:3] = ["middle_block", "1"]
        else:
            number = int(parts[1]) * (layers_per_block + 1) + int(parts[3])
            down_way = parts[0] == "down_blocks"
            parts[:4] = ["input_blocks" if down_way else "output_blocks", str(number + down_way), "1"]
        module = ".".join(parts)
    if layout.startswith("kohya"):
        return f"lora_unet_{module.replace('.', '_')}.lora_{matrix}.weight"
    return key


# ------------------------------------------------------------------------------------------------------------ reading
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_exactly(tmp_path, params, adapters, layout):
    layers = sum(name.startswith("resnets") for name in params["down_blocks_0"])
    tensors = read_tensors(write_lora(tmp_path, {"unet": adapters}))
    renamed = {respelled(key, layout, layers): value for key, value in tensors.items()}
    assert len(renamed) == len(tensors)
    write_tensors(tmp_path / FILE_NAME, renamed)
    chex.assert_trees_all_equal(read_lora(tmp_path, {"unet": params})["unet"], adapters)


@settings(max_examples=10)
@given(alpha=st.floats(0.125, 64, width=32), layout=st.sampled_from(["kohya", "kohya original"]), data=st.data())
def test_alpha_of_a_kohya_layer_is_its_own(tmp_path_factory, params, adapters, alpha, layout, data):
    layers = sum(name.startswith("resnets") for name in params["down_blocks_0"])
    file = write_lora(tmp_path_factory.mktemp("lora"), {"unet": adapters})
    tensors = {respelled(key, layout, layers): value for key, value in read_tensors(file).items()}
    layer = data.draw(st.sampled_from(sorted(k.split(".")[0] for k in tensors)))
    tensors[f"{layer}.alpha"] = np.array(alpha, np.float32)
    write_tensors(file, tensors)
    changed = {
        p
        for p, x in flat(read_lora(file, {"unet": params})["unet"]).items()
        if not np.array_equal(x, flat(adapters)[p])
    }
    if alpha == 3:
        assert not changed
    else:
        ((*path, name),) = changed
        read = flat(read_lora(file, {"unet": params})["unet"])[(*path, name)]
        assert name == "B" and layer.endswith("_".join(path[-3:]).split("transformer_blocks_")[-1])
        np.testing.assert_allclose(read, flat(adapters)[(*path, name)] * alpha / 3, rtol=1e-6)


@pytest.mark.parametrize("damage", ["down", "up", "alpha"])
def test_half_a_kohya_layer_is_refused(tmp_path, params, adapters, damage):
    file = tmp_path / "k.safetensors"
    write_kohya(file, {"unet": adapters}, params)
    tensors = read_tensors(file)
    layer = next(iter(tensors)).split(".")[0]
    if damage == "alpha":
        tensors[f"{layer}.alpha"] = np.ones(2, np.float32)
    else:
        del tensors[f"{layer}.lora_{damage}.weight"]
    write_tensors(file, tensors)
    with pytest.raises(UserError, match=f"{layer}.*{damage}"):
        read_lora(file, {"unet": params})["unet"]


# ------------------------------------------------------------------------------------------------------------ writing
def test_kohya_keys_and_values_are_those_of_diffusers_own_writer(tmp_path, params, adapters):
    file = tmp_path / "k.safetensors"
    write_kohya(file, {"unet": adapters}, params)
    peft = {k: torch.tensor(v) for k, v in read_tensors(write_lora(tmp_path, {"unet": adapters})).items()}
    expected = convert_state_dict_to_kohya(peft)
    ours = read_tensors(file)
    assert ours.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(ours[key], value.numpy(), err_msg=key)
    chex.assert_trees_all_equal(read_lora(file, {"unet": params})["unet"], adapters)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_files_are_written_in_the_dtype_asked_for(tmp_path, params, adapters, dtype):
    rounded = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), adapters)
    write_kohya(tmp_path / "k.safetensors", {"unet": adapters}, params, dtype=dtype)
    for file in (write_lora(tmp_path, {"unet": adapters}, dtype=dtype), tmp_path / "k.safetensors"):
        assert {x.dtype for x in read_tensors(file).values()} == {np.dtype(dtype)}
        chex.assert_trees_all_equal(read_lora(file, {"unet": params})["unet"], rounded)


def test_layers_of_unequal_rank_keep_their_product_in_both_layouts(tmp_path, params, adapters):
    """The layout of diffusers has one alpha for all, and without metadata its reader takes a rank for it."""
    mixed = flat(adapters)
    path = next(p[:-1] for p in mixed)
    mixed[(*path, "A")], mixed[(*path, "B")] = mixed[(*path, "A")][:, :1], mixed[(*path, "B")][:1]
    mixed = flax.traverse_util.unflatten_dict(mixed)
    write_kohya(tmp_path / "k.safetensors", {"unet": mixed}, params)
    chex.assert_trees_all_equal(read_lora(tmp_path / "k.safetensors", {"unet": params})["unet"], mixed)
    read = flat(read_lora(write_lora(tmp_path, {"unet": mixed}), {"unet": params})["unet"])
    assert {x.shape[1] for p, x in read.items() if p[-1] == "A"} == {3}
    for p in {p[:-1] for p in read}:
        np.testing.assert_array_equal(
            read[(*p, "A")] @ read[(*p, "B")], flat(mixed)[(*p, "A")] @ flat(mixed)[(*p, "B")]
        )


@pytest.mark.parametrize(
    "width, kind, version, v2, architecture",
    [
        (768, "epsilon", "sd_v1", "False", "stable-diffusion-v1/lora"),
        (1024, "epsilon", "sd_v2", "True", "stable-diffusion-v2-512/lora"),
        (1024, "v_prediction", "sd_v2", "True", "stable-diffusion-v2-768-v/lora"),
    ],
)
def test_header_tells_programs_what_the_file_is_for(tmp_path, width, kind, version, v2, architecture):
    shapes = {"down_blocks_0": {"attentions_0": {"attn2": {"to_k": {"kernel": jnp.zeros((width, 8))}}}}}
    lora = {"unet": init_lora(jax.random.key(0), shapes, 2)}
    file = write_kohya(tmp_path / "my style.safetensors", lora, shapes, prediction_type=kind, image_size=(512, 768))
    with safetensors.safe_open(file, "numpy") as opened:
        assert opened.metadata() == {
            "format": "pt",
            "ss_base_model_version": version,
            "ss_v2": v2,
            "ss_network_module": "networks.lora",
            "ss_network_dim": "2",
            "ss_network_alpha": "2",
            "ss_output_name": "my style",
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": architecture,
            "modelspec.implementation": "diffusers",
            "modelspec.title": "my style",
            "modelspec.prediction_type": "v" if kind == "v_prediction" else "epsilon",
            "modelspec.resolution": "768x512",
        }


# --------------------------------------------------------------------------------------------------------------- SDXL
@pytest.fixture(scope="module", params=[1, 2])
def sdxl(request):
    """A tiny UNet with SDXL's parts, by diffusers, and its parameters under our names."""
    torch.manual_seed(0)
    unet = TorchUNet(
        block_out_channels=(8, 16, 24),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=request.param,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 2, 3),
        cross_attention_dim=12,
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 10,
    ).eval()
    tree = {}
    for key, value in unet.state_dict().items():
        *modules, leaf = re.sub(r"\.(\d+)", r"_\1", key).split(".")
        leaf = "kernel" if leaf == "weight" else leaf
        tree[(*modules, leaf)] = jnp.asarray(names.from_torch((*modules, leaf), value.numpy()))
    return unet, flax.traverse_util.unflatten_dict(tree)


def test_sdxl_as_kohya_is_what_diffusers_reads_and_peft_computes(tmp_path, sdxl):
    unet, params = sdxl
    lora = random_adapters(params, rank=2, deviation=0.3)
    file = tmp_path / "k.safetensors"
    write_kohya(file, {"unet": lora}, params)
    tensors = read_tensors(file)
    blocks = {re.match(r"lora_unet_(\w+?)_transformer_blocks", key)[1] for key in tensors}
    if unet.config.layers_per_block == 2:  # as in SDXL itself, whose names these are
        numbers = [f"input_blocks_{i}_1" for i in (4, 5, 7, 8)] + [f"output_blocks_{i}_1" for i in range(6)]
        assert blocks == {"middle_block_1", *numbers}
    with safetensors.safe_open(file, "numpy") as opened:
        header = opened.metadata()
    assert header["ss_base_model_version"] == "sdxl_base_v1-0"
    assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert "modelspec.resolution" not in header, "nobody said it"
    chex.assert_trees_all_equal(read_lora(file, {"unet": params})["unet"], lora)

    # Alphas that are not the rank: our reader and peft must scale alike.
    write_tensors(file, {k: np.array(3.0, np.float32) if k.endswith(".alpha") else v for k, v in tensors.items()})
    lora = read_lora(file, {"unet": params})["unet"]
    torch.manual_seed(1)
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 12))
    added = {"text_embeds": torch.randn(2, 10), "time_ids": torch.rand(2, 6) * 100}
    state, alphas = StableDiffusionXLPipeline.lora_state_dict(str(file), unet_config=unet.config)
    with torch.no_grad():
        plain = unet(*inputs, added_cond_kwargs=added).sample
        unet.load_lora_adapter(state, prefix="unet", network_alphas=alphas, adapter_name="kohya")
        adapted = unet(*inputs, added_cond_kwargs=added).sample
        unet.delete_adapters("kohya")
        merged = flat(merge_lora(params, lora))
        before = {k: v.clone() for k, v in unet.state_dict().items()}
        after = {
            names.torch_key(p): torch.from_numpy(np.array(names.to_torch(p, np.array(x)))) for p, x in merged.items()
        }
        unet.load_state_dict({k: after[k.replace(".base_layer", "")] for k in before})
        ours = unet(*inputs, added_cond_kwargs=added).sample
        unet.load_state_dict(before)
    assert (adapted - plain).abs().max() > 0.1
    np.testing.assert_allclose(ours.numpy(), adapted.numpy(), rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------ merging, starting
@given(rank=st.integers(1, 4), seed=st.integers(0, 1000), bias=st.booleans())
def test_a_merged_layer_computes_what_the_adapted_one_does(rank, seed, bias):
    generator = np.random.default_rng(seed)
    layer, x = Dense(5, use_bias=bias), generator.standard_normal((3, 4)).astype(np.float32)
    params = {"to_q": layer.init(jax.random.key(seed), x)["params"], "norm": {"scale": np.ones(3)}}
    lora = {"to_q": {"A": generator.standard_normal((4, rank)), "B": generator.standard_normal((rank, 5))}}
    lora = jax.tree.map(np.float32, lora)
    merged = merge_lora(params, lora)
    adapted = layer.apply({"params": params["to_q"], "lora": lora["to_q"]}, x)
    np.testing.assert_allclose(layer.apply({"params": merged["to_q"]}, x), adapted, rtol=0, atol=1e-5)
    assert merged["norm"]["scale"] is params["norm"]["scale"] and set(merged["to_q"]) == set(params["to_q"])
