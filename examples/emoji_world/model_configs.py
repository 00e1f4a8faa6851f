"""The public configs of the shipped emoji models, as diffusers and transformers would write them."""

from examples.emoji_world.tokenizer import END, MAX_LENGTH, START, learn_merges, vocabulary
from spo_jax.emoji.world import words

IMAGE_SIZE = 32
_VOCABULARY = vocabulary(learn_merges(words()))

_TOWER = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
VISION_CONFIG = {
    **_TOWER,
    "image_size": IMAGE_SIZE,
    "patch_size": 8,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 128,
    "num_channels": 3,
    "model_type": "clip_vision_model",
}
TEXT_CONFIG = {
    **_TOWER,
    "architectures": ["CLIPTextModel"],
    "bos_token_id": _VOCABULARY[START],
    "eos_token_id": _VOCABULARY[END],
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": MAX_LENGTH,
    "model_type": "clip_text_model",
    "pad_token_id": _VOCABULARY[END],
    "projection_dim": 128,
    "torch_dtype": "float32",  # of computing: without it transformers takes the file's float16, diffusers float32
    "vocab_size": len(_VOCABULARY),
}
CLIP_CONFIG = {
    "architectures": ["CLIPModel"],
    "logit_scale_init_value": 2.6592,
    "model_type": "clip",
    "projection_dim": 128,
    "text_config": TEXT_CONFIG,
    "torch_dtype": "float32",
    "vision_config": VISION_CONFIG,
}
VAE_CONFIG = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [16, 32, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "force_upcast": False,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "out_channels": 3,
    "sample_size": IMAGE_SIZE,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}
UNET_CONFIG = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 2,
    "block_out_channels": [64, 128],
    "center_input_sample": False,
    "cross_attention_dim": _TOWER["hidden_size"],
    "down_block_types": ["CrossAttnDownBlock2D"] * 2,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 1,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "norm_num_groups": 16,
    "out_channels": 4,
    "sample_size": IMAGE_SIZE // 4,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2,
}
SCHEDULER_CONFIG = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
