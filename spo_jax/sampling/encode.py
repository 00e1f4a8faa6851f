"""From prompts to what the networks read: tokens, embeddings, and the text of a scorer."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from spo_jax.distributed.mesh import batch_sharding, replicated
from spo_jax.formats.pipeline import Pipeline
from spo_jax.formats.tokenizers import tokenize, tokenize_prompts
from spo_jax.preference.scorers import Scorer
from spo_jax.types import AddedConditions, PromptBatch, Tokenizer

Ids = jax.Array | np.ndarray  # int32 [B, L]
Tokens = tuple[Ids, ...]  # int32 [B, L] for each text encoder of a pipeline
EncodeCaptions = Callable[[PyTree, Tokens], PromptBatch]


# ``(params, tokens, negative tokens, scorer tokens) -> PromptBatch``; without negative tokens (None) those are zeros.
Encode = Callable[[PyTree, Tokens, Tokens | None, Ids | None], PromptBatch]


def make_encode(pipeline: Pipeline, scorer: Scorer | None = None) -> Encode:
    """The function that encodes prompts.

    Args:
      pipeline: its text encoders.
      scorer: encodes ``scorer_tokens`` with the parameters in its ``text_parts``; without one there is no text.

    Returns:
      A function whose ``params`` are those of the text encoders and the scorer, and maybe adapters of text encoders,
      ``{"lora": {"text_encoder": tree}}``.
    """

    def variables(params: PyTree, name: str) -> PyTree:
        adapters = params.get("lora", {}).get(name)
        return {"params": params[name]} | ({} if adapters is None else {"lora": adapters})

    def embed(params: PyTree, tokens: Tokens) -> tuple[jax.Array, AddedConditions | None]:
        first = pipeline.text_encoder.apply(variables(params, "text_encoder"), tokens[0])
        if pipeline.text_encoder_2 is None:
            return first.last_hidden_state, None
        second = pipeline.text_encoder_2.apply(variables(params, "text_encoder_2"), tokens[1])
        # SDXL takes the state before the last layer, and no final layer norm.
        hidden = jnp.concatenate([first.penultimate_hidden_state, second.penultimate_hidden_state], axis=-1)
        size = jnp.array(pipeline.image_size, jnp.float32)
        time_ids = jnp.concatenate([size, jnp.zeros(2), size])  # an uncropped image of just this size
        return hidden, AddedConditions(second.pooled, jnp.broadcast_to(time_ids, (len(hidden), 6)))

    def encode(
        params: PyTree, tokens: Tokens, negative_tokens: Tokens | None, scorer_tokens: Ids | None
    ) -> PromptBatch:
        embeddings, added = embed(params, tokens)
        if negative_tokens is not None:
            negative, negative_added = embed(params, negative_tokens)
        else:
            negative, negative_added = jax.tree.map(lambda x: x[:1], (jnp.zeros_like(embeddings), added))
            if negative_added is not None:  # the time ids stay, only the text is gone
                negative_added = negative_added.replace(pooled=jnp.zeros_like(negative_added.pooled))
        text = None if scorer is None else scorer.encode_text(params, jnp.asarray(scorer_tokens))
        return PromptBatch(embeddings, negative, text, added, negative_added)

    return encode


def make_encode_captions(pipeline: Pipeline) -> EncodeCaptions:
    """``encode(params, tokens) -> PromptBatch``, with the empty prompt as the negative one."""
    encode = make_encode(pipeline)
    negative = None if pipeline.force_zeros_for_empty_prompt else tokenize_prompts(pipeline, [""])
    return lambda params, tokens: encode(params, tokens, negative, None)


def encode_prompts(
    encode: Encode,
    params: PyTree,
    pipeline: Pipeline,
    scorer_tokenizer: Tokenizer | None,
    texts: list[str],
    negative_prompt: str = "",
) -> PromptBatch:
    """Tokenizes and encodes some prompts; ``scorer_tokenizer`` is None for an ``encode`` without a scorer."""
    return encode(params, *tokens_of(pipeline, scorer_tokenizer, texts, negative_prompt))


def tokens_of(
    pipeline: Pipeline, scorer_tokenizer: Tokenizer | None, texts: list[str], negative_prompt: str = ""
) -> tuple[Tokens, Tokens | None, np.ndarray | None]:
    """The arguments of ``Encode`` for some prompts."""
    zeros = pipeline.force_zeros_for_empty_prompt and not negative_prompt
    return (
        tokenize_prompts(pipeline, texts),
        None if zeros else tokenize_prompts(pipeline, [negative_prompt]),
        None if scorer_tokenizer is None else tokenize(scorer_tokenizer, texts),
    )


def shard_prompts(prompts: PromptBatch, mesh: Mesh) -> PromptBatch:
    """Splits a batch of prompts over the devices."""
    return jax.device_put(prompts, prompt_shardings(prompts, mesh))


def prompt_shardings(prompts: PromptBatch, mesh: Mesh) -> PromptBatch:
    """Where the arrays of a batch of prompts lie: rows split over the devices, the negative prompt on all of them."""
    everywhere = jax.tree.map(lambda _: replicated(mesh), prompts)
    return everywhere.map_rows(lambda _: batch_sharding(mesh))
