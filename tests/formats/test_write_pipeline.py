"""A written pipeline folder: what is copied, what is not, and that there is never half of one."""

import json

import ml_dtypes
import numpy as np
import pytest

from spo_jax.errors import UserError
from spo_jax.formats import write_pipeline as module
from spo_jax.formats.safetensors_io import read_tensors
from spo_jax.formats.write_pipeline import write_pipeline

PARAMS = {"conv_in": {"kernel": np.full((3, 3, 1, 2), 1 / 3, np.float32), "bias": np.zeros(2, np.float32)}}
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "image_encoder": [None, None],
    "requires_safety_checker": True,
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


@pytest.fixture
def source(tmp_path):
    """A folder with the files of a download: variants, the old UNet in several formats, a single-file checkpoint."""
    folder = tmp_path / "source"
    files = ["unet/config.json", "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.bin"]
    files += ["unet/diffusion_pytorch_model.fp16.safetensors", "vae/config.json"]
    files += ["vae/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.fp16.bin"]
    files += ["tokenizer/vocab.json", "feature_extractor/preprocessor_config.json", "v1-5-pruned.ckpt"]
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name, encoding="utf-8")
    (folder / "model_index.json").write_text(json.dumps(INDEX), encoding="utf-8")
    return folder


def files_in(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_all_parts_are_copied_and_the_unet_is_the_new_one_alone(tmp_path, source, dtype):
    before = files_in(source)
    write_pipeline(tmp_path / "new", source, PARAMS, dtype=dtype)
    weights = "unet/diffusion_pytorch_model.safetensors"
    copied = {
        "unet/config.json",
        "vae/config.json",
        "tokenizer/vocab.json",
        "feature_extractor/preprocessor_config.json",
    }
    autoencoder = "vae/diffusion_pytorch_model.safetensors"
    assert files_in(tmp_path / "new") == copied | {weights, autoencoder, "model_index.json"}
    only_form = (source / "vae" / "diffusion_pytorch_model.fp16.safetensors").read_bytes()
    assert (tmp_path / "new" / autoencoder).read_bytes() == only_form
    for name in copied:
        assert (tmp_path / "new" / name).read_bytes() == (source / name).read_bytes()
    tensors = read_tensors(tmp_path / "new" / weights)
    assert set(tensors) == {"conv_in.weight", "conv_in.bias"}
    assert {x.dtype for x in tensors.values()} == {np.dtype(dtype)}
    np.testing.assert_array_equal(tensors["conv_in.weight"], np.full((2, 1, 3, 3), 1 / 3, np.float32).astype(dtype))
    # The safety checker was not there, and diffusers may do without it.
    index = json.loads((tmp_path / "new" / "model_index.json").read_text(encoding="utf-8"))
    assert index == INDEX | {"safety_checker": [None, None], "requires_safety_checker": False}
    assert files_in(source) == before and {p.name for p in tmp_path.iterdir()} == {"source", "new"}


def test_a_component_that_nobody_here_can_load_is_named(tmp_path, source, capsys):
    """Old pipelines name a class that transformers 5 has dropped."""
    write_pipeline(tmp_path / "known", source, PARAMS)
    assert capsys.readouterr().err == ""
    old = INDEX | {"feature_extractor": ["transformers", "CLIPFeatureExtractor"]}
    (source / "model_index.json").write_text(json.dumps(old), encoding="utf-8")
    write_pipeline(tmp_path / "old", source, PARAMS)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"spo_jax: warning: {tmp_path / 'old' / 'model_index.json'} names ")
    assert "transformers.CLIPFeatureExtractor, unknown to transformers 5" in line


def test_an_empty_folder_is_taken_and_a_full_one_or_a_file_is_not(tmp_path, source):
    (tmp_path / "empty").mkdir()
    write_pipeline(tmp_path / "empty", source, PARAMS)
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for out in (tmp_path / "empty", tmp_path / "file"):
        with pytest.raises(UserError, match=r"--out=.*not an empty folder"):
            write_pipeline(out, source, PARAMS)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    "failure, expected",
    [(OSError(28, "No space left on device"), UserError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_a_failure_on_the_way_leaves_nothing(tmp_path, source, monkeypatch, failure, expected):
    def fail(*_args, **_kwargs):
        raise failure

    monkeypatch.setattr(module, "write_params", fail)
    with pytest.raises(expected) as caught:
        write_pipeline(tmp_path / "new", source, PARAMS)
    assert expected is KeyboardInterrupt or "No space left on device" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_part_that_is_missing_is_refused_by_name(tmp_path, source):
    (source / "tokenizer" / "vocab.json").unlink()
    (source / "tokenizer").rmdir()
    with pytest.raises(UserError, match=r"tokenizer does not exist"):
        write_pipeline(tmp_path / "new", source, PARAMS)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_nothing_outside_the_pipeline_is_copied(tmp_path, source):
    """A model of a stranger must not bring a file of the user's into a folder that may be published."""
    (tmp_path / "secret.safetensors").write_bytes(b"secret")
    for file in (source / "vae").glob("*.fp16.*"):
        file.unlink()
    index = {"weight_map": {"w": "../../secret.safetensors"}}
    (source / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(UserError, match="outside its folder"):
        write_pipeline(tmp_path / "out", source, PARAMS)
    (source / "model_index.json").write_text(json.dumps(INDEX | {"../x": ["diffusers", "UNet"]}), encoding="utf-8")
    with pytest.raises(UserError, match="no folder of the pipeline's"):
        write_pipeline(tmp_path / "out", source, PARAMS)
    assert not (tmp_path / "out").exists()
