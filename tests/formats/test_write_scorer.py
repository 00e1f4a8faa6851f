"""A written preference model: who can read it, and what writing takes."""

import functools
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers

from spo_jax.distributed.mesh import make_mesh
from spo_jax.distributed.sharding import weight_sharding
from spo_jax.errors import UserError
from spo_jax.formats.hub import local
from spo_jax.formats.pipeline import read_clip
from spo_jax.formats.safetensors_io import index_safetensors, write_params
from spo_jax.formats.write_scorer import write_scorer
from tests.golden_data import FOLDER
from tests.system.commands import ROOT, environment


@pytest.mark.parametrize("split", [False, True])
def test_a_step_aware_model_has_the_released_keys_and_values(tmp_path, split):
    mesh = make_mesh(data=1, fsdp=8)
    clip, params = read_clip(
        FOLDER / "spm", step_aware=None, sharding=functools.partial(weight_sharding, mesh) if split else None
    )
    assert clip.step_aware
    write_scorer(tmp_path / "new" / "scorer", clip, params)
    theirs = safetensors.numpy.load_file(FOLDER / "spm" / "model.safetensors")
    ours = safetensors.numpy.load_file(tmp_path / "new" / "scorer" / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(key.startswith("model.") for key in ours)
    for key, value in theirs.items():
        assert (ours[key].dtype, ours[key].shape) == (value.dtype, value.shape)
        np.testing.assert_array_equal(ours[key], value)
    assert {p.name for p in (tmp_path / "new" / "scorer").iterdir()} == {"config.json", "model.safetensors"}


def test_the_original_program_can_load_the_file_as_the_state_of_its_module(tmp_path):
    """It holds a CLIP as ``model``; the time layers are its own, everything else must be transformers'."""
    clip, params = read_clip(FOLDER / "spm", step_aware=None)
    write_scorer(tmp_path, clip, params)
    module = torch.nn.Module()
    module.model = transformers.CLIPModel(transformers.CLIPConfig.from_pretrained(tmp_path))
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    result = module.load_state_dict(tensors, strict=False)
    assert not result.missing_keys
    assert all("t_embedder.mlp." in key or "adaLN_modulation.1." in key for key in result.unexpected_keys)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_what_was_written_is_read_by_path_from_folder_and_file(tmp_path, dtype):
    clip, params = read_clip(FOLDER / "spm", step_aware=None)
    write_scorer(tmp_path, clip, params, dtype=dtype)
    rounded = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), params)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        again, read = read_clip(path, step_aware=None)
        assert again == clip
        chex.assert_trees_all_equal(read, rounded)


def test_transformers_loads_a_plain_model_and_scores_alike(tmp_path):
    clip, params = read_clip(local("emoji:model/clip"), step_aware=None)
    params = jax.tree.map(lambda x: x * 1.01, params)  # not the file that is there already
    write_scorer(tmp_path, clip, params)
    theirs, loading = transformers.CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    generator = np.random.default_rng(0)
    pixels = generator.standard_normal((3, clip.image_size, clip.image_size, 3)).astype(np.float32)
    tokens = generator.integers(3, 60, (3, 16)).astype(np.int32)
    tokens[:, -1] = clip.text_config["eos_token_id"]
    with torch.no_grad():
        output = theirs.eval()(
            pixel_values=torch.from_numpy(pixels.transpose(0, 3, 1, 2)), input_ids=torch.from_numpy(tokens).long()
        )
    image, text, scale = clip.apply({"params": params}, pixels, tokens)
    np.testing.assert_allclose(scale * image @ text.T, output.logits_per_image.numpy(), rtol=0, atol=1e-4)


def test_writing_again_replaces_and_a_failure_leaves_the_old_file(tmp_path, monkeypatch):
    clip, params = read_clip(FOLDER / "spm", step_aware=None)
    write_scorer(tmp_path, clip, params)
    write_scorer(tmp_path, clip, jax.tree.map(lambda x: x + 1, params))
    before = (tmp_path / "model.safetensors").read_bytes()
    broken = params | {"logit_scale": None}
    with pytest.raises(AttributeError):
        write_scorer(tmp_path, clip, broken)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be written"):
        write_scorer(tmp_path / "file" / "folder", clip, params)


def test_the_file_is_the_one_that_safetensors_writes(tmp_path):
    params = {"a_0": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)}, "scale": jnp.float32(2)}
    write_params(tmp_path / "ours", params, prefix="m.")
    tensors = {"m.a.0.weight": np.arange(6, dtype=np.float32).reshape(2, 3).T.copy(), "m.a.0.bias": np.ones(3, "f4")}
    safetensors.numpy.save_file(tensors | {"m.weight": np.array(2, "f4")}, tmp_path / "theirs", {"format": "pt"})
    ours, theirs = (safetensors.numpy.load_file(tmp_path / name) for name in ("ours", "theirs"))
    chex.assert_trees_all_equal(ours, theirs)
    assert all(array.offset % 4 == 0 for array in index_safetensors(tmp_path / "ours").values())
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


PEAK = """
import resource, sys
import jax, jax.numpy as jnp, numpy as np
from pathlib import Path
from spo_jax.formats.safetensors_io import write_params
from spo_jax.distributed.mesh import make_mesh
from spo_jax.distributed.sharding import weight_sharding
mesh = make_mesh(data=1, fsdp=2)
split = weight_sharding(mesh, ("mlp", "fc1", "kernel"), (1024, 2048))
make = lambda i: jax.device_put(jnp.full((1024, 2048), i, jnp.float32), split)
params = {f"layer_{i}": {"kernel": make(i)} for i in range(32)}
jax.block_until_ready(params)
write_params(Path(sys.argv[1]) / "warm", {"layer_0": params["layer_0"]})
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
before = peak()
write_params(Path(sys.argv[1]) / "all", params)
print(peak() - before)
"""


def test_writing_takes_the_memory_of_a_few_parameters(tmp_path):
    """256 MiB in 32 parameters, each split over two devices."""
    arguments, env = [sys.executable, "-c", PEAK, str(tmp_path)], environment(num_devices=2)
    result = subprocess.run(arguments, env=env, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "all").stat().st_size > 256 * 2**20
    print(f"{float(result.stdout):.0f} MiB more")
    assert float(result.stdout) < 40
