"""CLIP tokenizers: reading them, fitting them to a text tower, and what of a text is cut off."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np

from spo_jax.errors import UserError, first_line
from spo_jax.formats.hub import local, missing, resolve_model
from spo_jax.models.clip import CLIPTextTransformer
from spo_jax.types import Tokenizer

ClipTokenizer: TypeAlias = Any  # transformers.CLIPTokenizer, whose module takes seconds to import
Tokens: TypeAlias = Any  # int32 [B, L], of numpy: the compiled programs take it as a jax.Array
_NAMED = 3  # texts that a warning quotes
_QUOTED = 200  # characters of each


class Tokenized(Protocol):
    """A pipeline with its tokenizers; SDXL has two."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def tokenizer_2(self) -> Tokenizer | None: ...


class BlankTokenizer:
    """Stands for a tokenizer where only shapes count."""

    def __init__(self, length: int) -> None:
        self.model_max_length = length

    def __call__(self, texts: list[str], **_options: object) -> dict[str, np.ndarray]:
        return {"input_ids": np.zeros((len(texts), self.model_max_length), np.int32)}


def read_tokenizer(folder: str | Path, tower: CLIPTextTransformer | None = None) -> ClipTokenizer:
    """The CLIP tokenizer in ``folder``, local or on the hub (see ``resolve_model``), fitted to a tower if one is given.

    Raises:
      UserError: a file is missing or damaged, or see ``fitted``.
    """
    from transformers import CLIPTokenizer  # takes seconds to import; nothing else here needs it

    if isinstance(folder, Path) and not local(folder).is_dir():
        raise UserError(missing(folder, "Tokenizer"))
    folder = resolve_model(folder, weights=False)
    # transformers 5 saves one tokenizer.json, published pipelines have the two files that it is made of.
    vocabulary = ["tokenizer.json"] if (folder / "tokenizer.json").is_file() else ["vocab.json", "merges.txt"]
    for name in (*vocabulary, "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise UserError(missing(folder / name))
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # its parsers raise plain exceptions
        raise UserError(
            f"Tokenizer {folder} cannot be read ({first_line(error)}); download or copy it again."
        ) from error
    return tokenizer if tower is None else fitted(tokenizer, tower)


def fitted(tokenizer: ClipTokenizer, tower: CLIPTextTransformer) -> ClipTokenizer:
    """The tokenizer with texts no longer than the table of positions of the tower that reads its ids.

    Raises:
      UserError: an id is beyond the tower's vocabulary, it has no token for padding or for an end, or no length.
    """
    name = tokenizer.name_or_path
    for kind in ("eos", "pad"):
        if getattr(tokenizer, f"{kind}_token_id") is None:
            raise UserError(f"Tokenizer {name} has no {kind}_token; name it in its tokenizer_config.json.")
    token, highest = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    if highest >= tower.vocab_size:
        raise UserError(
            f"Tokenizer {name}: token {token!r} has id {highest}, but the text encoder knows ids up to "
            f"{tower.vocab_size - 1} only; they do not belong together."
        )
    length = tokenizer.model_max_length
    is_whole = isinstance(length, int) or (isinstance(length, float) and length > tower.max_position_embeddings)
    if not is_whole or not length >= 2:
        raise UserError(f"Tokenizer {name}: model_max_length is {length!r}; it must be a number of tokens from 2.")
    # Missing, it is a huge number in transformers.
    if length <= tower.max_position_embeddings:
        return tokenizer
    tokenizer = copy.copy(tokenizer)
    tokenizer.model_max_length = tower.max_position_embeddings
    return tokenizer


def check_lengths(tokenizers: Mapping[str, ClipTokenizer]) -> None:
    """Raises UserError if the text encoders of a pipeline would give sequences of different lengths."""
    lengths = {name: tokenizer.model_max_length for name, tokenizer in tokenizers.items()}
    if len(set(lengths.values())) > 1:
        told = " and ".join(f"{name} {length}" for name, length in lengths.items())
        first = next(iter(tokenizers.values())).name_or_path
        raise UserError(f"Tokenizer {first}: texts are of different lengths, {told}; set model_max_length in both.")


def tokenize(tokenizer: Tokenizer, texts: list[str]) -> Tokens:
    """Token ids int32 [B, model_max_length], padded and truncated as Stable Diffusion does."""
    ids = tokenizer(
        texts, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="np"
    )["input_ids"]
    return ids.astype("int32")


def tokenizers_of(pipeline: Tokenized) -> list[Tokenizer]:
    """One for each text encoder of the pipeline."""
    return [pipeline.tokenizer] if pipeline.tokenizer_2 is None else [pipeline.tokenizer, pipeline.tokenizer_2]


def tokenize_prompts(pipeline: Tokenized, texts: list[str]) -> tuple[Tokens, ...]:
    """Token ids int32 [B, L] for each text encoder of the pipeline."""
    return tuple(tokenize(tokenizer, texts) for tokenizer in tokenizers_of(pipeline))


def cut_off(tokenizer: ClipTokenizer, texts: list[str]) -> list[str]:
    """The end of each text that has no place in the tokenizer's length, as diffusers names it; empty if all has."""
    length = tokenizer.model_max_length
    all_ids = tokenizer(texts, verbose=False)["input_ids"] if texts else []
    return [tokenizer.decode(ids[length - 1 : -1]) if len(ids) > length else "" for ids in all_ids]


def cut_warning(tokenizers: Sequence[ClipTokenizer], texts: Sequence[str], what: str = "prompts") -> str | None:
    """A warning about texts that are longer than one of the tokenizers takes; None if there are none.

    It tells how many of the different texts, called ``what``, these are, and what is cut off of the first.
    """
    different = list(dict.fromkeys(texts))
    ends = zip(*(cut_off(tokenizer, different) for tokenizer in tokenizers), strict=True)
    cut = [part for parts in ends if (part := max(parts, key=len))]
    if not cut:
        return None
    length = min(tokenizer.model_max_length for tokenizer in tokenizers)
    short = (part if len(part) <= _QUOTED else f"{part[:_QUOTED]}..." for part in cut[:_NAMED])
    named = ", ".join(map(repr, short)) + (f" and {len(cut) - _NAMED} more" if len(cut) > _NAMED else "")
    return (
        f"warning: {len(cut)} of {len(different)} {what} are longer than the {length} tokens that the text encoder "
        f"reads; their ends are not seen: {named}."
    )
