"""The compiled programs of a training run, with the shapes of their arguments in place of arrays."""

from __future__ import annotations

import jax
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from spo_jax import methods
from spo_jax.planning.shapes import Shapes, device_bytes
from spo_jax.runs.assembly import Assembly, Program


def make_run(config: ConfigDict, mesh: Mesh | AbstractMesh) -> Assembly:
    """The run of a config on a mesh, which may be abstract as long as no program is compiled.

    Raises:
      UserError: there is no config of a model.
    """
    return methods.module_of(config.method, "assemble").assemble(config, mesh, Shapes())


def extra_bytes(program: Program, run: Assembly) -> int:
    """Bytes on a device of the arguments that are not ``run.resident``."""
    there = {id(leaf) for leaf in jax.tree.leaves(run.resident)}
    return device_bytes([leaf for leaf in jax.tree.leaves(program.arguments) if id(leaf) not in there])
