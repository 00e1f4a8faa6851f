"""ImageReward v1.0 in its authors' files: ``ImageReward.pt``, ``med_config.json``, and BERT's ``vocab.txt``."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeAlias

import flax.traverse_util
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

from spo_jax.errors import UserError, first_line
from spo_jax.formats import names
from spo_jax.formats.hub import local, missing, remote_of, resolve_model
from spo_jax.formats.json_files import read_json
from spo_jax.formats.networks import build
from spo_jax.formats.torch_bin import index_torch_bin
from spo_jax.formats.weights import Placement, Weights, read_params
from spo_jax.models import ImageReward
from spo_jax.models.blip import RELEASED, Sizes

WEIGHTS, CONFIG, VOCABULARY = "ImageReward.pt", "med_config.json", "vocab.txt"
HUB = "zai-org/ImageReward@5736be03b2652728fb87788c9797b0570450ab72"
# The repository above has no vocabulary; its authors' program takes BERT's.
BERT_VOCABULARY = (
    f"google-bert/bert-base-uncased@86b5e0934494bd15c9632b12f734a8a67f723594/{VOCABULARY}"
    "#sha256=07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"
)
MAX_TOKENS = 35  # of a prompt, with [CLS] and [SEP]
# BLIP has these two tokens beside BERT's; the table of embeddings counts them, but a prompt does not get them.
_ADDED = ("[DEC]", "[ENC]")
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Of BLIP's contrastive loss, and BERT's numbers from 0 on.
_NOT_READ = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")

WordPiece: TypeAlias = Any  # transformers.BertTokenizer, whose module takes seconds to import


class Files(NamedTuple):
    """Where the three files are on this machine."""

    weights: Path
    config: Path
    vocabulary: Path


def find_files(place: str | None = None) -> Files:
    """The files of ImageReward at ``place``: a folder or a repository of the hub, by default that of the authors.

    ``ImageReward.pt`` and ``med_config.json`` have to be there; ``vocab.txt`` may, and is otherwise that of
    bert-base-uncased from the hub.

    Raises:
      UserError: a file is missing, or is neither in the hub's cache nor to be had.
    """
    name = HUB if place is None else place
    if (remote := remote_of(name)) is None:
        folder = local(name)
    elif remote.site != "hub" or remote.kind != "model" or remote.is_file:
        raise UserError(f"{name!r} is no folder and no repository of models on the hub; name the one with {WEIGHTS}.")
    else:
        weights = PurePosixPath(remote.inside) / WEIGHTS
        folder = resolve_model(f"{remote.repo}@{remote.revision}/{weights}").parent
    for file in (WEIGHTS, CONFIG):
        if not (folder / file).is_file():
            raise UserError(missing(folder / file))
    vocabulary = folder / VOCABULARY
    if not vocabulary.is_file():
        try:
            vocabulary = resolve_model(BERT_VOCABULARY)
        except UserError as error:
            raise UserError(
                f"{folder} has no {VOCABULARY}, so that of BERT is needed; put it there, or: {error}"
            ) from error
    return Files(folder / WEIGHTS, folder / CONFIG, vocabulary)


def read_imagereward(
    files: Files, *, sizes: Sizes = RELEASED, dtype: DTypeLike = np.float32, sharding: Placement = None
) -> tuple[ImageReward, PyTree]:
    """The network and its parameters in ``dtype``.

    ``med_config.json`` says the sizes of the text encoder, ``sizes`` those of the rest. The weights are a flat state
    dict; what the reward does not use of it is not read.

    Raises:
      UserError: the config is not supported, or a key is missing, left over or of another shape, or see
        ``read_params``.
    """
    config = read_json(files.config)
    network, shapes = build(ImageReward, config, dtype, where=f"File {files.config}", sizes=sizes)
    assert isinstance(network, ImageReward)
    path = files.weights
    arrays = {key: x for key, x in index_torch_bin(path).items() if not key.startswith(_NOT_READ)}
    left = set(arrays)
    for tree_path, leaf in flax.traverse_util.flatten_dict(shapes).items():
        key, shape = names.torch_key(tree_path), names.torch_shape(tree_path, leaf.shape)
        if key not in arrays:
            raise UserError(
                f"Weight file {path} has no key {key!r}, which ImageReward v1.0 has; is it {WEIGHTS} of the authors?"
            )
        if arrays[key].shape != shape:
            raise UserError(
                f"Weight file {path}: {key!r} has shape {arrays[key].shape}, but ImageReward v1.0 with {CONFIG} has "
                f"{shape}; download both from one source."
            )
        left.discard(key)
    if left:
        raise UserError(
            f"Weight file {path} has {len(left)} keys that ImageReward v1.0 does not have, such as {min(left)!r}; "
            f"is it {WEIGHTS} of the authors?"
        )
    return network, read_params(Weights(path, arrays), shapes, sharding=sharding)


def read_wordpiece(vocabulary: Path, vocab_size: int) -> WordPiece:
    """The tokenizer of ImageReward: BERT's, lower case, with [DEC] and [ENC] behind the words of ``vocab.txt``.

    ``vocab_size`` is that of the text encoder.

    Raises:
      UserError: the file is missing or no vocabulary of BERT, or it does not have the text encoder's size.
    """
    from transformers import BertTokenizer  # takes seconds to import; nothing else here needs it

    if not vocabulary.is_file():
        raise UserError(missing(vocabulary))
    try:
        with vocabulary.open(encoding="utf-8") as lines:
            words = {line.rstrip("\n"): i for i, line in enumerate(lines)}
    except (OSError, ValueError) as error:
        raise UserError(
            f"File {vocabulary} cannot be read ({first_line(error)}); download or copy it again."
        ) from error
    if lacking := [token for token in _SPECIAL if token not in words]:
        raise UserError(f"File {vocabulary} has no line {lacking[0]}; is it the vocabulary of bert-base-uncased?")
    if len(words) + len(_ADDED) != vocab_size:
        raise UserError(
            f"File {vocabulary} has {len(words)} words, but the text encoder has {vocab_size}, with {len(_ADDED)} that "
            "are added; they do not belong together."
        )
    tokenizer = BertTokenizer(vocab=words, do_lower_case=True, model_max_length=MAX_TOKENS)
    tokenizer.add_tokens(list(_ADDED), special_tokens=True)
    return tokenizer


def tokenize_wordpiece(tokenizer: WordPiece, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int32 and whether they are no padding, bool, both [B, 35]; longer texts are cut off.

    The first token is [CLS]: unlike BLIP's own programs, ImageReward does not put [ENC] there.
    """
    given = tokenizer(texts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="np")
    return given["input_ids"].astype(np.int32), given["attention_mask"].astype(bool)
