"""The readers use every key exactly once, keep every bit, and refuse whatever does not fit by file and key."""

import dataclasses
import json
import re
import shutil

import chex
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig

from spo_jax.errors import UserError
from spo_jax.formats import names
from spo_jax.formats.json_files import read_json
from spo_jax.formats.lora import FILE_NAME, read_lora
from spo_jax.formats.lora_write import write_lora
from spo_jax.formats.networks import network_shapes
from spo_jax.formats.pipeline import read_clip, read_text_encoder, read_unet, read_vae
from spo_jax.formats.safetensors_io import read_tensors, write_params, write_tensors
from spo_jax.formats.weights import read_params
from spo_jax.models import CLIPModel, CLIPTextModel, UNet2DConditionModel
from spo_jax.models.clip import CLIPTextTransformer, CLIPVisionTransformer
from spo_jax.models.lora import TARGETS, init_lora
from tests.golden_data import FOLDER

READERS = {
    "unet": read_unet,
    "vae": read_vae,
    "text_encoder": read_text_encoder,
    "spm": lambda folder: read_clip(folder, step_aware=True),
}
WEIGHTS = {name: next((FOLDER / name).glob("*.safetensors")) for name in READERS}


@pytest.fixture(scope="module")
def models():
    """Module and parameters of each golden model."""
    return {name: read(FOLDER / name) for name, read in READERS.items()}


def shapes(params):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)


def flat(tree):
    return flax.traverse_util.flatten_dict(tree)


# ------------------------------------------------------------------------------------------------------ key by key
@pytest.mark.parametrize("name", READERS)
def test_keys_and_parameters_correspond_one_to_one(models, name):
    prefix = "model." if name == "spm" else ""
    tensors, params = read_tensors(WEIGHTS[name]), flat(models[name][1])
    keys = {prefix + names.torch_key(path): path for path in params}
    assert len(keys) == len(params)
    assert set(keys) == {k for k in tensors if not k.endswith(".position_ids")}
    for key, path in keys.items():
        assert names.torch_shape(path, params[path].shape) == tensors[key].shape
        np.testing.assert_array_equal(names.to_torch(path, params[path]), tensors[key])
        np.testing.assert_array_equal(names.from_torch(path, tensors[key]), params[path])


@pytest.mark.parametrize("damage", ["missing", "renamed", "extra", "longer", "transposed"])
@settings(max_examples=8)
@given(data=st.data())
def test_damage_to_any_key_is_refused_by_file_and_key(tmp_path_factory, models, damage, data):
    name = data.draw(st.sampled_from(list(READERS)))
    prefix = "model." if name == "spm" else ""
    tensors = read_tensors(WEIGHTS[name])
    candidates = sorted(k for k in tensors if not k.endswith(".position_ids"))
    if damage == "transposed":  # of these the number of elements alone would not tell
        candidates = [k for k in candidates if tensors[k].ndim > 1 and tensors[k].shape != tensors[k].T.shape]
    key = data.draw(st.sampled_from(candidates))
    value = tensors.pop(key) if damage in ("missing", "renamed") else tensors[key]
    if damage == "renamed":
        tensors[key + "_"] = value
    elif damage == "extra":
        key += ".more"
        tensors[key] = value
    elif damage == "longer":
        tensors[key] = np.concatenate([value, value]) if value.ndim else np.stack([value, value])
    elif damage == "transposed":
        tensors[key] = np.ascontiguousarray(value.T)
    path = tmp_path_factory.mktemp("damaged") / "m.safetensors"
    write_tensors(path, tensors)
    with pytest.raises(UserError) as caught:
        read_params(path, shapes(models[name][1]), prefix=prefix)
    assert str(path) in str(caught.value) and key in str(caught.value)


@settings(max_examples=20)
@given(fraction=st.floats(0, 1, exclude_max=True))
def test_file_cut_anywhere_is_refused_by_name(tmp_path_factory, fraction):
    path = tmp_path_factory.mktemp("cut") / "m.safetensors"
    content = WEIGHTS["text_encoder"].read_bytes()
    path.write_bytes(content[: int(fraction * len(content))])
    with pytest.raises(UserError, match=re.escape(str(path))):
        read_tensors(path)


@settings(max_examples=20)
@given(content=st.binary(max_size=64))
def test_file_of_anything_is_refused_by_name(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("junk") / "m.safetensors"
    path.write_bytes(content)
    for read in (read_tensors, read_json):
        with pytest.raises(UserError, match=re.escape(str(path))):
            read(path)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("missing", ["config.json", "weights"])
def test_missing_file_is_refused_by_name(tmp_path, name, missing):
    shutil.copytree(FOLDER / name, tmp_path / name)
    file = tmp_path / name / (WEIGHTS[name].name if missing == "weights" else missing)
    file.unlink()
    with pytest.raises(UserError, match=re.escape(str(file))):
        READERS[name](tmp_path / name)
    file.mkdir()  # a folder in its place is no file either
    with pytest.raises(UserError, match=re.escape(str(file))):
        READERS[name](tmp_path / name)


# ----------------------------------------------------------------------------------------------------------- config
@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "1" * 5000 + "}", "[]", "{", ""])
def test_config_that_is_no_object_is_refused_by_file(tmp_path, name, text):
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "config.json"))):
        READERS[name](tmp_path)


@pytest.mark.parametrize(
    "name, change, field",
    [
        ("unet", {"wings": 2}, "'wings'"),
        ("unet", {"addition_embed_type": "text_time"}, "addition_embed_type"),
        ("unet", {"down_block_types": ["CrossAttnDownBlock2D", "AttnDownBlock2D"]}, "AttnDownBlock2D"),
        ("unet", {"up_block_types": ["UpBlock2D"]}, "up_block_types"),
        ("unet", {"mid_block_type": None}, "mid_block_type"),
        ("unet", {"transformer_layers_per_block": [1, 1, 1]}, "transformer_layers_per_block"),
        ("vae", {"wings": 2}, "'wings'"),
        ("vae", {"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "AttnDownEncoderBlock2D"),
        ("vae", {"mid_block_add_attention": False}, "mid_block_add_attention"),
        ("text_encoder", {"wings": 2}, "'wings'"),
        ("text_encoder", {"hidden_act": "relu"}, "hidden_act"),
        ("spm", {"wings": 2}, "'wings'"),
        ("spm", {"vision_config": {"num_channels": 1}}, "num_channels"),
        # Values that are known one by one, but make no model.
        ("unet", {"norm_num_groups": 7}, "groups"),
        ("unet", {"attention_head_dim": 7}, "reshape"),
        ("unet", {"block_out_channels": None}, ""),
        ("unet", {"cross_attention_dim": [32, 32]}, ""),
        ("vae", {"block_out_channels": None}, ""),
        ("text_encoder", {"num_attention_heads": 5}, "reshape"),
        ("text_encoder", {"vocab_size": "many"}, "many"),
        ("spm", {"vision_config": None}, ""),
    ],
)
def test_config_that_is_not_supported_is_refused_by_file_and_field(tmp_path, name, change, field):
    config = read_json(FOLDER / name / "config.json") | change
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "config.json"))) as caught:
        READERS[name](tmp_path)
    assert field in str(caught.value)


def test_width_of_a_text_encoder_whose_config_leaves_it_out():
    assert CLIPTextModel.from_config({}).hidden_size == CLIPTextConfig().hidden_size


@pytest.mark.parametrize(
    "ours, theirs", [(CLIPTextTransformer, CLIPTextConfig), (CLIPVisionTransformer, CLIPVisionConfig)]
)
def test_defaults_are_those_of_transformers(ours, theirs):
    """Configs that transformers 4 saved leave out what has its default."""
    defaults = theirs()
    for field in dataclasses.fields(ours):
        if field.name not in ("parent", "name", "dtype", "remat", "attention"):
            assert getattr(defaults, field.name) == field.default, field.name


def test_clip_of_defaults_has_their_image_size():
    clip = CLIPModel.from_config({"text_config": {}, "vision_config": {}}, step_aware=True)
    assert clip.image_size == CLIPConfig().vision_config.image_size


# ----------------------------------------------------------------------------------------------------- write and read
LEAF = st.tuples(st.sampled_from(["kernel", "bias", "scale"]), st.lists(st.integers(1, 4), min_size=4, max_size=4))
MODULE = st.sampled_from(["conv_in", "linear_1", "mlp_0", "net_2", "to_out_0", "norm1", "resnets_11", "layers_3"])


@given(
    tree=st.dictionaries(st.lists(MODULE, min_size=1, max_size=3).map(tuple), LEAF, min_size=1, max_size=5),
    data=st.data(),
)
def test_any_tree_is_written_and_read_bit_by_bit(tmp_path_factory, tree, data):
    params, generator = {}, np.random.default_rng(data.draw(st.integers(0, 1000)))
    for path, (leaf, sizes) in tree.items():
        shape = sizes[: data.draw(st.sampled_from([2, 4]))] if leaf == "kernel" else sizes[:1]
        # Any bit pattern of a finite number: subnormal numbers and negative zeros too.
        bits = generator.integers(0, 2**32, shape, dtype=np.uint32) & 0xBFFFFFFF
        params[(*path, leaf)] = bits.view(np.float32)
    params = flax.traverse_util.unflatten_dict(params)
    path = tmp_path_factory.mktemp("tree") / "m.safetensors"
    write_params(path, params, prefix="p.")
    read = read_params(path, shapes(params), prefix="p.")
    chex.assert_trees_all_equal(*(jax.tree.map(lambda x: np.asarray(x).view(np.uint32), t) for t in (read, params)))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_models_are_read_in_the_dtype_asked_for():
    _, params = read_vae(FOLDER / "vae", jnp.bfloat16)
    _, exact = read_vae(FOLDER / "vae")
    chex.assert_trees_all_equal(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact))


# ------------------------------------------------------------------------------------------------------------- LoRA
@pytest.fixture(scope="module")
def adapters(models):
    """Random adapters of the golden UNet, both matrices away from 0."""
    fresh = init_lora(jax.random.key(0), models["unet"][1], rank=3)
    generator = np.random.default_rng(1)
    return jax.tree.map(lambda x: np.float32(generator.standard_normal(x.shape)), fresh)


def test_fresh_adapters_are_on_every_attention_projection(models):
    _, params = models["unet"]
    lora = init_lora(jax.random.key(0), params, rank=4)
    adapted = {path[:-1] for path in flat(lora)}
    assert adapted == {p[:-1] for p in flat(params) if p[-1] == "kernel" and p[-2] in TARGETS}
    assert adapted == {p[:-1] for p in flat(params) if p[-1] == "kernel" and {"attn1", "attn2"} & set(p)}
    values = np.concatenate([np.ravel(x) for p, x in flat(lora).items() if p[-1] == "A"])
    np.testing.assert_allclose(values.std(), 1 / 4, rtol=0.05)
    np.testing.assert_allclose(values.mean(), 0, atol=0.02)
    assert all((x == 0).all() for p, x in flat(lora).items() if p[-1] == "B")


def test_a_network_with_fresh_adapters_is_the_network_without():
    config = {"block_out_channels": [8], "down_block_types": ["CrossAttnDownBlock2D"], "layers_per_block": 1}
    config |= {"up_block_types": ["CrossAttnUpBlock2D"], "norm_num_groups": 4, "cross_attention_dim": 6}
    unet = UNet2DConditionModel.from_config(config | {"attention_head_dim": 2})
    inputs = (jnp.ones((1, 2, 2, 4)), jnp.full(1, 7), jnp.ones((1, 3, 6)))

    generator = np.random.default_rng(0)
    spread = 0.3 * generator.standard_normal(2**14).astype(np.float32)
    params = jax.tree.map(lambda x: np.resize(spread, x.shape), network_shapes(unet))
    lora = init_lora(jax.random.key(0), params, rank=2)
    moved = jax.tree.map(lambda x: x + 0.1, lora)
    plain, fresh, other = (unet.apply({"params": params} | x, *inputs) for x in ({}, {"lora": lora}, {"lora": moved}))
    np.testing.assert_array_equal(fresh, plain)
    assert np.abs(other - plain).max() > 1e-3


def test_adapters_are_written_and_read_exactly(tmp_path, models, adapters):
    file = write_lora(tmp_path, {"unet": adapters})
    assert file == tmp_path / FILE_NAME
    for path in (file, tmp_path):
        chex.assert_trees_all_equal(
            read_lora(path, {"unet": models["unet"][1]})["unet"], jax.tree.map(jnp.asarray, adapters)
        )
    named = write_lora(tmp_path / "deep" / "mine.safetensors", {"unet": adapters})
    chex.assert_trees_all_equal(
        read_lora(named, {"unet": models["unet"][1]})["unet"], jax.tree.map(jnp.asarray, adapters)
    )


@pytest.mark.parametrize("alpha", [None, 6.0])
@pytest.mark.parametrize("where", ["key", "metadata"])
@pytest.mark.parametrize("new, old", [("lora_A", "lora_A"), ("lora_A", "lora.down")])
def test_strength_is_alpha_over_rank_wherever_it_is_written(tmp_path, models, adapters, alpha, where, new, old):
    tensors = read_tensors(write_lora(tmp_path, {"unet": adapters}))
    tensors = {
        k.replace(new, old).replace("lora_B", "lora.up" if old == "lora.down" else "lora_B"): v
        for k, v in tensors.items()
    }
    metadata = {"format": "pt"}
    if alpha is not None and where == "key":
        for key in [k for k in tensors if old in k]:
            tensors[key.split(f".{old}")[0] + ".alpha"] = np.array(alpha, np.float32)
    if alpha is not None and where == "metadata":
        metadata["lora_adapter_metadata"] = json.dumps({"unet.lora_alpha": alpha, "unet.r": 3, "unet.use_dora": False})
    safetensors.numpy.save_file(tensors, tmp_path / FILE_NAME, metadata=metadata)
    expected = flat(adapters)
    if alpha is not None:
        expected = {p: x * np.float32(alpha / 3) if p[-1] == "B" else x for p, x in expected.items()}
    chex.assert_trees_all_equal(
        flat(read_lora(tmp_path, {"unet": models["unet"][1]})["unet"]), jax.tree.map(jnp.asarray, expected)
    )


@pytest.mark.parametrize(
    "metadata, word",
    [
        ('{"unet.use_dora": true}', "DoRA"),
        ('{"unet.alpha_pattern": {"to_.": 2, ".*": 3}}', "alpha_pattern"),
        ("[", "damaged"),
        ("[]", "damaged"),
        ('{"unet.lora_alpha": "big"}', "damaged"),
    ],
)
def test_strength_that_cannot_be_kept_is_refused(tmp_path, models, adapters, metadata, word):
    tensors = read_tensors(write_lora(tmp_path, {"unet": adapters}))
    safetensors.numpy.save_file(tensors, tmp_path / FILE_NAME, metadata={"lora_adapter_metadata": metadata})
    with pytest.raises(UserError, match=word) as caught:
        read_lora(tmp_path, {"unet": models["unet"][1]})["unet"]
    assert FILE_NAME in str(caught.value)


@settings(max_examples=15)
@given(
    damage=st.sampled_from(["A gone", "B gone", "A wide", "A flat", "A scalar", "no rank", "text encoder"]),
    data=st.data(),
)
def test_adapters_that_do_not_fit_are_refused_by_file_and_layer(tmp_path_factory, models, adapters, damage, data):
    file = write_lora(tmp_path_factory.mktemp("lora"), {"unet": adapters})
    tensors = read_tensors(file)
    a = data.draw(st.sampled_from(sorted(k for k in tensors if "lora_A" in k)))
    module, b = a.removesuffix(".lora_A.weight"), a.replace("lora_A", "lora_B")
    if damage.endswith("gone"):
        del tensors[a if damage[0] == "A" else b]
    elif damage == "A wide":
        tensors[a] = np.ones((3, tensors[a].shape[1] + 1), np.float32)
    elif damage == "A flat":
        tensors[a] = tensors[a].ravel()
    elif damage == "A scalar":
        tensors[a] = np.float32(1)[None].reshape(())
    elif damage == "no rank":
        tensors[a], tensors[b] = tensors[a][:0], tensors[b][:, :0]
    else:
        module = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
        tensors[f"{module}.lora_A.weight"] = tensors[a]
    write_tensors(file, {k: np.ascontiguousarray(v) if v.ndim else v for k, v in tensors.items()})
    with pytest.raises(UserError, match=re.escape(module)) as caught:
        read_lora(file, {"unet": models["unet"][1]})["unet"]
    assert str(file) in str(caught.value)


def test_empty_adapter_file_is_refused(tmp_path, models):
    write_tensors(tmp_path / FILE_NAME, {})
    with pytest.raises(UserError, match="is empty"):
        read_lora(tmp_path, {"unet": models["unet"][1]})["unet"]
