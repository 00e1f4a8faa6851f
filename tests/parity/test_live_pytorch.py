"""Random tiny models built by diffusers and transformers, saved, read by our reader, compared layer by layer."""

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from spo_jax.formats.lora import read_lora
from spo_jax.formats.names import torch_key
from spo_jax.formats.networks import network_shapes
from spo_jax.formats.pipeline import read_clip, read_part, read_text_encoder, read_unet, read_vae
from spo_jax.models import CLIPModel as OurCLIPModel
from spo_jax.types import AddedConditions

UNETS = {
    "sd15": dict(block_out_channels=(16, 32), attention_head_dim=4, cross_attention_dim=24),
    "sd21": dict(
        block_out_channels=(16, 32, 48),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(2, 4, 6),
        cross_attention_dim=40,
        use_linear_projection=True,
        layers_per_block=1,
    ),
    "deep": dict(
        block_out_channels=(24, 48),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(3, 6),
        cross_attention_dim=16,
        transformer_layers_per_block=(1, 2),
        layers_per_block=(2, 1),
        norm_num_groups=4,
        norm_eps=1e-4,
        flip_sin_to_cos=False,
        freq_shift=1,
    ),
    "sdxl": dict(
        block_out_channels=(16, 32, 48),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4, 6),
        cross_attention_dim=56,
        transformer_layers_per_block=(1, 2, 3),
        layers_per_block=2,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=6,
        projection_class_embeddings_input_dim=20 + 6 * 6,
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
    """The module's result; and by name the channels-last output of each of its parts, with those that have weights."""
    outputs, handles, weighted = {}, [], set()

    def hook(name):
        def record(part, _inputs, output):
            if isinstance(output, torch.Tensor):
                channels_first = output.ndim == 4 or isinstance(part, torch.nn.GroupNorm)
                outputs[name] = np.moveaxis(output.numpy(), 1, -1) if channels_first else output.numpy()
                if next(part.parameters(recurse=False), None) is not None:
                    weighted.add(name)

        return record

    for name, part in module.named_modules():
        handles.append(part.register_forward_hook(hook(name)))
    with torch.no_grad():
        result = module(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return result, (outputs, weighted)


def inside(layers, prefix):
    """``layers`` of transformers 5, whose text encoder has dropped the ``prefix`` that all its checkpoints have."""
    outputs, weighted = layers
    return {prefix + name: value for name, value in outputs.items()}, {prefix + name for name in weighted}


def compare_layers(ours, layers):
    """Each captured layer of ours with the layer of the same name; every layer that has weights must be among them."""
    theirs, weighted = layers
    compared = set()
    for path, (value, *_) in flax.traverse_util.flatten_dict(ours).items():
        name = torch_key((*path[:-1], "")).removesuffix(".")
        if name not in theirs or not isinstance(value, jax.Array):
            continue
        # Positions are flattened earlier or later, and position embeddings have no batch axis.
        expected = theirs[name].reshape(value.shape)
        scale = max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-5 * scale, err_msg=name)
        compared.add(name)
    assert len(weighted) > 10 and not weighted - compared, f"not compared: {sorted(weighted - compared)}"


def first_weight_agrees(params, state_dict):
    """One kernel, before any forward pass."""
    flat = flax.traverse_util.flatten_dict(params)
    path = next(p for p in flat if p[-1] == "kernel")
    key = next(k for k in state_dict if torch_key(path).endswith(k))
    theirs = state_dict[key].numpy()
    theirs = theirs.transpose(2, 3, 1, 0) if theirs.ndim == 4 else theirs.T
    np.testing.assert_array_equal(flat[path], theirs)


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def nhwc(array):
    return jnp.asarray(array.transpose(0, 2, 3, 1))


@pytest.mark.parametrize("name", UNETS)
def test_unet(name, tmp_path):
    config = SD15_BLOCKS | {"norm_num_groups": 8} | UNETS[name]
    theirs = randomize(UNet2DConditionModel(sample_size=8, **config), seed=1)
    theirs.save_pretrained(tmp_path)
    unet, params = read_unet(tmp_path)
    first_weight_agrees(params, theirs.state_dict())
    size = 2 ** (len(config["block_out_channels"]) - 1)
    x, t = random(2, 2, 4, 4 * size, 2 * size), np.array([3, 801])
    context = random(3, 2, 5, config["cross_attention_dim"])
    kwargs, added = {}, None
    if name == "sdxl":
        added = AddedConditions(random(4, 2, 20), np.array([[64, 32, 0, 8, 48, 96], [9, 8, 7, 6, 5, 4]], np.float32))
        added_kwargs = {"text_embeds": torch.from_numpy(added.pooled), "time_ids": torch.from_numpy(added.time_ids)}
        kwargs["added_cond_kwargs"] = added_kwargs
    result, layers = torch_layers(theirs, *map(torch.from_numpy, (x, t, context)), **kwargs)
    ours, captured = unet.apply(
        {"params": params}, nhwc(x), jnp.asarray(t), jnp.asarray(context), added, capture_intermediates=True
    )
    compare_layers(captured["intermediates"], layers)
    scale = max(1.0, np.abs(result.sample).max())
    np.testing.assert_allclose(ours, nhwc(result.sample.numpy()), rtol=0, atol=1e-4 * scale)


def test_unet_of_odd_sizes(tmp_path):
    """Each of the three levels has an odd side in one of them."""
    config = {"norm_num_groups": 8, "layers_per_block": 1, "attention_head_dim": 4, "cross_attention_dim": 12}
    config |= {"block_out_channels": (8, 16, 16), "down_block_types": ("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",)}
    config |= {"up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2}
    theirs = randomize(UNet2DConditionModel(sample_size=8, **config), seed=1)
    theirs.save_pretrained(tmp_path)
    unet, params = read_unet(tmp_path)
    apply, t, context = jax.jit(unet.apply), np.array([3, 801]), random(3, 2, 5, 12)
    for height, width in [(9, 4), (6, 7)]:
        x = random(2, 2, 4, height, width)
        with torch.no_grad():
            expected = nhwc(theirs(*map(torch.from_numpy, (x, t, context))).sample.numpy())
        ours = apply({"params": params}, nhwc(x), jnp.asarray(t), jnp.asarray(context))
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("with_config", [False, True])
def test_adapters_that_diffusers_saves_have_its_strength(tmp_path, with_config):
    """peft's alpha need not be the rank; diffusers keeps it in the file's header."""
    config = SD15_BLOCKS | {"norm_num_groups": 8, "layers_per_block": 1} | UNETS["sd15"]
    theirs = UNet2DConditionModel(sample_size=8, **config)
    theirs.save_pretrained(tmp_path)
    _, params = read_unet(tmp_path)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    theirs.add_adapter(LoraConfig(r=2, lora_alpha=6 if with_config else 2, target_modules=targets))
    randomize(theirs, seed=5)
    weights = convert_state_dict_to_diffusers(get_peft_model_state_dict(theirs))
    metadata = {"unet_lora_adapter_metadata": theirs.peft_config["default"].to_dict()} if with_config else {}
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=weights, **metadata)
    ours = flax.traverse_util.flatten_dict(read_lora(tmp_path, {"unet": params})["unet"])
    modules = {name: part for name, part in theirs.named_modules() if hasattr(part, "lora_A")}
    assert len(ours) == 2 * len(modules) > 0
    for path, value in ours.items():
        part = modules[torch_key((*path[:-1], "")).removesuffix(".")]
        assert part.scaling["default"] == (3 if with_config else 1)
        expected = getattr(part, f"lora_{path[-1]}")["default"].weight.detach().numpy().T
        expected = expected * np.float32(part.scaling["default"] if path[-1] == "B" else 1)
        np.testing.assert_array_equal(value, expected, err_msg=str(path))


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
    compare_layers(captured["intermediates"], layers)
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
    first_weight_agrees(params, theirs.state_dict())
    tokens = np.random.default_rng(4).integers(3, 58, (3, 7))
    tokens[:, 5] = 59
    result, layers = torch_layers(theirs, torch.from_numpy(tokens), output_hidden_states=True)
    ours, captured = model.apply({"params": params}, jnp.asarray(tokens), capture_intermediates=True)
    if not hasattr(theirs, "text_model"):
        layers = inside(layers, "text_model.")
    compare_layers(captured["intermediates"], layers)
    np.testing.assert_allclose(ours.last_hidden_state, result.last_hidden_state.numpy(), rtol=0, atol=1e-4)
    np.testing.assert_allclose(ours.penultimate_hidden_state, result.hidden_states[-2].numpy(), rtol=0, atol=1e-4)
    np.testing.assert_allclose(ours.pooled, result.pooler_output.numpy(), rtol=0, atol=1e-4)


def test_text_encoder_with_projection(tmp_path):
    theirs = randomize(CLIPTextModelWithProjection(CLIPTextConfig(projection_dim=20, **TEXTS["legacy eos"])), seed=1)
    theirs.save_pretrained(tmp_path)
    model, params = read_part("text_encoder_2", tmp_path)
    first_weight_agrees(params, theirs.state_dict())
    tokens = np.random.default_rng(4).integers(3, 58, (3, 7))
    tokens[:, 5:] = 59  # padded as Stable Diffusion does: the first end of text counts
    result, layers = torch_layers(theirs, torch.from_numpy(tokens), output_hidden_states=True)
    ours, captured = model.apply({"params": params}, jnp.asarray(tokens), capture_intermediates=True)
    compare_layers(captured["intermediates"], layers)
    np.testing.assert_allclose(ours.penultimate_hidden_state, result.hidden_states[-2].numpy(), rtol=0, atol=1e-4)
    np.testing.assert_allclose(ours.pooled, result.text_embeds.numpy(), rtol=0, atol=1e-4)


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
    first_weight_agrees(params, theirs.state_dict())
    pixels, tokens = random(5, 3, 3, 20, 20), np.random.default_rng(6).integers(3, 58, (3, 7))
    tokens[:, 6] = 59
    inputs = dict(pixel_values=torch.from_numpy(pixels), input_ids=torch.from_numpy(tokens))
    result, layers = torch_layers(theirs, **inputs)
    (image, text, scale), captured = clip.apply(
        {"params": params}, nhwc(pixels), jnp.asarray(tokens), capture_intermediates=True
    )
    compare_layers(captured["intermediates"], layers)
    np.testing.assert_allclose(image, result.image_embeds.numpy(), rtol=0, atol=1e-4)
    np.testing.assert_allclose(text, result.text_embeds.numpy(), rtol=0, atol=1e-4)
    np.testing.assert_allclose(scale * image @ text.T, result.logits_per_image.numpy(), rtol=0, atol=1e-3)


def test_fresh_time_layers_are_the_identity_at_every_timestep(plain_clip):
    """A step-aware CLIP that starts from a plain one gives its features, whatever the timestep."""
    _, folder = plain_clip
    clip, params = read_clip(folder, step_aware=False)
    step_aware = OurCLIPModel(
        **{f: getattr(clip, f) for f in ("text_config", "vision_config", "projection_dim")}, step_aware=True
    )
    pixels, first = nhwc(random(7, 2, 3, 20, 20)), jnp.zeros(2)
    fresh = step_aware.init(jax.random.key(0), pixels, first, method=step_aware.image_features)["params"]
    flat = flax.traverse_util.flatten_dict(fresh) | flax.traverse_util.flatten_dict(params)
    merged = flax.traverse_util.unflatten_dict(flat)
    assert jax.tree.structure(merged) == jax.tree.structure(network_shapes(step_aware))
    plain = clip.apply({"params": params}, pixels, method=clip.image_features)
    features = jax.jit(lambda times: step_aware.apply({"params": merged}, pixels, times, method="image_features"))

    @given(times=st.lists(st.integers(0, 999), min_size=2, max_size=2))
    def everywhere(times):
        np.testing.assert_allclose(features(jnp.asarray(times)), plain, rtol=0, atol=1e-5)

    everywhere()
    # And the timestep is not merely ignored: moved time layers change the features, differently at different times.
    merged["t_embedder"] = jax.tree.map(lambda x: x + 0.1, merged["t_embedder"])
    layer = merged["vision_model"]["encoder"]["layers_0"]["adaLN_modulation_1"]
    layer["kernel"] = layer["kernel"] + 0.1 * random(8, *layer["kernel"].shape)
    moved = step_aware.apply({"params": merged}, pixels, jnp.array([0, 999]), method="image_features")
    other = step_aware.apply({"params": merged}, pixels, jnp.array([999, 0]), method="image_features")
    assert np.abs(moved - plain).max() > 1e-3 and np.abs(moved - other).max() > 1e-3
