"""A random tiny SDXL pipeline, saved by diffusers: the same embeddings, the same picture, and one batch of training."""

import dataclasses
import json
import math
import re
import shutil

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from configs import sdxl, spm_sdxl
from configs.tiny import get_config
from spo_jax.data.builder import write_split
from spo_jax.diffusion.schedule import make_schedule
from spo_jax.distributed.mesh import make_mesh
from spo_jax.errors import UserError
from spo_jax.formats.hub import local
from spo_jax.formats.lora import read_lora
from spo_jax.formats.lora_write import write_kohya, write_lora
from spo_jax.formats.pipeline import read_clip, read_pipeline, read_unet, with_image_size
from spo_jax.formats.write_pipeline import write_pipeline
from spo_jax.methods import train
from spo_jax.models import CLIPTextModel as OurCLIPTextModel
from spo_jax.models.lora import merge_lora
from spo_jax.runs.held_out import encode_texts
from spo_jax.runs.load import Weights
from spo_jax.runs.metrics import read_metrics
from spo_jax.sampling.encode import encode_prompts, make_encode, shard_prompts
from spo_jax.sampling.generate import SamplingOptions, make_generate
from spo_jax.spo.assemble import assemble
from spo_jax.spo.steps import collect, draw, run_updates
from tests.lora_files import random_adapters
from tests.parity.test_live_pytorch import randomize
from tests.preference_data import record

PROMPTS = ["a red apple on a teal background", "a fox!"]
SCHEDULER = dict(
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
)


TWO_LEVELS = dict(
    block_out_channels=(16, 32),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=(2, 4),
    transformer_layers_per_block=(1, 2),
)
ONE_LEVEL = dict(
    block_out_channels=(16,),
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
    attention_head_dim=(2,),
    transformer_layers_per_block=(2,),
)


def save_pipeline(folder, levels):
    """A random pipeline with a UNet of such levels; returns that of diffusers and the folder."""
    text = dict(
        vocab_size=1101, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=16, bos_token_id=1099
    )
    first = CLIPTextConfig(hidden_size=32, intermediate_size=48, hidden_act="quick_gelu", eos_token_id=2, **text)
    second = CLIPTextConfig(
        hidden_size=24, intermediate_size=40, hidden_act="gelu", eos_token_id=2, projection_dim=20, **text
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=56,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=20 + 6 * 8,
        **levels,
    )
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    vae = AutoencoderKL(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, scaling_factor=0.13025, **blocks
    )
    tokenizer = local("emoji:model/tokenizer")
    pipeline = StableDiffusionXLPipeline(
        vae=randomize(vae, 1),
        text_encoder=randomize(CLIPTextModel(first), 2),
        text_encoder_2=randomize(CLIPTextModelWithProjection(second), 3),
        tokenizer=CLIPTokenizer.from_pretrained(tokenizer),
        tokenizer_2=CLIPTokenizer.from_pretrained(tokenizer, pad_token="!"),  # as SDXL's
        unet=randomize(unet, 4),
        scheduler=DDIMScheduler(**SCHEDULER),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline, folder


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("sdxl"), TWO_LEVELS)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The folder of a pipeline for runs that would mostly wait for their programs to be compiled."""
    return save_pipeline(tmp_path_factory.mktemp("small"), ONE_LEVEL)[1]


@pytest.fixture(scope="module")
def ours(theirs):
    return read_pipeline(theirs[1])


@pytest.mark.parametrize("negative_prompt", ["", "blue! things"])
def test_embeddings_are_those_of_diffusers(theirs, ours, negative_prompt):
    with torch.no_grad():
        expected = theirs[0].encode_prompt(PROMPTS, negative_prompt=negative_prompt or None)
    batch = encode_prompts(make_encode(ours, scorer=None), ours.params, ours, None, PROMPTS, negative_prompt)
    values = (batch.embeddings, batch.negative_embeddings, batch.added.pooled, batch.negative_added.pooled)
    for value, tensor in zip(values, expected, strict=True):
        np.testing.assert_allclose(value, tensor[: len(value)].numpy(), rtol=0, atol=1e-4)
    assert (batch.negative_embeddings == 0).all() == (negative_prompt == "")
    for added, count in ((batch.added, 2), (batch.negative_added, 1)):
        np.testing.assert_array_equal(added.time_ids, [[16, 16, 0, 0, 16, 16]] * count)


@pytest.mark.parametrize("height, width", [(16, 16), (24, 8)])
def test_picture_is_that_of_diffusers(theirs, ours, height, width):
    """Also of other sizes than the UNet's own, which its time ids then tell it."""
    check_pictures(theirs[0], with_image_size(ours, height, width), height, width)


@pytest.mark.parametrize("form", ["diffusers", "kohya", "pipeline"])
def test_adapters_of_all_layers_make_the_same_picture_in_diffusers(theirs, ours, tmp_path, form):
    """As LoRA files that diffusers loads, and merged into a folder that diffusers loads."""
    lora = random_adapters(ours.params)
    assert set(lora) == {"unet", "text_encoder", "text_encoder_2"}
    folder, file = theirs[1], tmp_path / "lora.safetensors"
    if form == "pipeline":
        folder = tmp_path / "merged"
        unet, *encoders = ({part: merge_lora(ours.params[part], lora[part])} for part in lora)
        write_pipeline(folder, theirs[1], unet["unet"], text_encoders=encoders[0] | encoders[1])
    tuned = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True, add_watermarker=False)
    tuned.set_progress_bar_config(disable=True)
    if form != "pipeline":
        if form == "kohya":
            write_kohya(file, lora, ours.params["unet"])
        else:
            write_lora(file, lora)
        tuned.load_lora_weights(str(tmp_path), weight_name=file.name)
    with_adapters = check_pictures(tuned, ours, 16, 16, lora)
    assert np.abs(with_adapters - check_pictures(theirs[0], ours, 16, 16)).max() > 0.02, "the adapters should show"


def check_pictures(theirs, pipeline, height, width, lora=None):
    """Asserts that diffusers' pipeline and ours make the same pictures from the same latents; returns them."""
    steps = 4
    assert pipeline.image_size == (height, width)
    variables = {"params": pipeline.params["unet"]} | ({} if lora is None else {"lora": lora["unet"]})
    latents = np.random.default_rng(0).standard_normal((2, *pipeline.latent_shape)).astype(np.float32)
    params = pipeline.params | {"lora": lora or {}}
    batch = encode_prompts(make_encode(pipeline, scorer=None), params, pipeline, None, PROMPTS)
    schedule = make_schedule(pipeline.scheduler_config, steps)
    generate = make_generate(pipeline, schedule, SamplingOptions(5.0))
    images = jax.jit(generate)(pipeline.params, variables, batch, jnp.asarray(latents))
    expected = theirs(
        PROMPTS,
        height=height,
        width=width,
        latents=torch.from_numpy(latents.transpose(0, 3, 1, 2).copy()),
        num_inference_steps=steps,
        guidance_scale=5.0,
        output_type="np",
    ).images
    assert images.shape == (2, height, width, 3)
    np.testing.assert_allclose(np.clip(images / 2 + 0.5, 0, 1), expected, rtol=0, atol=1e-3)
    assert expected.std() > 0.05
    return expected


def test_one_batch_of_training_with_inner_steps(small):
    """On eight devices: segments of 2, 2 and 1 steps, pictures that are not square, both text encoders."""
    config = get_config()
    config.prompts_per_batch, config.train.minibatch_size, config.pairs.threshold = 8, 24, 0.0
    sizes = dict(num_steps=6, num_plain_steps=1, num_candidates=2, num_inner_steps=1, height=16, width=24)
    config.sampling.update(sizes)
    config.model, config.scorer.fn = str(small), "tests.scorers:brightness"
    config.evaluation.metrics, config.lora.rank = ("colorfulness",), 2
    spo = assemble(config, make_mesh(-1, 1), Weights)
    prompts = shard_prompts(encode_texts(spo, PROMPTS * 4), spo.mesh)
    assert len(prompts.added.pooled.sharding.device_set) == 8

    rollout, num_valid = collect(spo, draw(spo, spo.state, prompts, jax.random.key(2)), prompts, jax.random.key(2))
    pairs, order = rollout.pairs, rollout.order
    assert pairs.win.shape == pairs.lose_latents.shape == (5, 8, 8, 12, 4)
    assert num_valid == order.shape[0] == 5 * 8
    shared = (pairs.latents == pairs.lose_latents).all((2, 3, 4))
    np.testing.assert_array_equal(shared, np.array([True, False, True, False, True])[:, None].repeat(8, axis=1))

    before = jax.device_get(spo.state.trained)
    state, updates = run_updates(spo, spo.state, prompts, rollout, num_valid)
    assert [int(u.num_pairs) for u in updates] == [24, 16]
    np.testing.assert_allclose(updates[0].sums.loss / 24, math.log(2), rtol=1e-5)
    np.testing.assert_allclose([updates[0].sums.win_ratio, updates[0].sums.lose_ratio], 24, rtol=1e-5)
    assert all(np.isfinite(u.grad_norm) and u.grad_norm > 0 for u in updates)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, jax.device_get(state.trained))
    assert all(leaf > 0 for leaf in jax.tree.leaves(moved))


def test_the_recipe_runs_from_prompts_to_adapters_and_report(small, tmp_path):
    """``configs/sdxl.py`` as the command runs it, with small models in the real layouts."""
    (tmp_path / "prompts.json").write_text(json.dumps([{"caption": prompt} for prompt in PROMPTS]), encoding="utf-8")
    config = sdxl.get_config()
    config.model, config.vae, config.dtype = str(small), str(small / "vae"), "float32"
    config.prompts = config.evaluation.prompts = str(tmp_path / "prompts.json")
    config.scorer.path, config.evaluation.judge = "emoji:model/scorer", "emoji:model/clip"
    config.num_batches, config.sampling.num_steps, config.pairs.threshold = 1, 7, 0.0
    config.lora.rank, config.evaluation.batch_size, config.validation.every = 2, 2, 0
    workdir = tmp_path / "w"
    summary = train(config, workdir)
    (row,) = read_metrics(workdir / "metrics.jsonl")
    assert row["num_pairs"] == 3 * 8 and row["num_updates"] == 3, "one segment of three steps for each prompt"
    assert np.isfinite(row["loss"]) and row["grad_norm"] > 0
    assert summary["num_prompts"] == 2 and (workdir / "report.html").is_file()
    lora = read_lora(workdir, {"unet": read_unet(small / "unet")[1]})["unet"]
    assert any(np.abs(x).max() > 0 for path, x in flax.traverse_util.flatten_dict(lora).items() if path[-1] == "B")


def test_the_recipe_of_its_preference_model_runs_from_pairs_to_the_model(small, tmp_path):
    """``configs/spm_sdxl.py``: guided prediction by two text encoders with time ids, labels of a labeller."""
    write_split(tmp_path / "data", "train", [record(i) for i in range(12)])
    write_split(tmp_path / "data", "validation_unique", [record(i) for i in range(12, 20)])
    config = spm_sdxl.get_config()
    config.model, config.vae, config.dtype = str(small), str(small / "vae"), "float32"
    config.scorer.init = config.labels.judge = config.validation.plain = "emoji:model/clip"
    config.mesh.data, config.mesh.fsdp = -1, 1
    config.data.train, config.data.validation = (f"{tmp_path / 'data'}@{s}" for s in ("train", "validation_unique"))
    config.num_steps, config.train.warmup_steps, config.log_every, config.data.num_workers = 2, 1, 1, 0
    config.train.batch_size, config.validation.batch_size = 8, 8
    config.checkpoint.every = config.validation.every = 2
    summary = train(config, tmp_path / "w")
    rows = read_metrics(tmp_path / "w" / "metrics.jsonl")
    assert all(np.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    # Of the eight records six have a preference of people, whose labels validation keeps.
    assert summary["records"]["used"] == 16 and list(summary["accuracy"]["best"]) == ["0", "251", "501", "701", "951"]
    assert read_clip(tmp_path / "w" / "best", step_aware=None)[0].step_aware


# ---------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize("size", [(16, 17), (1, 16), (0, None), (-4, 16)])
def test_size_that_does_not_fit_is_refused(ours, size):
    with pytest.raises(UserError, match="multiples of 2"):
        with_image_size(ours, *size)


def change_json(file, change):
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | change), encoding="utf-8")


@pytest.mark.parametrize(
    "file, change, word",
    [
        ("model_index.json", {"_class_name": "StableDiffusionXLInpaintPipeline"}, "StableDiffusionXLInpaintPipeline"),
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "cross_attention_dim"),
        ("unet/config.json", {"addition_embed_type": "image"}, "addition_embed_type"),
        ("unet/config.json", {"addition_time_embed_dim": None}, "addition_time_embed_dim"),
        ("text_encoder_2/config.json", {"projection_dim": 21}, "pooled width of 21"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(theirs, tmp_path, file, change, word):
    folder = tmp_path / "changed"
    shutil.copytree(theirs[1], folder)
    change_json(folder / file, change)
    with pytest.raises(UserError, match=re.escape(str(folder))) as caught:
        read_pipeline(folder)
    assert word in str(caught.value)


def test_text_encoders_in_the_wrong_order_are_refused(theirs, tmp_path):
    folder = tmp_path / "swapped"
    shutil.copytree(theirs[1], folder)
    (folder / "text_encoder_2").rename(folder / "other")
    (folder / "text_encoder").rename(folder / "text_encoder_2")
    (folder / "other").rename(folder / "text_encoder")
    with pytest.raises(UserError, match=r"pooled width of 512.*asks for 20"):
        read_pipeline(folder)


def test_width_that_a_config_leaves_out_is_that_of_transformers():
    model = OurCLIPTextModel.from_config({"model_type": "clip_text_model"})
    assert (model.hidden_size, model.projection_dim) == (CLIPTextConfig().hidden_size, CLIPTextConfig().projection_dim)


def test_pipeline_is_read_whole(ours):
    names = {field.name for field in dataclasses.fields(ours)} - {"latent_size", "variant"}
    assert all(getattr(ours, name) is not None for name in names)
    assert set(ours.params) == {"unet", "vae", "text_encoder", "text_encoder_2"}
    assert ours.force_zeros_for_empty_prompt
