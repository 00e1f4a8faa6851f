"""From prompts to what the networks read: tokens, embeddings, and a scorer's text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from spo_jax.distributed.mesh import batch_sharding, replicated
from spo_jax.formats.pipeline import Pipeline
from spo_jax.formats.tokenizers import tokenize, tokenize_prompts
from spo_jax.preference.scorers import Scorer
from spo_jax.types import AddedConditions, PromptBatch


def make_encode(pipeline: Pipeline, scorer: Scorer | None) -> Callable[..., PromptBatch]:
    """``encode(params, tokens, negative_tokens, scorer_tokens [B, L'] or None) -> PromptBatch``.

    ``tokens`` and ``negative_tokens`` hold int32 [B, L] and [1, L] for each text encoder of the pipeline. Without
    negative tokens (None) the negative embeddings are zeros. Without a scorer there are no scorer tokens and no text.
    ``params`` may have adapters of text encoders, ``{"lora": {"text_encoder": tree}}``.
    """

    def variables(params: Any, name: str) -> Any:
        adapters = params.get("lora", {}).get(name)
        return {"params": params[name]} | ({} if adapters is None else {"lora": adapters})

    def embed(params: Any, tokens: tuple[jax.Array, ...]) -> tuple[jax.Array, AddedConditions | None]:
        first = pipeline.text_encoder.apply(variables(params, "text_encoder"), tokens[0])
        if pipeline.text_encoder_2 is None:
            return first.last_hidden_state, None
        second = pipeline.text_encoder_2.apply(variables(params, "text_encoder_2"), tokens[1])
        # SDXL takes the state before the last layer, and no final layer norm.
        hidden = jnp.concatenate([first.penultimate_hidden_state, second.penultimate_hidden_state], axis=-1)
        size = jnp.array(pipeline.image_size, jnp.float32)
        time_ids = jnp.concatenate([size, jnp.zeros(2), size])  # an uncropped picture of just this size
        return hidden, AddedConditions(second.pooled, jnp.broadcast_to(time_ids, (len(hidden), 6)))

    def encode(
        params: Any,
        tokens: tuple[jax.Array, ...],
        negative_tokens: tuple[jax.Array, ...] | None,
        scorer_tokens: Any,
    ) -> PromptBatch:
        embeddings, added = embed(params, tokens)
        if negative_tokens is not None:
            negative, negative_added = embed(params, negative_tokens)
        else:
            negative, negative_added = jax.tree.map(lambda x: x[:1], (jnp.zeros_like(embeddings), added))
            if negative_added is not None:  # the time ids stay, only the text is gone
                negative_added = negative_added.replace(pooled=jnp.zeros_like(negative_added.pooled))
        text: Any = None if scorer is None else scorer.encode_text(params["scorer"], scorer_tokens)
        return PromptBatch(embeddings, negative, text, added, negative_added)

    return encode


def shard_prompts(prompts: PromptBatch, mesh: Mesh) -> PromptBatch:
    """Splits a batch of prompts over the devices."""
    everywhere = jax.tree.map(lambda _: replicated(mesh), prompts)
    return jax.device_put(prompts, everywhere.map_rows(lambda _: batch_sharding(mesh)))


def encode_prompts(
    encode: Callable[..., PromptBatch],
    params: Any,
    pipeline: Pipeline,
    scorer_tokenizer: Any,
    texts: list[str],
    negative_prompt: str = "",
) -> PromptBatch:
    """Tokenizes and encodes a list of prompts; ``scorer_tokenizer`` is None for an ``encode`` without a scorer."""
    zeros = pipeline.force_zeros_for_empty_prompt and not negative_prompt
    return encode(
        params,
        tokenize_prompts(pipeline, texts),
        None if zeros else tokenize_prompts(pipeline, [negative_prompt]),
        None if scorer_tokenizer is None else tokenize(scorer_tokenizer, texts),
    )


def make_encode_captions(pipeline: Pipeline) -> Callable[[Any, tuple[jax.Array, ...]], PromptBatch]:
    """``encode(params, tokens) -> PromptBatch``, with the empty prompt as the negative one."""
    encode = make_encode(pipeline, scorer=None)
    negative = None if pipeline.force_zeros_for_empty_prompt else tokenize_prompts(pipeline, [""])
    return lambda params, tokens: encode(params, tokens, negative, None)
