"""Weights in every usual file give the same parameters, put where they are asked for, one at a time."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys

import chex
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from spo_jax.distributed.mesh import make_mesh, replicated
from spo_jax.errors import UserError
from spo_jax.formats.hub import local
from spo_jax.formats.networks import network_shapes
from spo_jax.formats.pipeline import read_clip, read_pipeline, read_text_encoder, read_unet, read_vae
from spo_jax.formats.safetensors_io import index_safetensors, read_tensors, write_tensors
from spo_jax.formats.weights import open_weights, read_params
from spo_jax.models import CLIPModel
from spo_jax.models.published import CLIP_VIT_H
from tests.golden_data import FOLDER

STEMS = {"unet": "diffusion_pytorch_model", "text_encoder": "model"}
READERS = {"unet": read_unet, "text_encoder": read_text_encoder}
LAYOUTS = ["safetensors", "bin", "safetensors shards", "bin shards"]


@functools.cache
def golden(name):
    """The parameters of a golden model."""
    return READERS[name](FOLDER / name)[1]


def lay_out(name, folder, layout, variant):
    """The golden model ``name`` in another layout."""
    shutil.copytree(FOLDER / name, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = read_tensors(next((FOLDER / name).glob("*.safetensors")))
    kind = layout.split()[0]
    stem = "pytorch_model" if (name, kind) == ("text_encoder", "bin") else STEMS[name]
    dot = f".{variant}" if variant else ""

    def save(file, tensors):
        if kind == "bin":
            torch.save({k: torch.from_numpy(np.array(v)) for k, v in tensors.items()}, folder / file)
        else:
            write_tensors(folder / file, tensors)

    if not layout.endswith("shards"):
        save(f"{stem}{dot}.{kind}", tensors)
        return
    parts = [sorted(tensors)[i::3] for i in range(3)]
    shards = [f"{stem}{dot}-{i:05}-of-00003.{kind}" for i in range(1, 4)]
    for shard, part in zip(shards, parts, strict=True):
        save(shard, {k: tensors[k] for k in part})
    weight_map = {k: shard for shard, part in zip(shards, parts, strict=True) for k in part}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.{kind}.index{dot}.json").write_text(json.dumps(index), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------- layouts
@pytest.mark.parametrize("name", STEMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_every_layout_gives_the_same_parameters(tmp_path, capsys, name, layout, variant):
    lay_out(name, tmp_path / "m", layout, variant)
    _, params = READERS[name](tmp_path / "m", variant=variant)
    chex.assert_trees_all_equal(params, golden(name))
    if variant:  # the only one that is there need not be named
        chex.assert_trees_all_equal(READERS[name](tmp_path / "m")[1], golden(name))
        assert f"{tmp_path / 'm'}: only fp16 weights are there" in capsys.readouterr().err
    else:
        with pytest.raises(UserError, match=re.escape(STEMS[name])):
            READERS[name](tmp_path / "m", variant="fp16")


def test_newer_name_of_a_variants_index_is_read(tmp_path):
    lay_out("unet", tmp_path / "m", "safetensors shards", "fp16")
    index = tmp_path / "m" / "diffusion_pytorch_model.safetensors.index.fp16.json"
    index.rename(index.with_name("diffusion_pytorch_model.fp16.safetensors.index.json"))
    assert open_weights(tmp_path / "m", STEMS["unet"], "fp16").arrays


def test_layouts_are_preferred_in_the_order_of_the_list(tmp_path):
    """safetensors before PyTorch's format, whatever else is there."""
    for layout in reversed(LAYOUTS):
        lay_out("text_encoder", tmp_path / layout, layout, None)
        shutil.copytree(tmp_path / layout, tmp_path / "all", dirs_exist_ok=True)
    expected = [
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ]
    for name in expected:
        assert open_weights(tmp_path / "all", "model").path == tmp_path / "all" / name
        (tmp_path / "all" / name).unlink()


def test_other_variant_is_named_when_the_one_asked_for_is_missing(tmp_path):
    for variant in ("fp16", "non_ema"):
        lay_out("unet", tmp_path / variant, "safetensors", variant)
        shutil.copytree(tmp_path / variant, tmp_path / "m", dirs_exist_ok=True)
    words = r"diffusion_pytorch_model\.safetensors does not exist.*fp16\.safetensors.*non_ema\.safetensors.*--variant"
    with pytest.raises(UserError, match=words):
        read_unet(tmp_path / "m")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_missing_shard_is_named(tmp_path, kind):
    lay_out("unet", tmp_path / "m", f"{kind} shards", None)
    shard = tmp_path / "m" / f"diffusion_pytorch_model-00002-of-00003.{kind}"
    shard.unlink()
    with pytest.raises(UserError, match=re.escape(f"{shard} does not exist")):
        read_unet(tmp_path / "m")


def test_shards_without_their_index_are_told(tmp_path):
    lay_out("unet", tmp_path / "m", "safetensors shards", None)
    (tmp_path / "m" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"shards \(.*not their index, diffusion_pytorch_model\.safetensors\.index"):
        read_unet(tmp_path / "m")


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "a\\..\\x.safetensors"])
def test_index_may_not_leave_its_folder(tmp_path, name):
    (tmp_path / "m").mkdir()
    write_tensors(tmp_path / "x.safetensors", {"w": np.zeros(2, np.float32)})
    index = tmp_path / "m" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}), encoding="utf-8")
    with pytest.raises(UserError, match="outside its folder"):
        open_weights(tmp_path / "m", "model")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"w": 1}}', '{"weight_map": {"w": ["a"]}}', "[" * 99_999],
)
def test_index_that_is_none_is_refused_by_name(tmp_path, text):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(str(index))):
        open_weights(tmp_path, "model")


def test_key_that_its_shard_lacks_is_named(tmp_path):
    write_tensors(tmp_path / "a.safetensors", {"v": np.zeros(2, np.float32)})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "a.safetensors"}}), encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.safetensors has no key 'w'"):
        open_weights(tmp_path, "model")


def test_key_that_only_a_shard_has_is_refused_like_any_left_over_key(tmp_path):
    write_tensors(tmp_path / "a.safetensors", {"w": np.zeros(2, np.float32), "extra": np.zeros(2, np.float32)})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "a.safetensors"}}), encoding="utf-8")
    with pytest.raises(UserError, match=r"does not use \(extra\)"):
        read_params(open_weights(tmp_path, "model"), {"w": jax.ShapeDtypeStruct((2,), jnp.float32)})


@given(data=st.data())
def test_safetensors_are_read_as_their_library_reads_them(tmp_path_factory, data):
    generator = np.random.default_rng(data.draw(st.integers(0, 1000)))
    dtypes = [np.float64, np.float32, np.float16, jnp.bfloat16, np.int64, np.int32, np.int16, np.int8, np.uint8, bool]
    tensors = {}
    for name in data.draw(st.sets(st.text("ab.é", min_size=1, max_size=4), max_size=4)):
        shape = data.draw(st.lists(st.integers(0, 3), max_size=3))
        tensors[name] = np.asarray(generator.integers(0, 2, shape)).astype(data.draw(st.sampled_from(dtypes)))
    path = tmp_path_factory.mktemp("any") / "m.safetensors"
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    read = {key: array.read() for key, array in index_safetensors(path).items()}
    assert {k: v.dtype for k, v in read.items()} == {k: v.dtype for k, v in tensors.items()}
    chex.assert_trees_all_equal(read, tensors)


def test_bfloat16_of_pytorch_is_read_exactly(tmp_path):
    tensor = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    torch.save({"w.weight": tensor}, tmp_path / "m.bin")
    shapes = {"w": {"kernel": jax.ShapeDtypeStruct((3, 4), jnp.bfloat16)}}
    kernel = read_params(tmp_path / "m.bin", shapes)["w"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(kernel, np.float32), tensor.float().numpy().T)


def test_attack_in_a_model_folder_is_refused_and_not_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'mark'}",)

    shutil.copy(FOLDER / "text_encoder" / "config.json", tmp_path)
    torch.save({"text_model.final_layer_norm.weight": Attack()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin asks for '(posix|nt)\.system'"):
        read_text_encoder(tmp_path)
    assert not (tmp_path / "mark").exists()


# --------------------------------------------------------------------------------------------------------- placement
def test_parameters_go_where_they_are_asked_for():
    mesh = make_mesh(data=4, fsdp=2)
    _, expected = read_vae(FOLDER / "vae")
    _, params = read_vae(FOLDER / "vae", sharding=replicated(mesh))
    assert all(x.sharding == replicated(mesh) for x in jax.tree.leaves(params))
    chex.assert_trees_all_equal(params, expected)

    def by_path(path, _shape=None):
        split = path[-2:] == ("conv_in", "kernel")
        return NamedSharding(mesh, PartitionSpec(None, None, None, "fsdp") if split else PartitionSpec())

    _, params = read_vae(FOLDER / "vae", jnp.bfloat16, sharding=by_path)
    for path, value in flax.traverse_util.flatten_dict(params).items():
        assert value.sharding == by_path(path) and value.dtype == jnp.bfloat16
    kernel = params["encoder"]["conv_in"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 3, 3, kernel.shape[3] // 2)}
    chex.assert_trees_all_equal(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), expected))


def test_paths_of_a_pipeline_start_with_the_component():
    seen = set()

    def remember(path, _shape):
        seen.add(path)
        return replicated(make_mesh(data=-1, fsdp=1))

    pipeline = read_pipeline(local("emoji:model"), sharding=remember)
    assert seen == set(flax.traverse_util.flatten_dict(pipeline.params))


MEASURE = """
import re, sys
from pathlib import Path
import jax, jax.numpy as jnp
from spo_jax.formats.weights import read_params

def peak():  # not getrusage's, in which the process that started this one lives on
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

jax.config.update("jax_num_cpu_devices", 2)
path, dtype, number = Path(sys.argv[1]), jnp.dtype(sys.argv[2]), int(sys.argv[3])
shapes = {f"layers_{i}": {"kernel": jax.ShapeDtypeStruct((2048, 2048), dtype)} for i in range(number)}
split = jax.sharding.NamedSharding(jax.make_mesh((2,), ("fsdp",)), jax.P("fsdp"))
sharding = split if sys.argv[4] == "sharded" else None
jnp.zeros(1).block_until_ready()  # what JAX takes to start is not the checkpoint's
before = peak()
params = read_params(path, shapes, sharding=sharding)
assert "torch" not in sys.modules
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["one device", "sharded"])
@pytest.mark.parametrize("kind, dtype", [("safetensors", "float32"), ("bin", "float32"), ("bin", "bfloat16")])
def test_parameters_are_never_twice_in_host_memory(tmp_path, kind, dtype, placement):
    """Peak growth of resident memory, of a whole process, at most 1.3 times the checkpoint."""
    torch_dtype = getattr(torch, dtype)
    number = 400 * 2**20 // (2048 * 2048 * torch_dtype.itemsize)
    tensors = {f"layers.{i}.weight": torch.full((2048, 2048), i, dtype=torch_dtype) for i in range(number)}
    path = tmp_path / f"m.{kind}"
    if kind == "bin":
        torch.save(tensors, path)
    else:
        write_tensors(path, {k: v.numpy() for k, v in tensors.items()})
    command = [sys.executable, "-c", MEASURE, path, dtype, str(number), placement]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    growth = int(output) / path.stat().st_size
    print(f"{kind} {dtype} {placement}: {growth:.2f} times the checkpoint")
    assert 0.9 < growth <= 1.3


# -------------------------------------------------------------------------------------------- the preference model
@pytest.fixture(scope="module")
def pick_score(tmp_path_factory):
    """A plain CLIP as PickScore_v1 is published: transformers' names, no time layers, in both formats."""
    folder = tmp_path_factory.mktemp("clip")
    shutil.copy(FOLDER / "spm" / "config.json", folder)
    tensors = read_tensors(FOLDER / "spm" / "model.safetensors")
    tensors = {k.removeprefix("model."): v for k, v in tensors.items()}
    tensors = {k: v for k, v in tensors.items() if "t_embedder" not in k and "adaLN_modulation" not in k}
    write_tensors(folder / "model.safetensors", tensors)
    torch.save({k: torch.from_numpy(np.array(v)) for k, v in tensors.items()}, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("file", ["", "model.safetensors", "pytorch_model.bin"])
def test_step_aware_clip_from_a_plain_one_gives_its_scores_at_every_timestep(pick_score, file):
    plain, plain_params = read_clip(pick_score, step_aware=False)
    clip, params = read_clip(pick_score / file, step_aware=True)
    generator = np.random.default_rng(0)
    pixels = jnp.asarray(generator.standard_normal((2, clip.image_size, clip.image_size, 3)), jnp.float32)
    tokens = jnp.asarray(generator.integers(1, 100, (2, 6)))

    def scores(image, text, scale):
        return scale * jnp.sum(image * text, axis=-1)

    expected = jax.jit(lambda: scores(*plain.apply({"params": plain_params}, pixels, tokens)))()
    score = jax.jit(lambda times: scores(*clip.apply({"params": params}, pixels, tokens, times)))

    @settings(max_examples=20)
    @given(times=st.lists(st.integers(0, 999), min_size=2, max_size=2))
    def everywhere(times):
        np.testing.assert_allclose(score(jnp.asarray(times)), expected, rtol=0, atol=1e-5)

    everywhere()


def test_fresh_time_layers_have_the_dtype_and_place_asked_for(pick_score):
    mesh = make_mesh(data=-1, fsdp=1)
    _, exact = read_clip(pick_score, step_aware=True)
    for sharding in (replicated(mesh), lambda path, shape: replicated(mesh)):
        _, params = read_clip(pick_score, step_aware=True, dtype=jnp.bfloat16, sharding=sharding)
        assert all(x.sharding == replicated(mesh) for x in jax.tree.leaves(params))
        chex.assert_trees_all_equal(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact))


@pytest.mark.parametrize("config_beside", [True, False])
def test_released_preference_model_is_read_from_its_file(tmp_path, config_beside):
    """``model.`` before every key, in PyTorch's format; without a config it must be the ViT-H/14 of the release."""
    tensors = read_tensors(FOLDER / "spm" / "model.safetensors")
    assert all(key.startswith("model.") for key in tensors)
    file = tmp_path / "sd-v1-5_step-aware_preference_model.bin"
    torch.save({k: torch.from_numpy(np.array(v)) for k, v in tensors.items()}, file)
    if config_beside:
        shutil.copy(FOLDER / "spm" / "config.json", tmp_path)
        _, params = read_clip(file, step_aware=True)
        chex.assert_trees_all_equal(params, read_clip(FOLDER / "spm", step_aware=True)[1])
    else:
        with pytest.raises(UserError, match=re.escape(f"{file}: 'model.")) as caught:
            read_clip(file, step_aware=True)
        assert "has shape" in str(caught.value)


def test_clip_without_a_config_has_the_size_of_vit_h_14():
    clip = CLIPModel.from_config(CLIP_VIT_H, step_aware=False)
    assert sum(x.size for x in jax.tree.leaves(network_shapes(clip))) == 986_109_441
    assert clip.image_size == 224
