"""LoRA files that people have: each layout, layer and part is read as the same adapters, or refused in one sentence."""

import json
import re

import chex
import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from transformers import CLIPTextModel

from spo_jax import models
from spo_jax.errors import UserError
from spo_jax.formats.hub import local
from spo_jax.formats.lora import read_lora
from spo_jax.formats.lora_write import write_kohya, write_lora
from spo_jax.formats.networks import network_shapes
from spo_jax.formats.safetensors_io import write_tensors
from spo_jax.models.lora import TARGETS
from tests import lora_files, pictures
from tests.parity.test_live_pytorch import randomize

ALL_LAYOUTS = (*lora_files.LAYOUTS, *lora_files.ATTENTION_LAYOUTS, *lora_files.UNET_LAYOUTS)


def of_layout(layout):
    """Which layers the layout has names for."""

    def only(part, path):
        attention = path[-1] in TARGETS or "self_attn" in path
        unet = part == "unet"
        return (attention or layout not in lora_files.ATTENTION_LAYOUTS) and (
            unet or layout not in lora_files.UNET_LAYOUTS
        )

    return only


def flat(tree):
    return flax.traverse_util.flatten_dict(tree)


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def params(request):
    """Parameters by part of the emoji pipeline, or of a tiny one with the parts of SDXL."""
    if request.param == "sd":
        return pictures.emoji_pipeline().params
    unet = models.UNet2DConditionModel.from_config(
        {
            **{"block_out_channels": [8, 16, 24], "layers_per_block": 2, "norm_num_groups": 4, "attention_head_dim": 2},
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            **{"transformer_layers_per_block": [1, 1, 2], "cross_attention_dim": 28, "use_linear_projection": True},
            **{"addition_embed_type": "text_time", "addition_time_embed_dim": 4},
            "projection_class_embeddings_input_dim": 6 * 4 + 10,
        }
    )
    text = {"vocab_size": 30, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 8}
    text |= {"hidden_act": "gelu", "eos_token_id": 2}
    first = models.CLIPTextModel.from_config(text | {"hidden_size": 12, "intermediate_size": 20})
    second = models.CLIPTextModelWithProjection.from_config(
        text | {"hidden_size": 16, "intermediate_size": 24, "projection_dim": 10}
    )
    shapes = {
        "unet": network_shapes(unet),
        "text_encoder": network_shapes(first),
        "text_encoder_2": network_shapes(second),
    }
    return jax.tree.map(lambda x: np.resize(np.float32([0.1, -0.2, 0.3]), x.shape), shapes)


# ------------------------------------------------------------------------------------------------------------ reading
@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_every_layout_is_read_as_the_same_adapters(tmp_path, params, layout):
    lora = lora_files.random_adapters(params, only=of_layout(layout))
    tensors = lora_files.spelled(layout, lora, params)
    assert len(tensors) in (len(flat(lora)), len(flat(lora)) * 3 // 2)
    write_tensors(tmp_path / "lora.safetensors", tensors)
    chex.assert_trees_all_equal(read_lora(tmp_path, params), jax.tree.map(jnp.asarray, lora))


@pytest.mark.parametrize("name", ["pytorch_lora_weights.bin", "any.pt", "any.ckpt", "named_wrongly.safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_files_of_pytorch_are_read(tmp_path, name, dtype):
    params = pictures.emoji_pipeline().params
    lora = lora_files.random_adapters(params, only=lambda part, path: "attn1" in path)
    tensors = lora_files.spelled("kohya", lora, params)
    torch.save({k: torch.tensor(v).to(dtype) for k, v in tensors.items()}, tmp_path / name)
    numpy_dtype = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16}[dtype]
    rounded = jax.tree.map(lambda x: jnp.asarray(x.astype(numpy_dtype).astype(np.float32)), lora)
    for path in (tmp_path, tmp_path / name):
        chex.assert_trees_all_equal(read_lora(path, params), rounded)


def one_layer(emoji, **changes):
    """Tensors of a file that adapts one layer, in kohya's names, and its name there."""
    lora = lora_files.random_adapters(emoji, only=lambda part, path: path[-2:] == ("attn2", "to_q"))
    lora = {"unet": {"mid_block": lora["unet"]["mid_block"]}}
    tensors = lora_files.spelled("kohya", lora, emoji)
    return {k: v for k, v in tensors.items()} | changes, next(iter(tensors)).split(".")[0]


@pytest.mark.parametrize(
    "suffix, kind",
    [
        ("dora_scale", "DoRA"),
        ("lora_magnitude_vector.weight", "DoRA"),
        ("hada_w1_a", "LoHa"),
        ("lokr_w1", "LoKr"),
        ("lokr_w2_b", "LoKr"),
        ("on_input", "IA3"),
        ("ia3_l", "IA3"),
        ("oft_blocks", "OFT"),
        ("oft_R.default.weight", "OFT"),
        ("boft_R", "OFT"),
        ("diff", "the full difference"),
        ("diff_b", "the full difference"),
        ("w_norm", "norm"),
        ("a1.weight", "GLoRA"),
        ("lora_mid.weight", "lora_mid"),
        ("lora_up.bias", "bias"),
        ("lora_B.default.bias", "bias"),
        ("scalar", "scalar"),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_their_names(tmp_path, suffix, kind):
    emoji = pictures.emoji_pipeline().params
    tensors, layer = one_layer(emoji)
    file = tmp_path / "a.safetensors"
    write_tensors(file, tensors | {f"{layer}.{suffix}": np.ones((3, 4), np.float32)})
    with pytest.raises(UserError, match=kind) as caught:
        read_lora(file, emoji)
    assert f"{layer}.{suffix}" in str(caught.value) and str(file) in str(caught.value)


@pytest.mark.parametrize(
    "key, words",
    [
        ("bundle_emb.word.clip_l", "embedding"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "text_encoder_2 .* does not have"),
        ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight", "text_encoder_2 .* does not have"),
        ("lora_te_text_model_encoder_layers_40_mlp_fc1.lora_down.weight", "fit no layer"),
        ("lora_unet_down_blocks_7_attentions_0_proj_in.lora_up.weight", "fit no layer"),
        ("transformer.single_blocks.0.attn.to_q.lora_A.weight", "fit no layer"),
        ("lora_unet_double_blocks_0_img_attn_qkv.alpha", "fit no layer"),
        ("lora_unet_mid_block_attentions_0_norm.lora_up.weight", "fit no layer"),
        ("epoch", "fit no layer"),
    ],
)
def test_what_has_no_place_is_refused_by_key(tmp_path, key, words):
    emoji = pictures.emoji_pipeline().params
    tensors, _ = one_layer(emoji)
    write_tensors(tmp_path / "a.safetensors", tensors | {key: np.ones((3, 4), np.float32)})
    with pytest.raises(UserError, match=words) as caught:
        read_lora(tmp_path, emoji)
    assert key in str(caught.value) and "a.safetensors" in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("role", ["lora_down.weight", "lora_up.weight", "alpha"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_numbers_that_are_not_finite_are_refused_by_key(tmp_path, value, role, dtype):
    emoji = pictures.emoji_pipeline().params
    tensors, layer = one_layer(emoji)
    tensors = {k: v.astype(dtype) for k, v in tensors.items()}
    tensors[f"{layer}.{role}"].reshape(-1)[-1:] = value
    write_tensors(tmp_path / "a.safetensors", tensors)
    with pytest.raises(UserError, match=re.escape(f"'{layer}.{role}' has numbers that are not finite")):
        read_lora(tmp_path, emoji)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"alpha": 3e38, "lora_up.weight": 1e6}, "make weights that are not finite in float32"),
        ({"lora_down.weight": 1e30, "lora_up.weight": 1e30}, "make weights that are not finite in float32"),
        ({"lora_up.weight": np.int8(3)}, "holds int8 numbers; quantised adapters are not supported"),
    ],
)
def test_numbers_that_make_no_weights_are_refused(tmp_path, changed, words):
    emoji = pictures.emoji_pipeline().params
    tensors, layer = one_layer(emoji)
    for role, value in changed.items():
        dtype = np.int8 if isinstance(value, np.int8) else np.float32
        tensors[f"{layer}.{role}"] = np.full_like(tensors[f"{layer}.{role}"], value, dtype)
    write_tensors(tmp_path / "a.safetensors", tensors)
    with pytest.raises(UserError, match=words):
        read_lora(tmp_path / "a.safetensors", emoji)


def test_the_content_tells_safetensors_whatever_the_name(tmp_path):
    emoji = pictures.emoji_pipeline().params
    write_tensors(tmp_path / "a.bin", one_layer(emoji)[0])
    assert read_lora(tmp_path / "a.bin", emoji)
    with pytest.raises(UserError, match=r"nope does not exist; give a LoRA file, or the --workdir"):
        read_lora(tmp_path / "nope", emoji)


def test_two_adapters_in_one_file_and_an_alpha_alone_are_refused(tmp_path):
    emoji = pictures.emoji_pipeline().params
    tensors, layer = one_layer(emoji)
    peft_key = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q.lora_A.{}.weight"
    down = tensors[f"{layer}.lora_down.weight"]
    write_tensors(tmp_path / "two.safetensors", {peft_key.format("a"): down, peft_key.format("b"): down})
    with pytest.raises(UserError, match=r"has both .* for one layer"):
        read_lora(tmp_path / "two.safetensors", emoji)
    write_tensors(tmp_path / "alpha.safetensors", {f"{layer}.alpha": np.float32(1)[None]})
    with pytest.raises(UserError, match="without its matrices"):
        read_lora(tmp_path / "alpha.safetensors", emoji)


def test_a_file_for_another_family_is_named_as_such(tmp_path):
    emoji = pictures.emoji_pipeline().params
    tensors, layer = one_layer(emoji)
    wide = {f"{layer.replace('to_q', 'to_k')}.lora_down.weight": np.ones((3, 2048), np.float32)}
    write_tensors(tmp_path / "a.safetensors", tensors | wide)
    with pytest.raises(UserError, match=r"another model: .* 2048 wide \(SDXL\), but here they are 128"):
        read_lora(tmp_path, emoji)


def test_a_folder_without_a_lora_file_says_what_it_has(tmp_path):
    with pytest.raises(UserError, match=r"pytorch_lora_weights\.safetensors .*is it the right folder"):
        read_lora(tmp_path, {})
    for name in ("a.safetensors", "b.safetensors"):
        write_tensors(tmp_path / name, {})
    with pytest.raises(UserError, match=r"a\.safetensors, b\.safetensors: name one"):
        read_lora(tmp_path, {})


# --------------------------------------------------------------------------------------------------------------- peft
@pytest.fixture
def torch_unet():
    return UNet2DConditionModel.from_pretrained(local("emoji:model"), subfolder="unet")


TARGET_MODULES = ["to_q", "proj_in", "ff.net.2", "conv1", "time_emb_proj", "downsamplers.0.conv"]


def scaled(model):
    """What peft computes with: the matrices of each layer, and the scale of their product."""
    modules = {name.removeprefix("base_model.model."): part for name, part in model.named_modules()}
    return {name: part for name, part in modules.items() if hasattr(part, "lora_A") and part.lora_A}


def check_against_peft(read, model):
    ours, theirs = lora_files.matrices({"unet": read}), scaled(model)
    assert {module for _, module in ours} == set(theirs) and theirs
    for (_, module), (down, up) in ours.items():
        (name,) = theirs[module].lora_A
        np.testing.assert_array_equal(down, theirs[module].lora_A[name].weight.detach().numpy(), err_msg=module)
        expected = theirs[module].lora_B[name].weight.detach().numpy() * np.float32(theirs[module].scaling[name])
        np.testing.assert_allclose(up.reshape(expected.shape), expected, rtol=1e-6, err_msg=module)


CONFIGS = {
    "alpha": {"lora_alpha": 5},
    "patterns": {"lora_alpha": 4, "alpha_pattern": {"conv1": 7, "attn2.to_q": 3}, "rank_pattern": {"conv1": 1}},
    "whole name": {"alpha_pattern": {"^mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 11}},
    "rank stabilized": {"lora_alpha": 4, "use_rslora": True, "rank_pattern": {"to_q": 3}},
}


@pytest.mark.parametrize("form", ["folder", "bin folder", "save_lora_adapter", "save_lora_weights"])
@pytest.mark.parametrize("config", CONFIGS)
def test_adapters_of_peft_have_its_strength(tmp_path, torch_unet, form, config):
    config = LoraConfig(r=2, target_modules=TARGET_MODULES, **CONFIGS[config])
    shapes = pictures.emoji_pipeline().params
    if "folder" in form:
        model = peft.get_peft_model(torch_unet, config)
        randomize(model, 3)
        model.save_pretrained(tmp_path, safe_serialization=form == "folder")
    else:
        torch_unet.add_adapter(config)
        model = randomize(torch_unet, 3)
        if form == "save_lora_adapter":
            torch_unet.save_lora_adapter(tmp_path)
        else:
            StableDiffusionPipeline.save_lora_weights(
                tmp_path,
                unet_lora_layers=get_peft_model_state_dict(torch_unet),
                unet_lora_adapter_metadata=torch_unet.peft_config["default"].to_dict(),
            )
    check_against_peft(read_lora(tmp_path, shapes)["unet"], model)
    if "folder" in form:
        (file,) = tmp_path.glob("adapter_model*")
        check_against_peft(read_lora(file, shapes)["unet"], model)
        (tmp_path / "adapter_config.json").unlink()
        with pytest.raises(UserError, match=r"adapter_config\.json is not beside it"):
            read_lora(tmp_path, shapes)


@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_a_folder_of_pefts_folders_adapts_each_part(tmp_path, torch_unet):
    """As peft's own examples save them, each with an alpha of its own."""
    text_encoder = CLIPTextModel.from_pretrained(local("emoji:model"), subfolder="text_encoder")
    for part, model, alpha in (("unet", torch_unet, 6), ("text_encoder", text_encoder, 3)):
        config = LoraConfig(r=2, lora_alpha=alpha, target_modules=["to_q", "q_proj", "fc1"])
        adapted = peft.get_peft_model(model, config)
        randomize(adapted, 3).save_pretrained(tmp_path / part)
    read = read_lora(tmp_path, pictures.emoji_pipeline().params)
    assert set(read) == {"unet", "text_encoder"}
    check_against_peft(read["unet"], torch_unet)
    ours = {
        module.removeprefix("text_model."): x
        for (_, module), x in lora_files.matrices({"t": read["text_encoder"]}).items()
    }
    theirs = scaled(text_encoder)
    assert ours.keys() == theirs.keys()
    for module, (down, up) in ours.items():
        np.testing.assert_array_equal(down, theirs[module].lora_A["default"].weight.detach().numpy())
        expected = theirs[module].lora_B["default"].weight.detach().numpy() * np.float32(1.5)
        np.testing.assert_allclose(up, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base"),
        ({"alpha_pattern": {".*to_q": 3}}, "regular expressions"),
        ({"lora_alpha": float("nan")}, "not finite"),
        ({"lora_alpha": "big"}, "damaged"),
        ({"alpha_pattern": 3}, "damaged"),
    ],
)
def test_configs_that_cannot_be_followed_are_refused(tmp_path, fields, words):
    emoji = pictures.emoji_pipeline().params
    lora = lora_files.random_adapters(emoji, only=lambda part, path: path[-1] == "conv_in")
    write_tensors(tmp_path / "adapter_model.safetensors", lora_files.spelled("without prefix", lora, emoji))
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(UserError, match=words) as caught:
        read_lora(tmp_path, emoji)
    assert "adapter_config.json" in str(caught.value)


# ------------------------------------------------------------------------------------------------------------ writing
@st.composite
def some_adapters(draw):
    emoji = pictures.emoji_pipeline().params
    layers = sorted((part, p[:-1]) for part in lora_files.PARTS for p in flat(emoji.get(part, {})) if p[-1] == "kernel")
    chosen = draw(st.lists(st.sampled_from(layers), min_size=1, max_size=6, unique=True))
    lora = {}
    for i, (part, path) in enumerate(chosen):
        rank = draw(st.integers(1, 5))
        one = lora_files.random_adapters(
            emoji, rank=rank, window_rank=rank, seed=i, only=lambda p, q, this=(part, path): (p, q) == this
        )
        lora |= flat(one)
    return flax.traverse_util.unflatten_dict(lora)


@settings(max_examples=15)
@given(
    lora=some_adapters(),
    form=st.sampled_from([write_lora, write_kohya]),
    dtype=st.sampled_from([np.float32, np.float16]),
    exponent=st.integers(-12, 12),
    share=st.integers(-12, 12),
)
def test_what_is_written_is_read_as_the_same_product(tmp_path_factory, lora, form, dtype, exponent, share):
    """Of any size that float16's range has room for, however it is shared between the two matrices."""
    file = tmp_path_factory.mktemp("lora") / "a.safetensors"
    emoji = pictures.emoji_pipeline().params
    lora = jax.tree.map(
        lambda path, x: np.ldexp(x, exponent // 2 + (share if path == "A" else exponent - 2 * (exponent // 2) - share)),
        jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key, lora),
        lora,
    )
    form(file, lora, *([emoji["unet"]] if form is write_kohya else []), dtype=dtype)
    read, expected = lora_files.products(read_lora(file, emoji)), lora_files.products(lora)
    assert read.keys() == expected.keys()
    for path, product in expected.items():
        error = np.linalg.norm(read[path] - product) / np.linalg.norm(product)
        assert error <= (0 if dtype == np.float32 else 2**-10), (path, error)


@pytest.mark.parametrize("form", [write_lora, write_kohya])
def test_a_small_alpha_survives_float16(tmp_path, form):
    """As the kohya trainer saves it: rank 128, alpha 1, and up matrices of about 1e-5."""
    emoji = pictures.emoji_pipeline().params
    lora = lora_files.random_adapters(emoji, rank=128, only=lambda part, path: path[-2:] == ("attn2", "to_q"))
    tensors = lora_files.spelled("kohya", lora, emoji)
    for key, value in tensors.items():
        if key.endswith("lora_up.weight"):
            value *= np.float32(1e-5) / np.abs(value).max()
        elif key.endswith("alpha"):
            value[...] = 1
    write_tensors(tmp_path / "theirs.safetensors", {k: v.astype(np.float16) for k, v in tensors.items()})
    read = read_lora(tmp_path / "theirs.safetensors", emoji)
    form(tmp_path / "ours.safetensors", read, *([emoji["unet"]] if form is write_kohya else []), dtype=np.float16)
    again, expected = lora_files.products(read_lora(tmp_path / "ours.safetensors", emoji)), lora_files.products(read)
    for path, product in expected.items():
        assert np.linalg.norm(again[path] - product) <= 2**-10 * np.linalg.norm(product), path


def test_what_has_no_room_in_float16_is_refused(tmp_path):
    lora = {"unet": {"conv_in": {"A": np.full((3, 3, 4, 1), 1e6, np.float32), "B": np.full((1, 8), 1e6, np.float32)}}}
    with pytest.raises(UserError, match="conv_in do not fit float16; write them as float32"):
        write_lora(tmp_path, lora, dtype=np.float16)
    assert not list(tmp_path.iterdir())
