"""Networks with their weights, for ``assemble``; ``planning/shapes.py`` has the same with shapes only."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import PyTree

from spo_jax.data.prompts import read_prompts
from spo_jax.distributed.sharding import weight_shardings
from spo_jax.formats.base import Base, read_base
from spo_jax.formats.lora import check_lora_files
from spo_jax.formats.pipeline import Pipeline, read_clip, with_unet
from spo_jax.formats.tokenizers import fitted, read_tokenizer
from spo_jax.models.clip import CLIPModel, CLIPTextTransformer
from spo_jax.runs.assembly import Place
from spo_jax.runs.state import TrainState
from spo_jax.types import Tokenizer


class Weights:
    """See ``assembly.Load``."""

    def __init__(self, place: Place, dtype: DTypeLike, attention: str = "auto") -> None:
        self._place, self._dtype, self._attention = place, dtype, attention

    def pipeline(self, base: Base, height: int | None, width: int | None, *, remat: bool) -> Pipeline:
        """Reads a base model."""
        pipeline = read_base(base, self._dtype, height=height, width=width, sharding=self._place)
        return with_unet(pipeline, remat=remat, attention=self._attention)

    def clip(
        self, name: str, part: str, *, params_dtype: DTypeLike | None = None, step_aware: bool | None = None
    ) -> tuple[CLIPModel, PyTree]:
        """Reads a CLIP."""
        clip, params = read_clip(
            name,
            step_aware=step_aware,
            dtype=params_dtype or self._dtype,
            sharding=lambda path, shape: self._place((part, *path), shape),
        )
        return clip.clone(dtype=self._dtype, attention=self._attention), params

    def tokenizer(self, name: str, default: Tokenizer, tower: CLIPTextTransformer | None) -> Tokenizer:
        """Reads a tokenizer."""
        tokenizer = read_tokenizer(name) if name else default
        return tokenizer if tower is None else fitted(tokenizer, tower)

    def prompts(self, name: str, limit: int | None = None) -> list[str]:
        """Reads prompts."""
        return read_prompts(name)[:limit]

    def adapters(self, name: str) -> str:
        """The same name, whose file can be read."""
        check_lora_files([name] if name else [])
        return name

    def state(self, make: Callable[[PyTree], TrainState], params: PyTree, mesh: Mesh) -> TrainState:
        """Makes the state and splits it over the devices."""
        state = make(params)
        return jax.device_put(state, weight_shardings(mesh, state))
