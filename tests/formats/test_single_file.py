"""Single files: which kinds are known, what is assumed, and one sentence for whatever is not a whole model."""

import functools
import json
import pickle
import zipfile

import chex
import flax.traverse_util
import huggingface_hub.constants
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch

from configs import tiny
from spo_jax.errors import UserError
from spo_jax.formats.base import Base
from spo_jax.formats.hub import local
from spo_jax.formats.names import torch_shape
from spo_jax.formats.networks import PARTS, network_shapes
from spo_jax.formats.original_layout import LAYOUTS, originals
from spo_jax.formats.pipeline import open_pipeline, read_pipeline
from spo_jax.formats.single_file import config_folder, open_single_file
from spo_jax.formats.write_checkpoint import write_checkpoint
from spo_jax.formats.write_pipeline import write_pipeline
from spo_jax.models import published
from spo_jax.planning.shapes import Shapes
from spo_jax.runs.artifacts import artifacts_of, take_stock
from spo_jax.runs.result import write_result
from tests.small_pipeline import small_pipeline

FIRST = "model.diffusion_model.input_blocks.0.0.weight"
TO_K = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


@functools.cache
def zeros(kind):
    """All tensors of a small single file of a kind, with CLIP's vocabulary; where configs can be told from sizes."""
    unet = {
        "block_out_channels": [64],
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"],
        "layers_per_block": 1,
        "attention_head_dim": 8 if kind == "SD1" else [1],
        "cross_attention_dim": 128 if kind == "SDXL" else 64,
    }
    if kind == "SDXL":
        unet |= {"transformer_layers_per_block": [1], "projection_class_embeddings_input_dim": 64 + 6 * 256}
    vae = {"block_out_channels": [32], "layers_per_block": 1, "down_block_types": ["DownEncoderBlock2D"]}
    text = dict(hidden_size=64, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, projection_dim=64)
    changes = {"unet": unet, "vae": vae | {"up_block_types": ["UpDecoderBlock2D"]}}
    configs = list(published.PIPELINES.values())[["SD1", "SD2", "SDXL"].index(kind)]
    tensors = {}
    for part in LAYOUTS[kind]:
        shapes = network_shapes(PARTS[part].model.from_config(configs[part] | changes.get(part, text)))
        flat = flax.traverse_util.flatten_dict(shapes)
        for path, original in originals(kind, part, shapes).items():
            tensors[original.key] = np.zeros(original.shape(torch_shape(path, flat[path].shape)), np.float16)
    return tensors


def write(path, tensors, metadata=None):
    safetensors.numpy.save_file(tensors, path, metadata)
    return path


def sentence(call, *arguments, **options):
    with pytest.raises(UserError) as found:
        call(*arguments, **options)
    assert len(str(found.value).splitlines()) == 1
    return str(found.value)


# ------------------------------------------------------------------------------------------------------- other kinds
def with_channels(kind, channels):
    return {**zeros(kind), FIRST: np.zeros((64, channels, 3, 3), np.float16)}


def some(*keys):
    return {key: np.zeros(4, np.float32) for key in keys}


def only(kind, prefix):
    return {key: value for key, value in zeros(kind).items() if key.startswith(prefix)}


@pytest.mark.parametrize(
    "tensors, words",
    [
        (lambda: with_channels("SD1", 9), "an inpainting model"),
        (lambda: with_channels("SDXL", 9), "an inpainting model"),
        (lambda: with_channels("SD1", 8), "an InstructPix2Pix model"),
        (lambda: with_channels("SD2", 7), "an upscaler"),
        (lambda: with_channels("SD2", 5), "a depth-to-image model"),
        (lambda: with_channels("SD1", 16), "takes 16 channels"),
        (
            lambda: {
                key.replace("conditioner.embedders.1.model.", "conditioner.embedders.0.model."): value
                for key, value in zeros("SDXL").items()
                if not key.startswith("conditioner.embedders.0.")
            },
            "an SDXL refiner",
        ),
        (
            lambda: {k.replace("cond_stage_model.", "conditioner.embedders.0."): v for k, v in zeros("SD2").items()},
            "SD-Turbo",
        ),
        (lambda: zeros("SD2") | some("model.diffusion_model.label_emb.0.0.weight"), "unCLIP"),
        (lambda: zeros("SDXL") | some("edm_mean"), "Playground 2.5"),
        (lambda: zeros("SD2") | some("model.diffusion_model.input_blocks.1.1.time_stack.0.norm1.weight"), "video"),
        (lambda: zeros("SD1") | some("control_model.input_hint_block.0.weight"), "a ControlNet"),
        (lambda: some("controlnet_cond_embedding.conv_in.weight", "conv_in.weight"), "a ControlNet"),
        (lambda: some("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"), "a Stable Diffusion 3"),
        (lambda: some("model.diffusion_model.double_blocks.0.img_attn.qkv.weight"), "Flux"),
        (lambda: some("double_blocks.0.img_attn.qkv.weight"), "Flux"),
        (lambda: some("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"), "a LoRA file; give it as --lora"),
        (lambda: some("unet.mid_block.attentions.0.to_q.lora_A.weight"), "a LoRA file"),
        (lambda: some("base_model.model.mid_block.attn.to_q.lora_B.weight"), "a LoRA file"),
        (lambda: some("text_model_encoder.hada_w1_a", "x.hada_w1_a"), "a LoRA file"),
        (lambda: only("SD1", "model.diffusion_model."), "a UNet alone"),
        (
            lambda: {k.removeprefix("model.diffusion_model."): v for k, v in zeros("SD1").items() if "diffusion" in k},
            "a UNet alone",
        ),
        (lambda: some("down_blocks.0.resnets.0.conv1.weight", "conv_in.weight"), "a UNet alone"),
        (lambda: only("SD1", "first_stage_model."), "an autoencoder alone; as a diffusers folder"),
        (lambda: some("encoder.down.0.block.0.conv1.weight", "quant_conv.weight"), "an autoencoder alone"),
        (lambda: some("decoder.up_blocks.0.resnets.0.conv1.weight"), "an autoencoder alone"),
        (lambda: only("SDXL", "conditioner."), "text encoders alone"),
        (lambda: some("text_model.embeddings.token_embedding.weight"), "text encoders alone"),
        (lambda: some("emb_params"), "a textual inversion"),
        (lambda: some("clip_l", "clip_g"), "a textual inversion"),
        (lambda: some("ip_adapter.1.to_k_ip.weight"), "an IP-Adapter"),
        (lambda: some("down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"), "AnimateDiff"),
        (lambda: some("model.0.weight", "model.0.bias"), "not known here (keys: model.0.bias, model.0.weight, ...)"),
        (lambda: {}, "not known here (keys: none)"),
        (lambda: only("SD1", "model.") | only("SD1", "first"), "no text encoder that is known"),
        (lambda: only("SD1", "model.") | only("SD1", "cond_stage"), "no keys first_stage_model.*"),
        (
            lambda: only("SDXL", "model.") | only("SDXL", "first") | only("SDXL", "conditioner.embedders.1"),
            "embedders.0",
        ),
    ],
)
def test_another_kind_of_file_is_refused_by_its_name(tmp_path, tensors, words):
    path = write(tmp_path / "file.safetensors", tensors())
    said = sentence(read_pipeline, path)
    assert words in said and str(path) in said


# ------------------------------------------------------------------------------------------------------ damaged files
def test_keys_that_are_missing_left_over_or_of_another_shape_are_named(tmp_path):
    good, path = zeros("SD1"), tmp_path / "file.safetensors"
    config_folder(path).mkdir()
    (config_folder(path) / "tokenizer").symlink_to(local("emoji:model/tokenizer"))
    for key in (
        TO_K,
        FIRST,
        "first_stage_model.quant_conv.bias",
        "cond_stage_model.transformer.text_model.final_layer_norm.bias",
    ):
        write(path, {k: v for k, v in good.items() if k != key})
        assert repr(key) in sentence(read_pipeline, path)
    for key in ("model.diffusion_model.input_blocks.1.1.new.weight", "first_stage_model.encoder.new", "new"):
        write(path, good | some(key))
        said = sentence(read_pipeline, path)
        assert "1 keys that are not known" in said and key in said
    for key, shape in (
        (TO_K, (63, 64)),
        ("first_stage_model.encoder.mid.attn_1.q.weight", (32, 32, 3, 3)),
        (FIRST, (64, 4)),
    ):
        write(path, {**good, key: np.zeros(shape, np.float16)})
        said = sentence(read_pipeline, path)
        assert key in said and str(shape) in said


def archive(path, content):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", content)
    return path


class Callback:
    """Stands for what PyTorch Lightning pickles beside the weights."""


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.safetensors", b"", "damaged or truncated"),
        ("a.safetensors", b"\x10\0\0\0\0\0\0\0{}", "damaged or truncated"),
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "damaged or truncated"),
        ("a.txt", b"a fox\n", "is no model"),
        ("model_index.json", b"{}", "is no model"),
        ("a.ckpt", b"\x80\x02}q\x00.", "not a PyTorch zip file"),
        ("a.ckpt", pickle.dumps({"state_dict": {}, "callbacks": {"x": Callback()}}, 2), "safetensors"),
        ("a.safetensors", pickle.dumps({"state_dict": {"weight": 3}}, 2), "holds a int under 'weight'"),
        ("a.ckpt", pickle.dumps({"model": {"weight": 3}}, 2), "holds a dict under 'model'"),
        ("a.ckpt", pickle.dumps({"state_dict": {5: 3}}, 2), "holds a int where"),
    ],
)
def test_a_damaged_file_is_one_sentence(tmp_path, name, content, words):
    path = tmp_path / name
    if content.startswith(b"\x80\x02}q") and content != b"\x80\x02}q\x00.":
        archive(path, content)
    else:
        path.write_bytes(content)
    said = sentence(read_pipeline, path)
    assert words in said and str(path) in said


def test_a_truncated_file_is_refused_before_anything_is_read(tmp_path):
    path = write(tmp_path / "file.safetensors", zeros("SD1"))
    path.write_bytes(path.read_bytes()[:-1])
    assert "damaged or truncated" in sentence(read_pipeline, path)
    assert "fp16" in sentence(read_pipeline, write(path, zeros("SD1")), variant="fp16")


# ------------------------------------------------------------------------------------------------------ what is assumed
@pytest.mark.parametrize(
    "kind, metadata, keys, beside, expected, says",
    [
        ("SD1", {}, (), {}, "epsilon", False),
        ("SDXL", {}, (), {}, "epsilon", False),
        ("SDXL", {}, ("v_pred",), {}, "v_prediction", False),
        ("SD1", {"modelspec.prediction_type": "v"}, (), {}, "v_prediction", False),
        ("SD2", {"modelspec.prediction_type": "epsilon"}, (), {}, "epsilon", False),
        ("SD2", {"modelspec.architecture": "stable-diffusion-v2-512"}, (), {}, "epsilon", False),
        ("SD2", {"modelspec.architecture": "stable-diffusion-v2-768-v"}, (), {}, "v_prediction", False),
        ("SD2", None, (), {"global_step": 875000}, "epsilon", False),
        ("SD2", None, (), {"global_step": 110000}, "v_prediction", True),
        ("SD2", {}, (), {}, "v_prediction", True),
    ],
)
def test_what_the_unet_predicts(tmp_path, capsys, kind, metadata, keys, beside, expected, says):
    tensors = {**zeros(kind), **{key: np.zeros(0, np.float32) for key in keys}}
    path = tmp_path / "file.ckpt"
    if metadata is None:
        torch.save({"state_dict": {k: torch.from_numpy(v) for k, v in tensors.items()}, **beside}, path)
    else:
        path = write(path.with_suffix(".safetensors"), tensors, metadata)
    files = open_single_file(path)
    assert files.scheduler["prediction_type"] == expected
    assert files.configs["unet"]["sample_size"] == {"SD1": 64, "SDXL": 128}.get(
        kind, 64 if expected == "epsilon" else 96
    )
    said = capsys.readouterr().err
    assert ("does not say what its UNet predicts" in said and "file.config" in said) == says
    assert said.count("\n") == int(says)


def test_markers_and_averages_are_known(tmp_path, capsys):
    ema = {"model_ema.decay": np.zeros(1, np.float32), "model_ema.diffusion_modelout2bias": np.zeros(4, np.float32)}
    markers = {"v_pred": np.zeros(0, np.float32), "ztsnr": np.zeros(0, np.float32)}
    files = open_single_file(write(tmp_path / "a.safetensors", {**zeros("SDXL"), **markers, **ema}))
    assert files.scheduler["rescale_betas_zero_snr"] is True
    files.weights("unet", files.network("unet", jnp.float32)[1])
    assert "averaged weights" in capsys.readouterr().err
    unknown = write(tmp_path / "b.safetensors", zeros("SD1"), {"modelspec.prediction_type": "flow"})
    assert "'flow'" in sentence(open_single_file, unknown)


def test_a_config_folder_comes_first(tmp_path, capsys):
    path = write(tmp_path / "file.safetensors", zeros("SD2"))
    folder = config_folder(path)
    (folder / "scheduler").mkdir(parents=True)
    fields = published.CONFIGS["SCHEDULER_SD21"] | {"prediction_type": "epsilon", "steps_offset": 0}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(fields))
    files = open_single_file(path)
    assert files.scheduler == fields and files.configs["unet"]["sample_size"] == 64
    said = capsys.readouterr().err
    assert str(folder) in said and "does not say" not in said
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    assert str(folder / "model_index.json") in sentence(open_single_file, path)


def test_sizes_that_tell_no_heads_are_refused_with_what_to_do(tmp_path):
    emoji = tmp_path / "emoji.safetensors"
    write_checkpoint(emoji, open_pipeline("emoji:model"), {}, dtype=np.float16)
    alone = tmp_path / "alone.safetensors"
    alone.symlink_to(emoji)
    said = sentence(read_pipeline, alone)
    assert "channels" in said and str(config_folder(alone)) in said


# ---------------------------------------------------------------------------------------------------------- tokenizers
@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """An empty cache of the hub, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "home" / "hub"


@pytest.mark.parametrize(
    "kind, names",
    [
        ("SD1", ["stable-diffusion-v1-5/stable-diffusion-v1-5@451f4fe16113bff5a5d2269ed5ad43b0592e9a14/tokenizer"]),
        ("SD2", ["stabilityai/stable-diffusion-xl-base-1.0@462165984030d82259a11f4367a4eed129e94a7b/tokenizer_2"]),
        (
            "SDXL",
            [
                f"stabilityai/stable-diffusion-xl-base-1.0@462165984030d82259a11f4367a4eed129e94a7b/{name}"
                for name in ("tokenizer", "tokenizer_2")
            ],
        ),
    ],
)
def test_tokenizers_are_those_of_the_published_pipelines(tmp_path, empty_cache, kind, names):
    path = write(tmp_path / "file.safetensors", zeros(kind))
    config = tiny.get_config()
    config.model = str(path)
    found = [artifact for artifact in artifacts_of(config) if artifact.key == "model"]
    assert [artifact.name for artifact in found] == [str(path), *names]
    stocks = take_stock(config)
    assert [str(stock.remote) for stock in stocks] == names and not any(stock.complete for stock in stocks)
    said = sentence(read_pipeline, path)
    assert names[0] in said and "hf download" in said
    assert f"{names[0].rpartition('/')[2]}/*.json" in said and "safetensors" not in said.partition("`hf ")[2]
    repository, _, commit = names[0].rpartition("/")[0].partition("@")
    snapshot = empty_cache / f"models--{repository.replace('/', '--')}" / "snapshots" / commit
    for name in names:
        (snapshot / name.rpartition("/")[2]).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name.rpartition("/")[2]).symlink_to(local("emoji:model/tokenizer"))
    pipeline = read_pipeline(path)
    assert pipeline.tokenizer("a fox").input_ids and (pipeline.tokenizer_2 is None) == (kind != "SDXL")


def test_a_text_encoder_of_another_vocabulary_needs_its_tokenizer(tmp_path):
    key = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    path = write(tmp_path / "file.safetensors", {**zeros("SD1"), key: np.zeros((50_000, 64), np.float16)})
    said = sentence(read_pipeline, path)
    assert "50000 tokens" in said and str(config_folder(path) / "tokenizer") in said


# ------------------------------------------------------------------------------------------------------------- writing
@pytest.mark.parametrize("kind", ["SD1", "SD2", "SDXL"])
def test_of_a_published_kind_the_file_alone_is_written(tmp_path, kind):
    source, out = write(tmp_path / "a.safetensors", zeros(kind)), tmp_path / "b.safetensors"
    assert write_checkpoint(out, open_pipeline(source), {}, dtype=np.float16) is None
    assert set(safetensors.numpy.load_file(out)) == {*zeros(kind), *(["v_pred"] if kind == "SD2" else [])}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
    again = open_single_file(out)
    assert again.scheduler == open_single_file(source).scheduler and again.configs == open_single_file(source).configs


def test_values_beyond_float16_and_not_finite_are_refused_by_name(tmp_path):
    params = read_pipeline(small_pipeline()).params["unet"]
    out, files = tmp_path / "out.safetensors", open_pipeline(small_pipeline())
    for value, words in ((1e5, ["float16", "--dtype=bfloat16 or float32"]), (np.nan, ["not finite"])):
        bad = {**params, "conv_in": {**params["conv_in"], "bias": np.full(64, value, np.float32)}}
        said = sentence(write_checkpoint, out, files, {"unet": lambda bad=bad: bad}, dtype=np.float16)
        assert "model.diffusion_model.input_blocks.0.0.bias" in said and all(word in said for word in words)
        assert list(tmp_path.iterdir()) == []
    write_checkpoint(out, files, {"unet": lambda: params}, dtype=jnp.bfloat16)
    said = sentence(write_checkpoint, out, files, {"unet": lambda: pytest.fail("read")}, dtype=np.float16)
    assert str(config_folder(out)) in said


def test_a_pipeline_of_another_kind_is_refused(tmp_path):
    for path in small_pipeline().iterdir():
        if path.name != "model_index.json":
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionInpaintPipeline"}')
    assert "only StableDiffusionPipeline and StableDiffusionXLPipeline" in sentence(open_pipeline, tmp_path)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    """A small pipeline in one file of float16, and what is read of it."""
    path = tmp_path_factory.mktemp("one") / "small.safetensors"
    write_checkpoint(path, open_pipeline(small_pipeline()), {}, dtype=np.float16)
    return path, read_pipeline(path)


def test_a_folder_can_be_made_of_a_file_and_the_other_way_round(tmp_path, small_file):
    path, pipeline = small_file
    folder, again = tmp_path / "model", tmp_path / "again.safetensors"
    write_pipeline(folder, path, pipeline.params["unet"], dtype=np.float16)
    chex.assert_trees_all_equal(read_pipeline(folder).params, pipeline.params)
    write_checkpoint(again, open_pipeline(folder), {}, dtype=np.float16)
    assert safetensors.numpy.load_file(again).keys() == safetensors.numpy.load_file(path).keys()
    chex.assert_trees_all_equal(read_pipeline(again).params, pipeline.params)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.config", "again.safetensors", "model"]


def test_training_the_whole_unet_of_a_file_leaves_a_folder(tmp_path, small_file):
    _, pipeline = small_file
    write_result(tmp_path, pipeline, {"params": pipeline.params["unet"]})
    found = read_pipeline(tmp_path / "model")
    chex.assert_trees_all_equal(found.params, pipeline.params)
    assert found.unet == pipeline.unet and found.image_size == pipeline.image_size


def test_a_plan_takes_a_file(small_file):
    path, pipeline = small_file
    place = lambda names, shape: None  # noqa: E731
    planned = Shapes(place, jnp.float32).pipeline(Base(str(path)), None, None, remat=False)
    assert planned.unet == pipeline.unet
    chex.assert_trees_all_equal_shapes(planned.params, pipeline.params)
