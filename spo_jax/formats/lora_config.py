"""peft's ``LoraConfig`` beside a LoRA file or in its header, which tells how strong the adapters are.

peft keeps it as ``adapter_config.json`` in the folder, diffusers as JSON in the header of the file, there with the name
of the part before each field (``unet.lora_alpha``) where the file may have several.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors

from spo_jax.errors import UserError
from spo_jax.formats.json_files import Json, read_json
from spo_jax.formats.lora_keys import PARTS

CONFIG_FILE = "adapter_config.json"
_PEFT_STEM = "adapter_model"
_DEFAULT_ALPHA = 8.0  # of LoraConfig
# With these, training starts from other base weights, which are not in the file.
_CHANGED_BASE = re.compile(r"pissa|olora|corda|loftq|lora_ga|orthogonal", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """The fields that say how strong adapters are; ``patterns`` holds alphas of layers that have their own."""

    alpha: float
    patterns: Mapping[str, float]
    rank_stabilized: bool

    def scale(self, module: str, rank: int) -> float:
        """The factor of the product of a layer's matrices; ``module`` is the layer's name in its model."""
        alpha = next((a for pattern, a in self.patterns.items() if _matches(pattern, module)), self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def read_configs(file: Path) -> dict[str, PeftConfig]:
    """The config of each part that has one, for a LoRA file that is there and can be read; of others alpha is the rank.

    Raises:
      UserError: a config is missing or damaged, or asks for another kind of adapters.
    """
    source = file.with_name(CONFIG_FILE) if file.name.startswith(_PEFT_STEM) else file
    if source != file and not source.is_file():
        raise UserError(
            f"LoRA file {file} is one of peft's, but {source} is not beside it; its alpha is needed: copy it as well."
        )
    try:
        fields = read_json(source) if source != file else json.loads(_in_header(file) or "{}")
        by_part: dict[str, Json] = {"": {}, **{part: {} for part in PARTS}}
        for key, value in fields.items():
            part, dot, field = key.partition(".")
            of_part = dot and part in PARTS
            by_part[part if of_part else ""][field if of_part else key] = value
        common = by_part.pop("")
        return {part: _config(source, one or common) for part, one in by_part.items() if one or common}
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"LoRA file {source} has damaged metadata ({error}); download or copy it again.") from error


def _in_header(file: Path) -> str | None:
    try:
        with safetensors.safe_open(str(file), "numpy") as opened:
            return (opened.metadata() or {}).get("lora_adapter_metadata")
    except safetensors.SafetensorError:
        return None  # a file of PyTorch


def _config(source: Path, fields: Json) -> PeftConfig:
    kind = fields.get("peft_type") or "LORA"
    kind = kind if str(kind).upper() != "LORA" else "DoRA" if fields.get("use_dora") else None
    if kind is not None:
        raise UserError(f"LoRA file {source} holds {kind}, which is not supported; only plain LoRA is.")
    for field in ("lora_bias", "use_qalora"):
        if fields.get(field):
            raise UserError(f"LoRA file {source}: {field} = {fields[field]!r} in its metadata is not supported.")
    start = fields.get("init_lora_weights")
    if isinstance(start, str) and _CHANGED_BASE.match(start):
        raise UserError(
            f"LoRA file {source}: its metadata has init_lora_weights = {start!r}, which changes the base "
            "model as well; convert it to plain LoRA with peft (path_initial_model_for_weight_conversion)."
        )
    patterns = {pattern: float(alpha) for pattern, alpha in (fields.get("alpha_pattern") or {}).items()}
    unclear = next((p for p in patterns if re.search(r"[*+?()\[\]{}|\\]", p)), None)
    if unclear is not None:
        raise UserError(
            f"LoRA file {source}: its metadata has {unclear!r} in alpha_pattern, which is not the name of a layer; "
            "regular expressions are not supported."
        )
    alpha = fields.get("lora_alpha")
    alpha = _DEFAULT_ALPHA if alpha is None else float(alpha)
    for value in (alpha, *patterns.values()):
        if not math.isfinite(value):
            raise UserError(f"LoRA file {source}: its metadata has an alpha that is not finite, {value}.")
    return PeftConfig(alpha, patterns, bool(fields.get("use_rslora")))


def _matches(pattern: str, module: str) -> bool:
    """As peft does: the layer's whole name, or its last parts unless ``^`` says where it starts."""
    # transformers 5 leaves out the first part of a text encoder's names.
    modules = (module, module.removeprefix("text_model."))
    bare = pattern.removeprefix("^").removesuffix("$")
    return bare in modules or (not pattern.startswith("^") and any(m.endswith(f".{bare}") for m in modules))
