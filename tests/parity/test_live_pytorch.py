"""Random tiny models built by diffusers and transformers, saved, read by our reader, compared layer by layer."""

import re

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

from spo_jax.checkpoints.names import torch_key
from spo_jax.checkpoints.pipeline import clip_shapes, read_clip, read_text_encoder, read_unet, read_vae
from spo_jax.models import CLIPModel as OurCLIPModel

UNETS = {
    "sd15": dict(block_out_channels=(16, 32), attention_head_dim=4, cross_attention_dim=24),
    "sd21": dict(
        block_out_channels=(16, 32, 48),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(2, 4, 6),
        cross_attention_dim=40,
        use_linear_projection=True,
    ),
    "deep": dict(
        block_out_channels=(24, 48),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(3, 6),
        cross_attention_dim=16,
        transformer_layers_per_block=(1, 2),
        layers_per_block=1,
        flip_sin_to_cos=False,
        freq_shift=1,
    ),
}
SD15_BLOCKS = dict(
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")
)
VAES = {
    "two levels": dict(block_out_channels=(16, 32), layers_per_block=1),
    "three levels": dict(block_out_channels=(8, 16, 24), layers_per_block=2, latent_channels=3),
    "no quant": dict(block_out_channels=(16,), layers_per_block=1, use_quant_conv=False, use_post_quant_conv=False),
}
TEXT = dict(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
TEXTS = {
    "quick_gelu": dict(TEXT, hidden_act="quick_gelu", max_position_embeddings=12, eos_token_id=59, bos_token_id=58),
    "legacy eos": dict(TEXT, hidden_act="gelu", max_position_embeddings=9, eos_token_id=2, bos_token_id=0),
}


def randomize(module, seed):
    """Random values for every parameter, so that no scale is 1 and no bias 0; returns the module in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            spread = 0.3 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread + (parameter.ndim < 2) * 0.5)
    return module.eval()


def torch_layers(module, *args, **kwargs):
    """Output of the module and of each of its parts, by name, as NumPy arrays."""
    outputs, handles = {}, []

    def hook(name):
        def record(_module, _inputs, output):
            if isinstance(output, torch.Tensor):
                outputs[name] = output.numpy()

        return record

    for name, part in module.named_modules():
        handles.append(part.register_forward_hook(hook(name)))
    with torch.no_grad():
        result = module(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return result, outputs


def compare_layers(ours, theirs, least):
    """Each captured layer of ours with the layer of the same name; at least ``least`` of them must be found."""
    compared = 0
    for path, (value, *_) in flax.traverse_util.flatten_dict(ours).items():
        name = torch_key((*path[:-1], "")).removesuffix(".")
        if name not in theirs or not isinstance(value, jax.Array):
            continue
        expected = theirs[name]
        if expected.ndim == 4:
            expected = expected.transpose(0, 2, 3, 1)
        if expected.shape != value.shape:
            continue
        scale = max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-5 * scale, err_msg=name)
        compared += 1
    assert compared >= least, f"only {compared} layers were compared"


def first_weight_agrees(params, state_dict):
    """One weight, before any forward pass."""
    path, value = next(iter(flax.traverse_util.flatten_dict(params).items()))
    key = torch_key(path)
    np.testing.assert_array_equal(np.sort(np.ravel(value)), np.sort(state_dict[key].numpy().ravel()))


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def nhwc(array):
    return jnp.asarray(array.transpose(0, 2, 3, 1))


@pytest.mark.parametrize("name", UNETS)
def test_unet(name, tmp_path):
    config = SD15_BLOCKS | UNETS[name]
    theirs = randomize(UNet2DConditionModel(sample_size=8, norm_num_groups=8, **config), seed=1)
    theirs.save_pretrained(tmp_path)
    unet, params = read_unet(tmp_path)
    first_weight_agrees(params, theirs.state_dict())
    size = 2 ** (len(config["block_out_channels"]) - 1)
    x, t = random(2, 2, 4, 4 * size, 2 * size), np.array([3, 801])
    context = random(3, 2, 5, config["cross_attention_dim"])
    result, layers = torch_layers(theirs, *map(torch.from_numpy, (x, t, context)))
    ours, captured = unet.apply(
        {"params": params}, nhwc(x), jnp.asarray(t), jnp.asarray(context), capture_intermediates=True
    )
    compare_layers(captured["intermediates"], layers, least=80)
    scale = max(1.0, np.abs(result.sample).max())
    np.testing.assert_allclose(ours, nhwc(result.sample.numpy()), rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("name", VAES)
def test_autoencoder(name, tmp_path):
    levels = len(VAES[name]["block_out_channels"])
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels)
    theirs = randomize(AutoencoderKL(norm_num_groups=8, sample_size=16, **blocks, **VAES[name]), seed=1)
    theirs.save_pretrained(tmp_path)
    vae, params = read_vae(tmp_path)
    first_weight_agrees(params, theirs.state_dict())
    images = random(2, 2, 3, 16, 8)
    result, layers = torch_layers(theirs, torch.from_numpy(images))
    ours, captured = vae.apply({"params": params}, nhwc(images), capture_intermediates=True)
    compare_layers(captured["intermediates"], layers, least=20)
    scale = max(1.0, np.abs(result.sample).max())
    np.testing.assert_allclose(ours, nhwc(result.sample.numpy()), rtol=0, atol=1e-4 * scale)
    with torch.no_grad():
        posterior = theirs.encode(torch.from_numpy(images)).latent_dist
    mean, log_variance = vae.apply({"params": params}, nhwc(images), method=vae.encode)
    np.testing.assert_allclose(mean, nhwc(posterior.mean.numpy()), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(log_variance, nhwc(posterior.logvar.numpy()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TEXTS)
def test_text_encoder(name, tmp_path):
    config = TEXTS[name]
    theirs = randomize(CLIPTextModel(CLIPTextConfig(**config)), seed=1)
    theirs.save_pretrained(tmp_path)
    model, params = read_text_encoder(tmp_path)
    tokens = np.random.default_rng(4).integers(3, 58, (3, 7))
    tokens[:, 5] = 59
    result, layers = torch_layers(theirs, torch.from_numpy(tokens), output_hidden_states=True)
    layers = {re.sub(r"^(?!text_model\.)", "text_model.", k): v for k, v in layers.items()}
    ours, captured = model.apply({"params": params}, jnp.asarray(tokens), capture_intermediates=True)
    compare_layers(captured["intermediates"], layers, least=30)
    np.testing.assert_allclose(ours.last_hidden_state, result.last_hidden_state.numpy(), rtol=0, atol=1e-4)
    np.testing.assert_allclose(ours.penultimate_hidden_state, result.hidden_states[-2].numpy(), rtol=0, atol=1e-4)
    np.testing.assert_allclose(ours.pooled, result.pooler_output.numpy(), rtol=0, atol=1e-4)


@pytest.fixture
def plain_clip(tmp_path):
    vision = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
    vision |= dict(image_size=20, patch_size=5, hidden_act="gelu")
    config = CLIPConfig(text_config=TEXTS["quick_gelu"], vision_config=vision, projection_dim=16)
    model = randomize(CLIPModel(config), seed=1)
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
    model.save_pretrained(tmp_path)
    return model, tmp_path


def test_clip(plain_clip):
    theirs, folder = plain_clip
    clip, params = read_clip(folder, step_aware=False)
    pixels, tokens = random(5, 3, 3, 20, 20), np.random.default_rng(6).integers(3, 58, (3, 7))
    tokens[:, 6] = 59
    inputs = dict(pixel_values=torch.from_numpy(pixels), input_ids=torch.from_numpy(tokens))
    result, layers = torch_layers(theirs, **inputs)
    (image, text, scale), captured = clip.apply(
        {"params": params}, nhwc(pixels), jnp.asarray(tokens), capture_intermediates=True
    )
    compare_layers(captured["intermediates"], layers, least=40)
    np.testing.assert_allclose(image, result.image_embeds.numpy(), rtol=0, atol=1e-4)
    np.testing.assert_allclose(text, result.text_embeds.numpy(), rtol=0, atol=1e-4)
    np.testing.assert_allclose(scale * image @ text.T, result.logits_per_image.numpy(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("timestep", [0, 1, 500, 999])
def test_fresh_time_layers_are_the_identity(plain_clip, timestep):
    """A step-aware CLIP that starts from a plain one gives its features at every timestep."""
    _, folder = plain_clip
    clip, params = read_clip(folder, step_aware=False)
    step_aware = OurCLIPModel(
        **{f: getattr(clip, f) for f in ("text_config", "vision_config", "projection_dim")}, step_aware=True
    )
    pixels = nhwc(random(7, 2, 3, 20, 20))
    times = jnp.full(2, timestep)
    fresh = step_aware.init(jax.random.key(0), pixels, jnp.zeros((2, 7), jnp.int32), times)["params"]
    flat = flax.traverse_util.flatten_dict(fresh) | flax.traverse_util.flatten_dict(params)
    merged = flax.traverse_util.unflatten_dict(flat)
    assert jax.tree.structure(merged) == jax.tree.structure(clip_shapes(step_aware))
    ours = step_aware.apply({"params": merged}, pixels, times, method=step_aware.image_features)
    plain = clip.apply({"params": params}, pixels, method=clip.image_features)
    np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-5)
