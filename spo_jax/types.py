"""The few dataclasses that travel between the parts. B prompts, k candidates, N sampling steps, S pool steps, P pairs.

Of the N steps the first d are plain, and the other S = N - d are cut into E segments of m + 1 steps (m inner steps), of
which the last may be shorter. SD1.5 has m = 0: each pool step is a segment by itself.

Latents are [..., h, w, c]. Candidates are prompt-major, [B, k, ...], so that a batch that is sharded over devices stays
sharded when its first two axes are merged for one network call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import flax.struct
import jax
import numpy as np


class Tokenizer(Protocol):
    """A tokenizer of transformers, or what stands for one where only shapes count."""

    model_max_length: int

    def __call__(self, texts: list[str], **options: object) -> dict[str, np.ndarray]:
        """Token ids int [B, model_max_length] under ``"input_ids"``."""


@flax.struct.dataclass
class AddedConditions:
    """What SDXL's UNet is told of n pictures beside the hidden states of their prompts.

    Attributes:
      pooled: [n, E] pooled and projected state of the second text encoder.
      time_ids: float32 [n, 6] original height and width, top and left of the crop, target height and width, in pixels.
    """

    pooled: jax.Array
    time_ids: jax.Array


@flax.struct.dataclass
class PromptBatch:
    """What the networks know of B prompts.

    Attributes:
      embeddings: [B, L, D] text encoder output.
      negative_embeddings: [1, L, D], of the negative prompt that guidance moves away from.
      scorer_text: [B, ...] what a scorer made of the texts, of a CLIP unit-length embeddings float32 [B, E]; None where
        nothing is scored.
      added: of B pictures, only for SDXL.
      negative_added: of one picture, only for SDXL.
    """

    embeddings: jax.Array
    negative_embeddings: jax.Array
    scorer_text: jax.Array | None
    added: AddedConditions | None = None
    negative_added: AddedConditions | None = None

    def map_rows(self, function: Callable[[Any], Any]) -> PromptBatch:
        """Applies ``function`` to every array that has a row for each prompt: selects, repeats or places prompts."""
        rows = (self.embeddings, self.scorer_text, self.added)
        embeddings, scorer_text, added = jax.tree.map(function, rows)
        return dataclasses.replace(self, embeddings=embeddings, scorer_text=scorer_text, added=added)


@flax.struct.dataclass
class PoolNoise:
    """Every random number of one pool, so that a trajectory can be replayed.

    Attributes:
      initial: [B, h, w, c] first latents.
      plain: [d, B, h, w, c] noise of the steps with one sample.
      candidates: [S, B, k, h, w, c] noise of the candidates.
      choices: int32 [S - 1, B], which candidate starts the next step; used where that step opens a segment.
    """

    initial: jax.Array
    plain: jax.Array
    candidates: jax.Array
    choices: jax.Array


@flax.struct.dataclass
class Candidates:
    """The candidates of one step of B trajectories, as a scorer gets them.

    Attributes:
      latents: float32 [B, k, h, w, c], the candidates.
      x0: float32 [B, k, h, w, c], the clean latents that the network predicts from each; at the end of a trajectory
        the candidates themselves.
      timestep: int32 [], of the step that drew them.
      arrived: int32 [], the timestep that they are at and that ``x0`` was predicted at; 0 at the end of a trajectory.
    """

    latents: jax.Array
    x0: jax.Array
    timestep: jax.Array
    arrived: jax.Array


@flax.struct.dataclass
class Pool:
    """Candidates along B trajectories, and their scores or what these are made of.

    Attributes:
      latents: [E, B, h, w, c], x_t from which the candidates of a segment's first step were drawn. Inside a segment
        each candidate goes on alone, from the candidate of the step before.
      candidates: [S, B, k, h, w, c], each a possible x_{t_prev}; ``candidates[-1]`` are final latents.
      scores: float32 [E, B, k], of the candidates at the end of a segment; None before they are scored.
      timesteps: int32 [S], t of each step.
      previous_timesteps: int32 [S], the timestep of the candidates.
      num_inner_steps: m.
      x0: [E, B, k, h, w, c], the clean latents predicted from the candidates that are to be scored; the last of them
        themselves. None once there are scores.
    """

    latents: jax.Array
    candidates: jax.Array
    scores: jax.Array | None
    timesteps: jax.Array
    previous_timesteps: jax.Array
    num_inner_steps: int = flax.struct.field(pytree_node=False, default=0)
    x0: jax.Array | None = None


@flax.struct.dataclass
class PreferencePairs:
    """Win/lose transitions: of a pool [S, B], one of each step and prompt; or of a minibatch, [P].

    Attributes:
      latents: [..., h, w, c], the x_t that win and lose share; or that of win, where ``lose_latents`` is there.
      win: [..., h, w, c]; lose: [..., h, w, c]: the better and the worse x_{t_prev}.
      timesteps: int32 [...]; previous_timesteps: int32 [...].
      valid: bool [S, B], whether the preference is clear enough to learn from; None in a minibatch.
      lose_latents: [..., h, w, c], the x_t of lose; None if every pair shares it (m = 0).
    """

    latents: jax.Array
    win: jax.Array
    lose: jax.Array
    timesteps: jax.Array
    previous_timesteps: jax.Array
    valid: jax.Array | None
    lose_latents: jax.Array | None = None


@flax.struct.dataclass
class LabelledPairs:
    """B pairs of images of one caption each, and which of the two was preferred.

    Attributes:
      images: uint8 [B, 2, H, W, 3].
      tokens: of the captions, int32 [B, L] for each text encoder of the base model.
      crops: int32 [B, 2, 4], of each image its original height and width, and top and left of the part that is seen.
      scorer_tokens: int32 [B, L], of the preference model; None where no scorer reads the captions.
      labeller_tokens: int32 [B, L], of the labeller, which labels the pairs anew; None if the labels stay.
      labels: float32 [B, 2], how far each picture was preferred; 1 and 0, or 0.5 and 0.5 for a tie.
      weights: float32 [B]; a row of weight 0 stands for a record that cannot be used, and does not count.
      positions: uint32 [B], place in the endless stream of records; names the pair's random numbers.
    """

    images: jax.Array
    tokens: tuple[jax.Array, ...]
    crops: jax.Array
    scorer_tokens: jax.Array | None
    labeller_tokens: jax.Array | None
    labels: jax.Array
    weights: jax.Array
    positions: jax.Array
