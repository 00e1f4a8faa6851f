"""Single files in the original layout, against what diffusers makes of them: names, shapes, values, whole pipelines."""

import functools

import chex
import diffusers
import flax.traverse_util
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
import transformers
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders import single_file_utils as theirs

from spo_jax.diffusion.schedule import FILE, make_schedule
from spo_jax.formats import original_configs
from spo_jax.formats.hub import local
from spo_jax.formats.names import torch_key, torch_shape
from spo_jax.formats.networks import network_shapes
from spo_jax.formats.original_layout import LAYOUTS, originals
from spo_jax.formats.pipeline import open_pipeline, read_pipeline
from spo_jax.formats.single_file import config_folder
from spo_jax.formats.stored import StoredArray
from spo_jax.formats.write_checkpoint import write_checkpoint
from spo_jax.models import AutoencoderKL as OurAutoencoderKL
from spo_jax.models import CLIPTextModel, CLIPTextModelWithProjection, published
from spo_jax.models import UNet2DConditionModel as OurUNet
from tests.parity.test_live_pytorch import randomize

KINDS = ("SD1", "SD2", "SDXL")
REPOSITORIES = dict(zip(KINDS, published.PIPELINES, strict=True))
MODELS = {
    "unet": OurUNet,
    "vae": OurAutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}
BUFFERS = ("betas", "alphas_cumprod", "model_ema.num_updates", "model_ema.diffusion_modelinput_blocks00weight")


@functools.cache
def real_size(kind):
    """Shapes of a kind of model of real size: by part and our PyTorch key, and in a single file by its keys."""
    parts, single = {}, {}
    for part in LAYOUTS[kind]:
        shapes = network_shapes(MODELS[part].from_config(published.PIPELINES[REPOSITORIES[kind]][part]))
        flat = flax.traverse_util.flatten_dict(shapes)
        parts[part] = {torch_key(path): torch_shape(path, leaf.shape) for path, leaf in flat.items()}
        for path, original in originals(kind, part, shapes).items():
            single[original.key] = original.shape(torch_shape(path, flat[path].shape))
    return parts, single


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_finds_every_key_and_shape_of_a_real_model(kind):
    parts, single = real_size(kind)
    checkpoint = {key: torch.empty(shape, device="meta") for key, shape in single.items()}
    configs = published.PIPELINES[REPOSITORIES[kind]]
    found = {
        "unet": theirs.convert_ldm_unet_checkpoint(dict(checkpoint), configs["unet"]),
        "vae": theirs.convert_ldm_vae_checkpoint(dict(checkpoint), configs["vae"]),
    }
    for part in set(parts) - {"unet", "vae"}:
        whose, prefix = LAYOUTS[kind][part]
        if whose == "clip":
            found[part] = theirs.convert_ldm_clip_checkpoint(dict(checkpoint))
        else:
            with torch.device("meta"):
                model = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**configs[part]))
            found[part] = theirs.convert_open_clip_checkpoint(model, dict(checkpoint), prefix=prefix)
    for part, expected in parts.items():
        assert {key: tuple(value.shape) for key, value in found[part].items()} == expected, part
    assert theirs.infer_diffusers_model_type(checkpoint) == {"SD1": "v1", "SD2": "v2", "SDXL": "xl_base"}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_configs_of_a_real_model_are_the_published_ones(kind, tmp_path):
    path = tmp_path / "real.safetensors"
    arrays = {key: StoredArray(path, 0, np.dtype(np.float16), shape) for key, shape in real_size(kind)[1].items()}
    for part, build in MODELS.items():
        if part in LAYOUTS[kind]:
            config = original_configs.part_config(path, kind, part, arrays)
            assert build.from_config(config) == build.from_config(published.PIPELINES[REPOSITORIES[kind]][part])


# ------------------------------------------------------------------------------------------------------ small models
TEXT = dict(
    vocab_size=1101,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=1,
    max_position_embeddings=16,
    bos_token_id=1099,
    eos_token_id=1100,
    projection_dim=64,
)
UNETS = {
    "SD1": dict(attention_head_dim=8, block_out_channels=(32, 64), cross_attention_dim=64),
    "SD2": dict(
        attention_head_dim=(1, 2), block_out_channels=(64, 128), use_linear_projection=True, cross_attention_dim=64
    ),
    "SDXL": dict(
        attention_head_dim=(1, 2),
        block_out_channels=(64, 128),
        use_linear_projection=True,
        cross_attention_dim=192,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=64 + 6 * 256,
    ),
}
TYPES = {
    "SD1": (("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")),
    "SD2": (("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")),
    "SDXL": (("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")),
}
SAMPLE_SIZES = {"SD1": 64, "SD2": 96, "SDXL": 128}


def save_pipeline(kind, folder):
    """A random small pipeline of a kind, whose configs can be told from sizes; saved by diffusers, float32."""
    config = published.PIPELINES[REPOSITORIES[kind]]
    down, up = TYPES[kind]
    unet = UNet2DConditionModel(
        layers_per_block=1,
        down_block_types=down,
        up_block_types=up,
        sample_size=SAMPLE_SIZES[kind],
        **UNETS[kind],
    )
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    factor = config["vae"].get("scaling_factor", 0.18215)
    vae = AutoencoderKL(block_out_channels=(32, 64), layers_per_block=1, scaling_factor=factor, **blocks)
    activation = "gelu" if kind == "SD2" else "quick_gelu"
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(hidden_act=activation, **TEXT))
    tokenizer = transformers.CLIPTokenizer.from_pretrained(local("emoji:model/tokenizer"))
    parts = dict(
        vae=randomize(vae, 1),
        text_encoder=randomize(text, 2),
        tokenizer=tokenizer,
        unet=randomize(unet, 4),
        scheduler=getattr(diffusers, config["scheduler"]["_class_name"]).from_config(config["scheduler"]),
    )
    if kind == "SDXL":
        # Of another width than the first one: by that diffusers tells them apart.
        second = transformers.CLIPTextConfig(
            hidden_act="gelu", **TEXT | {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 3}
        )
        parts["text_encoder_2"] = randomize(transformers.CLIPTextModelWithProjection(second), 3)
        pipeline = StableDiffusionXLPipeline(tokenizer_2=tokenizer, add_watermarker=False, **parts)
    else:
        pipeline = StableDiffusionPipeline(
            safety_checker=None, feature_extractor=None, requires_safety_checker=False, **parts
        )
    pipeline.save_pretrained(folder)
    return pipeline


@pytest.fixture(scope="module", params=KINDS)
def small(request, tmp_path_factory):
    """The kind, diffusers' pipeline, its folder, and the single file that we write of it."""
    folder = tmp_path_factory.mktemp("small") / "model"
    pipeline = save_pipeline(request.param, folder)
    path = folder.with_name("small.safetensors")
    assert write_checkpoint(path, open_pipeline(folder), {}, dtype=np.float32) == config_folder(path), (
        "its tokenizer is not CLIP's"
    )
    return request.param, pipeline, folder, path


def test_diffusers_loads_what_we_write(small):
    kind, pipeline, folder, path = small
    build = StableDiffusionXLPipeline if kind == "SDXL" else StableDiffusionPipeline
    loaded = build.from_single_file(str(path), config=str(folder), local_files_only=True)
    for part in LAYOUTS[kind]:
        expected, found = (getattr(p, part).state_dict() for p in (pipeline, loaded))
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert torch.equal(found[key], value), (part, key)


def test_we_read_what_we_write(small):
    _, _, folder, path = small
    expected, found = read_pipeline(folder), read_pipeline(path)
    chex.assert_trees_all_equal(found.params, expected.params)
    assert found.unet == expected.unet and found.vae == expected.vae
    assert found.image_size == expected.image_size
    assert found.force_zeros_for_empty_prompt == expected.force_zeros_for_empty_prompt


def test_sizes_alone_tell_all_but_the_tokenizer(small, tmp_path):
    kind, _, folder, path = small
    alone = tmp_path / path.name
    alone.symlink_to(path)
    for name in ("tokenizer", "tokenizer_2"):
        if (folder / name).is_dir():
            config_folder(alone).mkdir(exist_ok=True)
            (config_folder(alone) / name).symlink_to(folder / name)
    expected, found = read_pipeline(folder), read_pipeline(alone)
    assert found.unet == expected.unet and found.vae.clone(sample_size=0) == expected.vae.clone(sample_size=0)
    tokens = np.array([[1099, 5, 6, 1100, 1100]])
    for part in set(LAYOUTS[kind]) - {"unet", "vae"}:
        ours, other = (getattr(p, part).apply({"params": p.params[part]}, tokens) for p in (found, expected))
        chex.assert_trees_all_equal(ours, other)
    schedules = (make_schedule({**p.scheduler_config, FILE: ""}, 20) for p in (found, expected))
    chex.assert_trees_all_equal(*schedules)


def test_header_says_what_the_file_is(small):
    kind, _, _, path = small
    with safetensors.safe_open(path, "pt") as file:
        metadata, keys = file.metadata(), set(file.keys())
    assert metadata["modelspec.sai_model_spec"] == "1.0.0" and metadata["modelspec.title"] == "small"
    architecture, predicted, size = {
        "SD1": ("stable-diffusion-v1", "epsilon", 128),
        "SD2": ("stable-diffusion-v2-768-v", "v", 192),
        "SDXL": ("stable-diffusion-xl-v1-base", "epsilon", 256),
    }[kind]
    assert metadata["modelspec.architecture"] == architecture and metadata["modelspec.prediction_type"] == predicted
    assert metadata["modelspec.resolution"] == f"{size}x{size}"
    assert ("v_pred" in keys) == (predicted == "v")


def test_what_old_and_other_programs_leave_in_a_file_is_left_out(small, tmp_path):
    kind, _, folder, path = small
    tensors = safetensors.torch.load_file(path)
    for key in BUFFERS:
        tensors[key] = torch.zeros(3)
    for _, prefix in LAYOUTS[kind].values():
        if prefix.endswith("transformer."):
            tensors[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(16)[None]
            tensors = {key.replace(f"{prefix}text_model.", prefix): value for key, value in tensors.items()}
    if kind == "SDXL":
        tensors["conditioner.embedders.1.model.logit_scale"] = torch.tensor(4.6)
        tensors["denoiser.sigmas"] = torch.ones(1000)
    if kind == "SD2":  # the last layer of OpenCLIP's, and what comes behind it
        prefix = LAYOUTS[kind]["text_encoder"][1]
        tensors[f"{prefix}transformer.resblocks.23.ln_1.weight"] = torch.ones(64)
        tensors |= {f"{prefix}text_projection": torch.ones(64, 64), f"{prefix}logit_scale": torch.tensor(4.6)}
    old = tmp_path / "old.ckpt"
    # Such files come with views that lie in one storage, and in any order of strides.
    tensors = {
        k: v.clone(memory_format=torch.channels_last) if v.ndim == 4 else v.t().clone().t() if v.ndim == 2 else v
        for k, v in tensors.items()
    }
    torch.save({"state_dict": tensors, "global_step": 7, "epoch": 1, "optimizer_states": [{"state": {0: {}}}]}, old)
    config_folder(old).symlink_to(config_folder(path))
    chex.assert_trees_all_equal(read_pipeline(old).params, read_pipeline(folder).params)
