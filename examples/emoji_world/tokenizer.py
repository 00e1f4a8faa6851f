"""A CLIP tokenizer for the emoji world: any text can be encoded, and each word of a caption is one token.

The files are those of a CLIP tokenizer folder, which ``transformers.CLIPTokenizer.from_pretrained`` reads.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from spo_jax.emoji.world import words

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
MAX_LENGTH = 16  # tokens of a caption, with start and end

Merge = tuple[str, str]


def byte_characters() -> list[str]:
    """The printable character that stands for each byte, in the order of CLIP's vocabulary.

    Printable bytes stand for themselves; the rest, in order, for the characters from U+0100 on (the scheme of GPT-2).
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    return [chr(byte) for byte in printable] + [chr(256 + extra) for extra in range(256 - len(printable))]


def learn_merges(known: Iterable[str]) -> list[Merge]:
    """Byte-pair merges that make one token of each known word.

    Plain BPE training, each word counted once, until nothing is left to merge. The encoder applies merges in the
    order of the list, as the training did, so a known word is sure to end as one token. (A chain of prefix merges
    per word
    would not do that: "an" of one word would break the chain of "banana".)

    Args:
        known: words of lower-case ASCII letters.

    Returns:
        The merges, first to apply first; ties between equally frequent pairs go to the alphabetically first.
    """
    splits = [[*word[:-1], word[-1] + WORD_END] for word in sorted(set(known))]
    merges: list[Merge] = []
    while True:
        counts = Counter(pair for symbols in splits for pair in pairwise(symbols))
        if not counts:
            return merges
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        splits = [_merged(symbols, best) for symbols in splits]


def _merged(symbols: list[str], pair: Merge) -> list[str]:
    """The symbols with each occurrence of the pair, from the left, made one."""
    result: list[str] = []
    position = 0
    while position < len(symbols):
        width = 2 if tuple(symbols[position : position + 2]) == pair else 1
        result.append("".join(symbols[position : position + width]))
        position += width
    return result


def vocabulary(merges: Iterable[Merge]) -> dict[str, int]:
    """Token ids in CLIP's order: bytes, bytes that end a word, merges, start, end.

    Raises:
        ValueError: two merges make the same token.
    """
    single = byte_characters()
    tokens = [*single, *(char + WORD_END for char in single), *map("".join, merges), START, END]
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        raise ValueError("two merges make the same token")
    return ids


def write_tokenizer(folder: str | Path) -> None:
    """Write the tokenizer's files, the same on every run; the folder is made where it is missing.

    Args:
        folder: gets ``vocab.json``, ``merges.txt``, ``tokenizer_config.json`` and ``special_tokens_map.json``.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    merges = learn_merges(words())
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    config = {
        **special,
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_LENGTH,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
    }
    merge_lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(merge_lines) + "\n", encoding="utf-8")
    for name, content in (
        ("vocab.json", vocabulary(merges)),
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", special),
    ):
        text = json.dumps(content, ensure_ascii=False, indent=None if name == "vocab.json" else 2)
        (folder / name).write_text(text + "\n", encoding="utf-8")
