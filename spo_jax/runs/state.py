"""What changes in training, and the one place where a gradient becomes a step."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import chex
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree


class Optimizer(NamedTuple):
    """How gradients become steps: the transformation, and the decay of the average of what is trained (0: none)."""

    transformation: optax.GradientTransformation
    ema_decay: float = 0.0


@flax.struct.dataclass
class TrainState:
    """What changes in training.

    Attributes:
      step: int32, minibatches learned from.
      trained: float32 variables that are learned. In SPO those of the UNet: ``{"lora": adapters}``, or ``{"params":
        parameters}`` in full fine-tuning. Laid over ``{"params": base}`` they make the policy; without them it is the
        reference. Of a preference model: its parameters.
      opt_state: of the optimizer.
      average: exponential moving average of ``trained``; None if it is off.
    """

    step: jax.Array
    trained: PyTree
    opt_state: PyTree
    average: PyTree | None = None

    @classmethod
    def create(cls, trained: PyTree, optimizer: Optimizer, *, starts_as_reference: bool = False) -> TrainState:
        """The state before the first step; ``starts_as_reference``: what is trained is the reference, as it is now."""
        # A copy, because an update gives the buffers of the old state away.
        average = jax.tree.map(jnp.copy, trained) if optimizer.ema_decay else None
        fields = jnp.zeros((), jnp.int32), trained, optimizer.transformation.init(trained), average
        return ReferencedState(*fields, jax.tree.map(jnp.copy, trained)) if starts_as_reference else cls(*fields)

    @property
    def reference(self) -> PyTree | None:
        """Variables of the reference, in the form of ``trained``; None where that is the base model."""
        return None

    @property
    def result(self) -> PyTree:
        """What is measured and written: the average if there is one."""
        return self.trained if self.average is None else self.average

    @property
    def parts(self) -> dict[str, PyTree]:
        """What a device keeps of it, by what it is."""
        kept = {"trained": self.trained, "optimizer": (self.step, self.opt_state), "average": self.average}
        return kept if self.reference is None else {**kept, "reference": self.reference}

    def apply_gradients(self, gradients: PyTree, optimizer: Optimizer) -> TrainState:
        """The state after one minibatch.

        Raises:
          AssertionError: the step would change shapes or dtypes, and the update would be compiled again each time.
        """
        updates, opt_state = optimizer.transformation.update(gradients, self.opt_state, self.trained)
        trained = optax.apply_updates(self.trained, updates)
        chex.assert_trees_all_equal_shapes_and_dtypes(trained, self.trained)
        average = self.average
        if average is not None:
            average = optax.incremental_update(trained, average, 1.0 - optimizer.ema_decay)
        return dataclasses.replace(self, step=self.step + 1, trained=trained, opt_state=opt_state, average=average)


@flax.struct.dataclass
class ReferencedState(TrainState):
    """A state with a reference, which does not change: a run that goes on has the reference that it began with.

    It is a class of its own, because a checkpoint knows the fields of what it holds.
    """

    reference: PyTree = None
