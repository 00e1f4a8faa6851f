"""The KL autoencoder between images and latents, from the fields of diffusers' ``config.json``."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from spo_jax.kernels.attention import multi_head_attention
from spo_jax.models.config import Json, check_fields, check_positive
from spo_jax.models.layers import Conv, Dense, Downsample2D, GroupNorm, ResnetBlock2D, Upsample2D, conv3x3

_FIXED: dict[str, tuple[object, ...]] = {
    "act_fn": ("silu", "swish"),
    "latents_mean": (None,),
    "latents_std": (None,),
    "mid_block_add_attention": (True,),
    "shift_factor": (None,),
}


class AutoencoderKL(nn.Module):
    """Encodes images in [-1, 1] to the mean and log-variance of latents and decodes latents to images.

    Latents here are NOT multiplied by ``scaling_factor``; the diffusion model works on ``latents * scaling_factor``.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    sample_size: int | tuple[int, ...] = 32
    dtype: jnp.dtype = jnp.float32

    @classmethod
    def from_config(cls, config: Json, dtype: jnp.dtype = jnp.float32) -> AutoencoderKL:
        """Builds the module from a parsed diffusers ``vae/config.json``; an unsupported field raises UserError."""
        blocks = len(config.get("block_out_channels", cls.block_out_channels))
        fixed = _FIXED | {
            "down_block_types": (["DownEncoderBlock2D"] * blocks,),
            "up_block_types": (["UpDecoderBlock2D"] * blocks,),
        }
        fields = check_fields("AutoencoderKL", cls, config, fixed=fixed, inert=("force_upcast",))
        check_positive("AutoencoderKL", "scaling_factor", fields.get("scaling_factor", cls.scaling_factor))
        return cls(dtype=dtype, **fields)

    @property
    def downscale(self) -> int:
        """Image pixels per latent pixel along one side."""
        return 2 ** (len(self.block_out_channels) - 1)

    def setup(self) -> None:
        sizes = self.block_out_channels, self.layers_per_block, self.norm_num_groups, self.dtype
        self.encoder = _Half("down", 2 * self.latent_channels, *sizes)
        self.decoder = _Half("up", self.out_channels, *sizes)
        if self.use_quant_conv:
            self.quant_conv = Conv(2 * self.latent_channels, (1, 1), dtype=self.dtype)
        if self.use_post_quant_conv:
            self.post_quant_conv = Conv(self.latent_channels, (1, 1), dtype=self.dtype)

    def encode(self, images: Float[Array, "b H W p"]) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
        """Mean and log-variance (clipped to [-30, 20]) of the posterior, [B, h, w, latent_channels] each."""
        moments = self.encoder(images.astype(self.dtype))
        if self.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def decode(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b H W q"]:
        """Images, about in [-1, 1] (not clipped), from latents that are already divided by ``scaling_factor``."""
        latents = latents.astype(self.dtype)
        if self.use_post_quant_conv:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)

    def __call__(self, images: Float[Array, "b H W p"]) -> Float[Array, "b H W q"]:
        """Reconstruction from the posterior mean."""
        return self.decode(self.encode(images)[0])


class _Half(nn.Module):
    """Images to moments ("down"), or latents to images ("up")."""

    way: str
    out_channels: int
    widths: tuple[int, ...]
    num_layers: int
    num_groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b y x c"]) -> Float[Array, "b y2 x2 d"]:
        up = self.way == "up"
        widths = self.widths[::-1] if up else self.widths
        x = conv3x3(widths[0], self.dtype, "conv_in")(x)
        middle = _MidBlock(self.num_groups, self.dtype, name="mid_block")
        x = middle(x) if up else x
        for i, width in enumerate(widths):
            resample = self.way if i < len(widths) - 1 else None
            name = f"{self.way}_blocks_{i}"
            x = _Level(width, self.num_layers + up, self.num_groups, resample, self.dtype, name=name)(x)
        x = x if up else middle(x)
        x = nn.silu(GroupNorm(self.num_groups, 1e-6, self.dtype, name="conv_norm_out")(x))
        return conv3x3(self.out_channels, self.dtype, "conv_out")(x)


class _Level(nn.Module):
    """Resnets at one resolution, then resampling if it is not the last level."""

    channels: int
    num_layers: int
    num_groups: int
    resample: str | None
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        for i in range(self.num_layers):
            x = ResnetBlock2D(self.channels, self.num_groups, 1e-6, self.dtype, name=f"resnets_{i}")(x)
        if self.resample == "down":
            x = Downsample2D(self.channels, True, self.dtype, name="downsamplers_0")(x)
        if self.resample == "up":
            x = Upsample2D(self.channels, self.dtype, name="upsamplers_0")(x)
        return x


class _MidBlock(nn.Module):
    """Resnet, single-head self-attention over all positions, resnet."""

    num_groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        x = ResnetBlock2D(x.shape[-1], self.num_groups, 1e-6, self.dtype, name="resnets_0")(x)
        x = _SpatialAttention(self.num_groups, self.dtype, name="attentions_0")(x)
        return ResnetBlock2D(x.shape[-1], self.num_groups, 1e-6, self.dtype, name="resnets_1")(x)


class _SpatialAttention(nn.Module):
    """Single-head attention over positions behind a group norm, with a residual connection."""

    num_groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        tokens = GroupNorm(self.num_groups, 1e-6, self.dtype, name="group_norm")(x).reshape(x.shape[0], -1, x.shape[-1])
        query, key, value = (Dense(x.shape[-1], dtype=self.dtype, name=f"to_{n}")(tokens) for n in "qkv")
        out = multi_head_attention(query, key, value, num_heads=1)
        return x + Dense(x.shape[-1], dtype=self.dtype, name="to_out_0")(out).reshape(x.shape)
