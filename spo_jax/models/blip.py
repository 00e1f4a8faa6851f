"""BLIP's image-grounded text encoder (arXiv 2201.12086) with the head of ImageReward (arXiv 2304.05977).

A picture's tokens come from a ViT; a BERT (arXiv 1810.04805) reads the prompt, and after each self-attention looks at
all of them; the state at [CLS] goes through linear layers to one number. Module and parameter names are those of
``ImageReward.pt``.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from spo_jax.kernels.attention import multi_head_attention
from spo_jax.models.compiler import call
from spo_jax.models.config import Json, check_fields, check_positive
from spo_jax.models.layers import Conv, Dense, LayerNorm, activation

# Mean and standard deviation of the rewards of ImageReward v1.0, which its authors give with the network.
REWARD_MEAN, REWARD_STD = 0.16717362830052426, 1.0333394966054072
_VISION_EPS = 1e-6
# Places of the linear layers in the head, in which dropouts stand as well; there is no activation.
_HEAD_LAYERS = (0, 2, 4, 6, 7)
_FIXED: dict[str, tuple[object, ...]] = {
    "hidden_act": ("gelu",),
    "add_cross_attention": (True,),
    "model_type": ("bert",),
    "position_embedding_type": ("absolute",),
}
# Fields of ``med_config.json`` that do not change what is computed. The width of the picture's tokens is that of the
# vision tower, whatever ``encoder_width`` says: the authors' program overwrites it.
_INERT = frozenset(
    """
    architectures attention_probs_dropout_prob bos_token_id classifier_dropout encoder_width eos_token_id
    hidden_dropout_prob initializer_range pad_token_id torch_dtype transformers_version type_vocab_size use_cache
    """.split()  # noqa: SIM905  (a list would have a line for each)
)


class Sizes(NamedTuple):
    """What no config of ImageReward names.

    Attributes:
      image_size: side of the square picture, pixels.
      patch_size: side of a patch, pixels.
      embed_dim: width of a picture's tokens; the MLPs are four times as wide.
      depth: blocks of the vision tower.
      num_heads: of its attention.
      head: widths inside the head, which begins with the width of the text encoder and ends with 1.
    """

    image_size: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    head: tuple[int, ...]


RELEASED = Sizes(224, 16, 1024, 24, 16, head=(1024, 128, 64, 16))  # a ViT-L/16 and the head of v1.0


class VisionTransformer(nn.Module):
    """A ViT (arXiv 2010.11929) with layer norms in front. Pixels [B, H, W, 3] are normalised, of ``image_size``.

    Returns all tokens [B, 1 + patches, D] behind the final layer norm, the class token first.
    """

    sizes: Sizes
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b t d"]:
        size, patch, width, depth, heads, _ = self.sizes
        patches = _PatchEmbedding(width, patch, self.dtype, name="patch_embed")(pixels.astype(self.dtype))
        first = self.param("cls_token", nn.initializers.normal(0.02), (1, 1, width), jnp.float32)
        shape = (1, 1 + (size // patch) ** 2, width)
        positions = self.param("pos_embed", nn.initializers.normal(0.02), shape, jnp.float32)
        first = jnp.broadcast_to(first.astype(self.dtype), (len(pixels), 1, width))
        x = jnp.concatenate([first, patches], axis=1) + positions.astype(self.dtype)
        block = _Block(heads, self.dtype, parent=None)
        for i in range(depth):
            x = call(self, block, f"blocks_{i}", x)
        return LayerNorm(_VISION_EPS, self.dtype, name="norm")(x)


class CrossAttentionBert(nn.Module):
    """BERT, not causal, with an attention to a picture in each layer; no token types and no pooler.

    Tokens int [B, L], L <= ``max_position_embeddings``; ``mask`` [B, L] is false at padding, which no token looks at;
    picture tokens [B, T, D] of any width are all looked at. Returns the last hidden states [B, L, hidden_size].
    """

    vocab_size: int = 30524  # of bert-base-uncased, with [DEC] and [ENC] behind it
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-12
    dtype: jnp.dtype = jnp.float32

    @classmethod
    def from_config(cls, config: Json, dtype: jnp.dtype = jnp.float32, **kwargs) -> CrossAttentionBert:
        """Builds the encoder from a parsed ``med_config.json``; an unsupported field raises UserError."""
        fields = check_fields("BLIP text", cls, config, fixed=_FIXED, inert=_INERT)
        for name, value in fields.items():
            check_positive("BLIP text", name, value)
        return cls(dtype=dtype, **fields, **kwargs)

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "b l"], mask: Bool[Array, "b l"], picture: Float[Array, "b t d"]
    ) -> Float[Array, "b l c"]:
        sizes = self.vocab_size, self.max_position_embeddings, self.hidden_size
        x = _TextEmbeddings(*sizes, self.layer_norm_eps, self.dtype, name="embeddings")(tokens)
        fields = self.num_attention_heads, self.intermediate_size, self.layer_norm_eps, self.dtype
        return _TextLayers(self.num_hidden_layers, *fields, name="encoder")(x, mask[:, None, None, :], picture)


class ImageReward(nn.Module):
    """ImageReward: how well a picture fits its prompt and how good it is, about 0 on average, with a spread of 1.

    Pixels [B, H, W, 3] are normalised, tokens int and ``mask`` [B, L] are of their prompts (see
    ``CrossAttentionBert``). Returns rewards float32 [B].
    """

    config: flax.core.FrozenDict
    sizes: Sizes = RELEASED
    dtype: jnp.dtype = jnp.float32

    @classmethod
    def from_config(cls, config: Json, *, sizes: Sizes = RELEASED, dtype: jnp.dtype = jnp.float32) -> ImageReward:
        """Builds the network from a parsed ``med_config.json``; an unsupported field raises UserError."""
        CrossAttentionBert.from_config(config)
        return cls(config=flax.core.freeze(dict(config)), sizes=sizes, dtype=dtype)

    @property
    def text_encoder(self) -> CrossAttentionBert:
        """Sizes of the text encoder; it has no parameters."""
        return CrossAttentionBert.from_config(self.config, parent=None)

    def setup(self) -> None:
        self.blip = _Blip(self.config, self.sizes, self.dtype)
        self.mlp = _Head(self.sizes.head)

    def picture_tokens(self, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b t d"]:
        """What the text encoder sees of the pictures."""
        return self.blip.visual_encoder(pixels)

    def __call__(
        self, pixels: Float[Array, "b H W 3"], tokens: Int[Array, "b l"], mask: Bool[Array, "b l"]
    ) -> Float[Array, " b"]:
        hidden = self.blip.text_encoder(tokens, mask, self.picture_tokens(pixels))
        return (self.mlp(hidden[:, 0]) - REWARD_MEAN) / REWARD_STD


class _Blip(nn.Module):
    config: flax.core.FrozenDict
    sizes: Sizes
    dtype: jnp.dtype

    def setup(self) -> None:
        self.visual_encoder = VisionTransformer(self.sizes, self.dtype)
        self.text_encoder = CrossAttentionBert.from_config(self.config, self.dtype)


class _Head(nn.Module):
    """Linear layers from [B, C] to one number each; in float32, as they are small and end in the score."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for place, width in zip(_HEAD_LAYERS, (*self.widths, 1), strict=True):
            x = Dense(width, name=f"layers_{place}")(x)
        return x[:, 0]


class _PatchEmbedding(nn.Module):
    width: int
    patch: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, pixels):
        x = Conv(self.width, (self.patch, self.patch), self.patch, dtype=self.dtype, name="proj")(pixels)
        return x.reshape(len(x), -1, self.width)


class _Block(nn.Module):
    num_heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        norm1, norm2 = (LayerNorm(_VISION_EPS, self.dtype, name=f"norm{i}") for i in (1, 2))
        x = x + _SelfAttention(self.num_heads, self.dtype, name="attn")(norm1(x))
        return x + _MLP(self.dtype, name="mlp")(norm2(x))


class _SelfAttention(nn.Module):
    num_heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        query, key, value = jnp.split(Dense(3 * width, dtype=self.dtype, name="qkv")(x), 3, axis=-1)
        return Dense(width, dtype=self.dtype, name="proj")(multi_head_attention(query, key, value, self.num_heads))


class _MLP(nn.Module):
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        hidden = activation("gelu")(Dense(4 * width, dtype=self.dtype, name="fc1")(x))
        return Dense(width, dtype=self.dtype, name="fc2")(hidden)


class _TextEmbeddings(nn.Module):
    vocab_size: int
    max_length: int
    width: int
    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, tokens):
        word = nn.Embed(self.vocab_size, self.width, dtype=self.dtype, name="word_embeddings")(tokens)
        position = nn.Embed(self.max_length, self.width, dtype=self.dtype, name="position_embeddings")
        x = word + position(jnp.arange(tokens.shape[1]))[None]
        return LayerNorm(self.epsilon, self.dtype, name="LayerNorm")(x)


class _TextLayers(nn.Module):
    depth: int
    num_heads: int
    intermediate: int
    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, mask, picture):
        layer = _TextLayer(self.num_heads, self.intermediate, self.epsilon, self.dtype, parent=None)
        for i in range(self.depth):
            x = call(self, layer, f"layer_{i}", x, mask, picture)
        return x


class _TextLayer(nn.Module):
    """Attention to the text, attention to the picture, MLP; each with its input added, and a layer norm behind it."""

    num_heads: int
    width: int
    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, mask, picture):
        fields = self.num_heads, self.epsilon, self.dtype
        x = _TextAttention(*fields, name="attention")(x, x, mask)
        x = _TextAttention(*fields, name="crossattention")(x, picture, None)
        hidden = _Linear(self.width, self.dtype, name="intermediate")(x)
        return _AddAndNorm(self.epsilon, self.dtype, name="output")(activation("gelu")(hidden), x)


class _TextAttention(nn.Module):
    num_heads: int
    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, context, mask):
        out = _Heads(self.num_heads, self.dtype, name="self")(x, context, mask)
        return _AddAndNorm(self.epsilon, self.dtype, name="output")(out, x)


class _Heads(nn.Module):
    num_heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, context, mask):
        def project(name: str, inputs: jax.Array) -> jax.Array:
            return Dense(x.shape[-1], dtype=self.dtype, name=name)(inputs)

        query, key, value = project("query", x), project("key", context), project("value", context)
        return multi_head_attention(query, key, value, self.num_heads, mask)


class _Linear(nn.Module):
    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        return Dense(self.features, dtype=self.dtype, name="dense")(x)


class _AddAndNorm(nn.Module):
    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, before):
        x = Dense(before.shape[-1], dtype=self.dtype, name="dense")(x)
        return LayerNorm(self.epsilon, self.dtype, name="LayerNorm")(x + before)
