"""Where each weight lies: rules by name, for parameters, adapters, optimizer state and averages alike.

A rule gives the ``PartitionSpec`` of the last axes of what its pattern matches: ``P("fsdp", None)`` splits the input
features of a kernel and leaves the axes before it whole. Output features are never split: the compiler would compute
split activations and send those, instead of gathering the weight. With ``config.mesh.fsdp = 1`` nothing is split.
Optimizers keep their moments under the names of the parameters, so the same rules hold for them.
"""

from __future__ import annotations

import re

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from spo_jax.errors import UserError

# The first rule whose pattern is found in the path "unet/down_blocks_0/.../to_q/kernel" counts.
RULES: tuple[tuple[str, P], ...] = (
    # Adafactor's second moments: a row and a column of each matrix.
    (r"/(v_row|v_col|v)/", P()),
    (r"(^|/)(bias|scale|logit_scale|class_embedding)$", P()),
    # Kernels from or to a few channels: images and latents.
    (r"(^|/)(conv_in|conv_out|quant_conv|post_quant_conv)/kernel$", P()),
    # UNet and autoencoder: attention, feed-forward, convolutions, time.
    (r"/(to_q|to_k|to_v|to_out_0|proj|net_2|proj_in|proj_out)/kernel$", P("fsdp", None)),
    (r"/(conv|conv1|conv2|conv_shortcut|time_emb_proj|linear_1|linear_2)/kernel$", P("fsdp", None)),
    # CLIP: attention, feed-forward, embeddings, projections, time layers of a step-aware one.
    (r"/(q_proj|k_proj|v_proj|out_proj|fc1|fc2)/kernel$", P("fsdp", None)),
    (r"/(token_embedding|position_embedding)/embedding$", P("fsdp")),
    (r"/patch_embedding/kernel$", P("fsdp")),  # its input features are three colours
    (r"(^|/)(text_projection|visual_projection)/kernel$", P("fsdp", None)),
    (r"/(mlp_0|mlp_2|adaLN_modulation_1)/kernel$", P("fsdp", None)),
    # Adapters: along the features of the layer, not along the rank.
    (r"(^|/)(conv_in|conv_out)/[AB]$", P()),
    (r"/A$", P("fsdp", None)),
    (r"/B$", P("fsdp")),
    # Counters.
    (r"(^|/)(step|count|mini_step|gradient_step)$", P()),
)


def partition_spec(path: str, shape: tuple[int, ...]) -> P:
    """The spec of the weight at ``path``, such as ``"unet/conv_in/kernel"``, with an entry for each axis.

    Raises:
      UserError: no rule knows the name.
    """
    for pattern, last_axes in RULES:
        if re.search(pattern, path):
            split = any(axis is not None for axis in last_axes)
            return P(*(None,) * (len(shape) - len(last_axes)), *last_axes) if split else P()
    raise UserError(
        f"No sharding rule knows the weight {path} of shape {tuple(shape)}; "
        "add one for its name to RULES in spo_jax/distributed/sharding.py."
    )


def weight_sharding(mesh: Mesh, path: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
    """Where the weight at ``path``, in parts as a tree has them, lies on the devices of ``mesh``.

    Raises:
      UserError: no rule knows it, or the axis that its rule splits is no multiple of ``config.mesh.fsdp``.
    """
    name, parts = "/".join(path), mesh.shape["fsdp"]
    spec = partition_spec(name, shape)
    for size, axis in zip(shape, spec, strict=False):
        if axis is not None and size % parts:
            raise UserError(
                f"config.mesh.fsdp = {parts} cannot split the weight {name} of shape {tuple(shape)}: "
                f"{size} is no multiple of {parts}; choose another config.mesh.fsdp."
            )
    return NamedSharding(mesh, spec)


def weight_shardings(mesh: Mesh, tree: PyTree) -> PyTree:
    """``weight_sharding`` of every array of a tree: parameters, or a training state."""
    return jax.tree_util.tree_map_with_path(lambda path, x: weight_sharding(mesh, path_names(path), x.shape), tree)


def gathered(weight: jax.Array) -> jax.Array:
    """Makes a weight that is split over devices whole on each of them, where it is used, in what ``jit_on`` compiles.

    Without this the compiler decides at each product whether to gather the weight or to loop over its parts (a
    "windowed einsum", which a TPU takes for large ones: hundreds of loops in a UNet). The gradient is constrained in
    the same way: each device computes that of its own samples, and their sum is scattered into the parts. Left to
    itself, a TPU's compiler sends the activations of all samples to the device that has a part of the weight.
    """
    if jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) == 1:
        return weight
    return jax.lax.with_sharding_constraint(weight, P())


def path_names(path: jax.tree_util.KeyPath) -> tuple[str, ...]:
    """A key path of ``jax.tree_util`` as names: of keys, attributes and positions."""
    return tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path)
