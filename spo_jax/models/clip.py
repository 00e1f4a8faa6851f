"""CLIP (arXiv 2103.00020): text tower, vision tower and, for the preference model, time-conditioned vision layers.

Module and parameter names are those of transformers. The step-aware preference model adds ``t_embedder`` and
``adaLN_modulation`` layers to the vision tower (SPO, arXiv 2406.04314, section 3.2), which start as the identity.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Self

import flax.linen as nn
import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from jaxtyping import Array, Float, Int, Num, PyTree

from spo_jax.distributed.sharding import gathered
from spo_jax.kernels.attention import multi_head_attention
from spo_jax.models.compiler import call
from spo_jax.models.config import Json, check_fields
from spo_jax.models.layers import Conv, Dense, LayerNorm, activation, timestep_embedding

# Fields of transformers' configs that do not change what the towers compute (training, text generation, bookkeeping).
_INERT = frozenset(
    """
    add_cross_attention architectures attention_dropout bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample
    dropout dtype early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label initializer_factor initializer_range
    is_decoder is_encoder_decoder label2id length_penalty logit_scale_init_value max_length min_length
    model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_scores pad_token_id prefix problem_type pruned_heads remove_invalid_values
    repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params
    temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torch_dtype
    torchscript transformers_version typical_p use_bfloat16 use_cache
    """.split()  # noqa: SIM905  (a list would have a line for each)
)
_FIXED: dict[str, tuple[object, ...]] = {"hidden_act": ("quick_gelu", "gelu")}
TIME_EMBEDDING_DIM = 256


@flax.struct.dataclass
class CLIPTextOutput:
    """What a text tower gives: hidden states [B, L, D] and the pooled state [B, D] at the end-of-text token.

    ``penultimate_hidden_state`` is what the last layer gets, without the final layer norm. From a model with a
    projection ``pooled`` is projected, [B, projection_dim].
    """

    last_hidden_state: jax.Array
    penultimate_hidden_state: jax.Array
    pooled: jax.Array


class _Tower(nn.Module):
    """What both towers have; defaults are transformers', which leaves fields that have them out of a CLIP's config."""

    num_hidden_layers: int = 12
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512
    dtype: jnp.dtype = jnp.float32
    remat: bool = False
    attention: str = "auto"

    @classmethod
    def from_config(cls, config: Json, dtype: jnp.dtype = jnp.float32, **kwargs) -> Self:
        """Builds the tower from a parsed transformers config; an unsupported field raises UserError."""
        name, fixed, inert = "CLIP text", _FIXED, _INERT
        if cls is CLIPVisionTransformer:
            name, fixed, inert = "CLIP vision", _FIXED | {"num_channels": (3,)}, _INERT | {"eos_token_id"}
        return cls(dtype=dtype, **check_fields(name, cls, config, fixed=fixed, inert=inert), **kwargs)


class CLIPTextTransformer(_Tower):
    """Causal text tower. Shapes: tokens int [B, L], L <= max_position_embeddings."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    eos_token_id: int = 49407

    @nn.compact
    def __call__(self, tokens: Int[Array, "b l"]) -> CLIPTextOutput:
        length = tokens.shape[1]
        sizes = self.vocab_size, self.max_position_embeddings, self.hidden_size
        x = _TextEmbeddings(*sizes, self.dtype, name="embeddings")(tokens)
        causal = jnp.tril(jnp.ones((length, length), dtype=bool))[None, None]
        x, penultimate = _encoder(self)(x, mask=causal)
        x = _layer_norm(self, "final_layer_norm")(x)
        # transformers treats eos_token_id = 2 as "the largest id", because old configs carry that wrong value.
        end = tokens if self.eos_token_id == 2 else (tokens == self.eos_token_id).astype(jnp.int32)
        pooled = jnp.take_along_axis(x, jnp.argmax(end, axis=-1)[:, None, None], axis=1)[:, 0]
        return CLIPTextOutput(x, penultimate, pooled)


class CLIPVisionTransformer(_Tower):
    """Vision tower. Pixels [B, H, W, 3] already normalised; returns the pooled, layer-normed class token [B, D]."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32

    @nn.compact
    def __call__(self, pixels: Float[Array, "b H W 3"], time: Float[Array, "b d"] | None = None) -> Float[Array, "b d"]:
        x = _VisionEmbeddings(self.hidden_size, self.patch_size, self.dtype, name="embeddings")(pixels)
        x = _layer_norm(self, "pre_layrnorm")(x)  # transformers' own spelling, kept because it is the key
        x, _ = _encoder(self)(x, time=time)
        x = _layer_norm(self, "post_layernorm")(x[:, 0])
        if time is not None:
            x = _modulate(x, *_Modulation(2, (), self.dtype, name="adaLN_modulation_1")(time))
        return x


class CLIPTextModel(nn.Module):
    """The text encoder of a diffusion pipeline (``text_encoder/``); see ``CLIPTextTransformer``."""

    config: flax.core.FrozenDict
    dtype: jnp.dtype = jnp.float32

    @classmethod
    def from_config(cls, config: Json, dtype: jnp.dtype = jnp.float32) -> CLIPTextModel:
        """Builds the model from a parsed ``text_encoder/config.json``; an unsupported field raises UserError."""
        CLIPTextTransformer.from_config(config)
        return cls(config=flax.core.freeze(dict(config)), dtype=dtype)

    @property
    def tower(self) -> CLIPTextTransformer:
        """Its sizes; it has no parameters."""
        return CLIPTextTransformer.from_config(self.config, parent=None)

    @property
    def hidden_size(self) -> int:
        """D, the width of the hidden states."""
        return self.tower.hidden_size

    @property
    def projection_dim(self) -> int:
        """Width of a projection of the pooled state."""
        return self.tower.projection_dim

    def setup(self) -> None:
        self.text_model = CLIPTextTransformer.from_config(self.config, self.dtype)

    def __call__(self, tokens: Int[Array, "b l"]) -> CLIPTextOutput:
        return self.text_model(tokens)


class CLIPTextModelWithProjection(CLIPTextModel):
    """The second text encoder of SDXL (``text_encoder_2/``): the pooled state is projected, without a bias."""

    def setup(self) -> None:
        super().setup()
        self.text_projection = Dense(self.projection_dim, use_bias=False, dtype=self.dtype)

    def __call__(self, tokens: Int[Array, "b l"]) -> CLIPTextOutput:
        output = self.text_model(tokens)
        return output.replace(pooled=self.text_projection(output.pooled))


class CLIPModel(nn.Module):
    """Both towers with their projections. ``step_aware`` adds the time conditioning of the preference model.

    ``remat`` recomputes each layer in the backward pass instead of keeping what is inside it: less memory, a third more
    time. ``clip.clone(remat=True)`` switches it on.
    """

    text_config: flax.core.FrozenDict
    vision_config: flax.core.FrozenDict
    projection_dim: int = 512
    step_aware: bool = False
    dtype: jnp.dtype = jnp.float32
    remat: bool = False
    attention: str = "auto"  # of ``kernels.attention.KINDS``

    @classmethod
    def from_config(cls, config: Json, *, step_aware: bool, dtype: jnp.dtype = jnp.float32) -> CLIPModel:
        """Builds the model from a parsed transformers ``CLIPConfig``; an unsupported field raises UserError."""
        inert = _INERT | {"text_config_dict", "vision_config_dict", "eos_token_id"}
        fields = check_fields("CLIP", cls, config, fixed={}, inert=inert)
        CLIPTextTransformer.from_config(fields["text_config"])
        CLIPVisionTransformer.from_config(fields["vision_config"])
        for tower in ("text_config", "vision_config"):
            fields[tower] = flax.core.freeze(dict(fields[tower]))
        return cls(step_aware=step_aware, dtype=dtype, **fields)

    @property
    def tower(self) -> CLIPTextTransformer:
        """Sizes of the text tower; it has no parameters."""
        return CLIPTextTransformer.from_config(self.text_config, parent=None)

    @property
    def image_size(self) -> int:
        """Side of the square input image in pixels."""
        return CLIPVisionTransformer.from_config(self.vision_config, parent=None).image_size

    def setup(self) -> None:
        options = {"remat": self.remat, "attention": self.attention}
        self.text_model = CLIPTextTransformer.from_config(self.text_config, self.dtype, **options)
        self.vision_model = CLIPVisionTransformer.from_config(self.vision_config, self.dtype, **options)
        self.text_projection = Dense(self.projection_dim, use_bias=False, dtype=self.dtype)
        self.visual_projection = Dense(self.projection_dim, use_bias=False, dtype=self.dtype)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(2.6592), (), jnp.float32)
        if self.step_aware:
            self.t_embedder = _TimeEmbedder(self.vision_model.hidden_size, self.dtype)

    def image_features(
        self, pixels: Float[Array, "b H W 3"], timesteps: Num[Array, " b"] | None = None
    ) -> Float[Array, "b e"]:
        """Projected image embeddings, not normalised. A step-aware model needs ``timesteps``, a plain one has none."""
        if self.step_aware != (timesteps is not None):
            raise ValueError("timesteps must be given to a step-aware CLIP, and only to one.")
        time = self.t_embedder(timesteps) if self.step_aware else None
        return self.visual_projection(self.vision_model(pixels.astype(self.dtype), time))

    def text_features(self, tokens: Int[Array, "b l"]) -> Float[Array, "b e"]:
        """Projected text embeddings, not normalised."""
        return self.text_projection(self.text_model(tokens).pooled)

    def __call__(self, pixels, tokens, timesteps=None):
        """Unit-length image and text embeddings [B, E] in float32 and exp(logit_scale)."""
        image = self.image_features(pixels, timesteps).astype(jnp.float32)
        text = self.text_features(tokens).astype(jnp.float32)
        return (
            image / jnp.linalg.norm(image, axis=-1, keepdims=True),
            text / jnp.linalg.norm(text, axis=-1, keepdims=True),
            jnp.exp(self.logit_scale),
        )


def is_time_layer(path: tuple[str, ...]) -> bool:
    """Whether the parameter at ``path`` is one that a step-aware CLIP has beyond a plain one."""
    return "t_embedder" in path or "adaLN_modulation_1" in path


def with_identity_time_layers(
    clip: CLIPModel,
    plain: PyTree,
    key: jax.Array,
    *,
    sharding: Sharding | Callable[[tuple[str, ...], tuple[int, ...]], Sharding] | None = None,
) -> PyTree:
    """Parameters of a step-aware CLIP that scores as the plain one does, at every timestep.

    ``plain`` are those of the plain model of the same config, and become part of the result; the new ones have the
    dtype of ``clip``. ``key`` is that of the time embedding's random weights, which count only once the modulation has
    learned something; ``sharding`` is one for all new parameters, or a function from a path and a shape to its own.
    """

    def fresh(key: jax.Array) -> dict[tuple[str, ...], jax.Array]:
        pixels = jnp.zeros((1, clip.image_size, clip.image_size, 3))
        params = clip.init(key, pixels, jnp.zeros((1, 1), jnp.int32), jnp.zeros(1))["params"]
        flat = flax.traverse_util.flatten_dict(params)
        return {path: value.astype(clip.dtype) for path, value in flat.items() if is_time_layer(path)}

    shapes = jax.eval_shape(fresh, key)
    places = {path: sharding(path, x.shape) for path, x in shapes.items()} if callable(sharding) else sharding
    layers = jax.jit(fresh, out_shardings=places)(key)  # computes only what it returns
    return flax.traverse_util.unflatten_dict({**flax.traverse_util.flatten_dict(plain), **layers})


class _TextEmbeddings(nn.Module):
    vocab_size: int
    max_length: int
    hidden_size: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, tokens):
        token = nn.Embed(self.vocab_size, self.hidden_size, dtype=self.dtype, name="token_embedding")(tokens)
        position = nn.Embed(self.max_length, self.hidden_size, dtype=self.dtype, name="position_embedding")
        return token + position(jnp.arange(tokens.shape[1]))[None]


class _VisionEmbeddings(nn.Module):
    hidden_size: int
    patch_size: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, pixels):
        size = (self.patch_size, self.patch_size)
        patch = Conv(self.hidden_size, size, size[0], use_bias=False, dtype=self.dtype, name="patch_embedding")
        patches = patch(pixels).reshape(pixels.shape[0], -1, self.hidden_size)
        class_token = self.param("class_embedding", nn.initializers.normal(0.02), (self.hidden_size,), jnp.float32)
        class_token = jnp.broadcast_to(class_token.astype(self.dtype), (pixels.shape[0], 1, self.hidden_size))
        x = jnp.concatenate([class_token, patches], axis=1)
        position = nn.Embed(x.shape[1], self.hidden_size, dtype=self.dtype, name="position_embedding")
        return x + position(jnp.arange(x.shape[1]))[None]


class _Encoder(nn.Module):
    """The stack of layers; returns the last hidden state and the one before the last layer."""

    make_layer: Callable[..., _EncoderLayer]
    num_layers: int
    remat: bool

    @nn.compact
    def __call__(self, x, mask=None, time=None):
        layer = self.make_layer(parent=None)
        previous = x
        for i in range(self.num_layers):
            previous = x
            x = call(self, layer, f"layers_{i}", x, mask, time, remat=self.remat)
        return x, previous


class _EncoderLayer(nn.Module):
    num_heads: int
    intermediate_size: int
    hidden_act: str
    layer_norm_eps: float
    dtype: jnp.dtype
    attention: str

    @nn.compact
    def __call__(self, x, mask, time):
        attention = _SelfAttention(self.num_heads, self.dtype, self.attention, name="self_attn")
        mlp = _MLP(self.intermediate_size, self.hidden_act, self.dtype, name="mlp")
        norm1, norm2 = _layer_norm(self, "layer_norm1"), _layer_norm(self, "layer_norm2")
        if time is None:
            x = x + attention(norm1(x), mask)
            return x + mlp(norm2(x))
        modulation = _Modulation(6, (2, 5), self.dtype, name="adaLN_modulation_1")(time)
        shift1, scale1, gate1, shift2, scale2, gate2 = (m[:, None] for m in modulation)
        x = x + gate1 * attention(_modulate(norm1(x), shift1, scale1), mask)
        return x + gate2 * mlp(_modulate(norm2(x), shift2, scale2))


class _SelfAttention(nn.Module):
    num_heads: int
    dtype: jnp.dtype
    kind: str

    @nn.compact
    def __call__(self, x, mask):
        query, key, value = (Dense(x.shape[-1], dtype=self.dtype, name=f"{n}_proj")(x) for n in "qkv")
        out = multi_head_attention(query, key, value, self.num_heads, mask, self.kind)
        return Dense(x.shape[-1], dtype=self.dtype, name="out_proj")(out)


class _MLP(nn.Module):
    intermediate_size: int
    hidden_act: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        hidden = Dense(self.intermediate_size, dtype=self.dtype, name="fc1")(x)
        return Dense(x.shape[-1], dtype=self.dtype, name="fc2")(activation(self.hidden_act)(hidden))


class _TimeEmbedder(nn.Module):
    """Sinusoid, Linear, SiLU, Linear; then the SiLU that every modulation layer starts with."""

    hidden_size: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, timesteps):
        init = nn.initializers.normal(0.02)
        x = timestep_embedding(timesteps, TIME_EMBEDDING_DIM).astype(self.dtype)
        x = nn.silu(Dense(self.hidden_size, dtype=self.dtype, kernel_init=init, name="mlp_0")(x))
        return nn.silu(Dense(self.hidden_size, dtype=self.dtype, kernel_init=init, name="mlp_2")(x))


class _Modulation(nn.Module):
    """``count`` vectors from the time embedding: initially zero, except ones at the ``gates``."""

    count: int
    gates: tuple[int, ...]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, time):
        width = time.shape[-1]

        def bias(_key, shape, dtype):
            return jnp.zeros((self.count, width), dtype).at[jnp.array(self.gates, int)].set(1).reshape(shape)

        kernel = self.param("kernel", nn.initializers.zeros_init(), (width, self.count * width), jnp.float32)
        offset = self.param("bias", bias, (self.count * width,), jnp.float32)
        return jnp.split(time @ gathered(kernel.astype(self.dtype)) + offset.astype(self.dtype), self.count, axis=-1)


def _modulate(x, shift, scale):
    return x * (1 + scale) + shift


def _layer_norm(module, name: str) -> LayerNorm:
    return LayerNorm(epsilon=module.layer_norm_eps, dtype=module.dtype, name=name)


def _encoder(tower: CLIPTextTransformer | CLIPVisionTransformer) -> _Encoder:
    sizes = tower.num_attention_heads, tower.intermediate_size, tower.hidden_act, tower.layer_norm_eps
    make_layer = functools.partial(_EncoderLayer, *sizes, tower.dtype, tower.attention)
    return _Encoder(make_layer, tower.num_hidden_layers, tower.remat, name="encoder")
