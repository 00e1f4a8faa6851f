"""The text-conditioned UNet of Stable Diffusion, from the fields of diffusers' ``config.json``."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from spo_jax.errors import UserError
from spo_jax.models.attention import Transformer2DModel
from spo_jax.models.compiler import call
from spo_jax.models.config import Json, check_fields, check_positive, per_block
from spo_jax.models.layers import (
    Downsample2D,
    GroupNorm,
    ResnetBlock2D,
    TimestepEmbedding,
    Upsample2D,
    conv3x3,
    timestep_embedding,
)
from spo_jax.types import AddedConditions

_FIXED: dict[str, tuple[object, ...]] = {
    "act_fn": ("silu", "swish"),
    "attention_type": ("default",),
    **dict.fromkeys(("conv_in_kernel", "conv_out_kernel"), (3,)),
    **dict.fromkeys(("downsample_padding", "mid_block_scale_factor"), (1,)),
    "resnet_out_scale_factor": (1.0,),
    "dropout": (0.0,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
    **dict.fromkeys(("center_input_sample", "class_embeddings_concat", "dual_cross_attention"), (False,)),
    **dict.fromkeys(("only_cross_attention", "resnet_skip_time_act"), (False,)),
    **dict.fromkeys(("class_embed_type", "cross_attention_norm", "encoder_hid_dim", "encoder_hid_dim_type"), (None,)),
    **dict.fromkeys(("num_class_embeds", "reverse_transformer_layers_per_block", "time_cond_proj_dim"), (None,)),
    **dict.fromkeys(("time_embedding_act_fn", "time_embedding_dim", "timestep_post_act"), (None,)),
}
# upcast_attention asks for a float32 softmax, which we always use; addition_embed_type_num_heads is read only
# together with an addition_embed_type that from_config refuses. The others are those of the average (EMA) that
# diffusers' trainers save as a UNet's folder.
_INERT = (
    *("upcast_attention", "addition_embed_type_num_heads"),
    *("decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup"),
)
_DOWN_TYPES = ("CrossAttnDownBlock2D", "DownBlock2D")
_UP_TYPES = ("CrossAttnUpBlock2D", "UpBlock2D")


class UNet2DConditionModel(nn.Module):
    """Predicts the noise (or v, or x0: see the scheduler's ``prediction_type``) in latents at a timestep.

    Attributes are the fields of ``config.json``; per-block fields are already expanded. Build it with ``from_config``.
    ``remat`` (gradient checkpointing) recomputes each resnet and transformer (of several blocks: each block) in the
    backward pass instead of keeping what is inside it: less memory, a third more time. ``unet.clone(remat=True)``
    switches it on.
    """

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    layers_per_block: tuple[int, ...] = (2, 2, 2, 2)
    num_attention_heads: tuple[int, ...] = (8, 8, 8, 8)
    transformer_layers_per_block: tuple[int, ...] = (1, 1, 1, 1)
    cross_attention_dim: int = 1280
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    sample_size: int | tuple[int, ...] = 64
    addition_embed_type: str | None = None
    addition_time_embed_dim: int = 0
    projection_class_embeddings_input_dim: int = 0
    remat: bool = False
    attention: str = "auto"
    dtype: jnp.dtype = jnp.float32

    @classmethod
    def from_config(cls, config: Json, dtype: jnp.dtype = jnp.float32) -> UNet2DConditionModel:
        """Builds the module from a parsed diffusers ``unet/config.json``.

        Raises:
          UserError: a field or block type that is not implemented, or lists of unequal length.
        """
        name = "UNet2DConditionModel"
        fields = check_fields(name, cls, config, fixed=_FIXED, inert=_INERT, more=("attention_head_dim",))
        if fields.get("sample_size") is None:
            fields.pop("sample_size", None)
        num_blocks = len(fields.get("block_out_channels", cls.block_out_channels))
        # diffusers' historical quirk: `attention_head_dim` is the NUMBER of heads unless `num_attention_heads` is set.
        heads = fields.pop("attention_head_dim", 8)
        heads = fields.pop("num_attention_heads", None) or heads
        fields["num_attention_heads"] = per_block(heads, num_blocks, name, "attention_head_dim")
        for field, default in (("layers_per_block", 2), ("transformer_layers_per_block", 1)):
            fields[field] = per_block(fields.get(field, default), num_blocks, name, field)
        for field, allowed in (("down_block_types", _DOWN_TYPES), ("up_block_types", _UP_TYPES)):
            types = fields.get(field, getattr(cls, field))
            unknown = [t for t in types if t not in allowed]
            if unknown or len(types) != num_blocks:
                raise UserError(
                    f"{name} config: {field} = {list(types)} is not supported; expected {num_blocks} entries out of "
                    f"{', '.join(allowed)}."
                )
        # SDXL's additional conditions; the sizes are 0 where there are none.
        kind = fields.get("addition_embed_type")
        if kind not in (None, "text_time"):
            raise UserError(
                f"{name} config: addition_embed_type = {kind!r} is not supported (only None or 'text_time'); "
                "use a checkpoint without this feature."
            )
        for field in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
            size = fields[field] = fields.get(field) or 0
            if (size > 0) != (kind is not None):
                raise UserError(
                    f"{name} config: {field} = {size} does not go with addition_embed_type = {kind!r}; "
                    "copy the config of the checkpoint again."
                )
        check_positive(name, "norm_eps", fields.get("norm_eps", cls.norm_eps))
        size = fields.get("sample_size", cls.sample_size)
        sides = size if isinstance(size, tuple) else (size, size)
        if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
            raise UserError(f"{name} config: sample_size = {size!r} must be a whole number from 1, or two of them.")
        return cls(dtype=dtype, **fields)

    @property
    def pooled_dim(self) -> int | None:
        """Width of the pooled text embedding that the network takes; None if it takes none."""
        if self.addition_embed_type is None:
            return None
        return self.projection_class_embeddings_input_dim - 6 * self.addition_time_embed_dim

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "b h w c"],
        timesteps: Num[Array, " b"],
        encoder_hidden_states: Float[Array, "b l d"],
        added: AddedConditions | None = None,
    ) -> Float[Array, "b h w o"]:
        """The prediction, [B, h, w, out_channels], in the module's dtype.

        Args:
          latents: [B, h, w, in_channels], of any size; a level whose side is odd meets the next at half of it, rounded
            up, as in diffusers.
          timesteps: [B], any real dtype.
          encoder_hidden_states: [B, L, cross_attention_dim] text embeddings.
          added: pooled text and time ids of B images, where ``addition_embed_type`` is "text_time" (SDXL).

        Raises:
          ValueError: ``added`` is missing, or given to a network that does not take it.
        """
        if (added is None) != (self.addition_embed_type is None):
            raise ValueError("added must be given to a UNet with addition_embed_type, and only to one.")
        widths, dtype = self.block_out_channels, self.dtype
        num_blocks = len(widths)
        latents, context = latents.astype(dtype), encoder_hidden_states.astype(dtype)
        sinusoids = functools.partial(
            timestep_embedding, flip_sin_to_cos=self.flip_sin_to_cos, freq_shift=self.freq_shift
        )
        time = sinusoids(timesteps, widths[0]).astype(dtype)
        time = TimestepEmbedding(4 * widths[0], dtype, name="time_embedding")(time)
        if added is not None:
            # Pooled text, then the sinusoids of the six time ids, side by side.
            ids = sinusoids(added.time_ids.reshape(-1), self.addition_time_embed_dim).reshape(len(added.time_ids), -1)
            features = jnp.concatenate([added.pooled.astype(dtype), ids.astype(dtype)], axis=-1)
            time = time + TimestepEmbedding(4 * widths[0], dtype, name="add_embedding")(features)

        x = conv3x3(widths[0], dtype, "conv_in")(latents)
        skips = [x]
        for i, block_type in enumerate(self.down_block_types):
            resample = "down" if i < num_blocks - 1 else None
            block = self._block(i, self.layers_per_block[i], block_type, resample, f"down_blocks_{i}")
            x, outputs = block(x, time, context)
            skips += outputs
        x, _ = self._block(num_blocks - 1, 1, "CrossAttn", None, "mid_block", extra_resnet=True)(x, time, context)
        for i, block_type in enumerate(self.up_block_types):
            mirrored = num_blocks - 1 - i
            num_layers = self.layers_per_block[mirrored] + 1
            resample = "up" if mirrored > 0 else None
            skips, used = skips[:-num_layers], skips[-num_layers:]
            block = self._block(mirrored, num_layers, block_type, resample, f"up_blocks_{i}")
            x, _ = block(x, time, context, skips=used[::-1], size=skips[-1].shape[1:3] if skips else None)

        x = nn.silu(GroupNorm(self.norm_num_groups, self.norm_eps, dtype, name="conv_norm_out")(x))
        return conv3x3(self.out_channels, dtype, "conv_out")(x)

    def _block(
        self, level: int, num_layers: int, kind: str, resample: str | None, name: str, extra_resnet: bool = False
    ) -> _Block:
        return _Block(
            self.block_out_channels[level],
            num_layers,
            self.num_attention_heads[level] if kind.startswith("CrossAttn") else 0,
            self.transformer_layers_per_block[level],
            self.norm_num_groups,
            self.norm_eps,
            self.use_linear_projection,
            resample,
            extra_resnet,
            self.remat,
            self.attention,
            self.dtype,
            name=name,
        )


class _Block(nn.Module):
    """One level of the UNet: ``num_layers`` resnets, each followed by attention if ``num_heads`` > 0; then resampling.

    With ``skips`` (in the up blocks) one of them is concatenated before each resnet. ``extra_resnet`` closes the middle
    block. ``size`` is that of the next level's skips. Returns the result and all intermediate outputs, the skips of the
    up blocks.
    """

    channels: int
    num_layers: int
    num_heads: int
    transformer_layers: int
    num_groups: int
    epsilon: float
    use_linear_projection: bool
    resample: str | None
    extra_resnet: bool
    remat: bool
    attention: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, time, context, skips=None, size=None):
        # Ten transformer blocks at once (SDXL) would keep more inside them than the rest of the network does.
        remat_blocks = self.remat and self.transformer_layers > 1
        resnet = ResnetBlock2D(self.channels, self.num_groups, self.epsilon, self.dtype, parent=None)
        sizes = self.num_heads, self.transformer_layers, self.num_groups, self.use_linear_projection
        transformer = Transformer2DModel(*sizes, remat_blocks, self.dtype, self.attention, parent=None)
        outputs = []
        for i in range(self.num_layers):
            if skips is not None:
                x = jnp.concatenate([x, skips[i]], axis=-1)
            x = call(self, resnet, f"resnets_{i}", x, time, remat=self.remat)
            if self.num_heads:
                remat = self.remat and not remat_blocks
                x = call(self, transformer, f"attentions_{i}", x, context, remat=remat)
            outputs.append(x)
        if self.extra_resnet:
            x = call(self, resnet, f"resnets_{self.num_layers}", x, time, remat=self.remat)
        if self.resample == "down":
            x = Downsample2D(self.channels, False, self.dtype, name="downsamplers_0")(x)
            outputs.append(x)
        if self.resample == "up":
            x = Upsample2D(self.channels, self.dtype, name="upsamplers_0")(x, size)
        return x, outputs
