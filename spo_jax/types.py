"""The few dataclasses that travel between the parts. B prompts, k candidates, N sampling steps, S pool steps, P pairs.

Latents are [..., h, w, c]. Candidates are prompt-major, [B, k, ...], so that a batch that is sharded over devices stays
sharded when its first two axes are merged for one network call.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax


@flax.struct.dataclass
class PromptBatch:
    """What the networks know of B prompts.

    Attributes:
      embeddings: [B, L, D] text encoder output.
      negative_embeddings: [1, L, D], of the negative prompt that guidance moves away from.
      scorer_text: [B, E] unit-length float32 text embeddings of the preference model.
    """

    embeddings: jax.Array
    negative_embeddings: jax.Array
    scorer_text: jax.Array


@flax.struct.dataclass
class PoolNoise:
    """Every random number of one pool, so that a trajectory can be replayed. d plain steps, S = N - d pool steps.

    Attributes:
      initial: [B, h, w, c] first latents.
      plain: [d, B, h, w, c] noise of the steps with one sample.
      candidates: [S, B, k, h, w, c] noise of the candidates.
      choices: int32 [S - 1, B], which candidate starts the next step.
    """

    initial: jax.Array
    plain: jax.Array
    candidates: jax.Array
    choices: jax.Array


@flax.struct.dataclass
class Pool:
    """Candidates and their scores along B trajectories.

    Attributes:
      latents: [S, B, h, w, c], x_t from which the candidates were drawn.
      candidates: [S, B, k, h, w, c], each a possible x_{t_prev}; ``candidates[-1]`` are final latents.
      scores: float32 [S, B, k].
      timesteps: int32 [S], t of ``latents``.
      previous_timesteps: int32 [S], the timestep of the candidates.
    """

    latents: jax.Array
    candidates: jax.Array
    scores: jax.Array
    timesteps: jax.Array
    previous_timesteps: jax.Array


@flax.struct.dataclass
class PreferencePairs:
    """P = S * B win/lose transitions out of a pool, valid ones and others.

    Attributes:
      latents: [P, h, w, c], the x_t that win and lose share.
      win: [P, h, w, c]; lose: [P, h, w, c]: the better and the worse x_{t_prev}.
      timesteps: int32 [P]; previous_timesteps: int32 [P].
      prompt_index: int32 [P], row of the PromptBatch.
      valid: bool [P], whether the preference is clear enough to learn from.
    """

    latents: jax.Array
    win: jax.Array
    lose: jax.Array
    timesteps: jax.Array
    previous_timesteps: jax.Array
    prompt_index: jax.Array
    valid: jax.Array


@flax.struct.dataclass
class TrainState:
    """What changes in training: int32 ``step`` (optimizer updates), float32 adapters, optimizer state."""

    step: jax.Array
    lora: Any
    opt_state: Any
