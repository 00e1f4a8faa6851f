"""Layers and adapters: results and gradients of flax's, what learns and what does not, one trace of those alike."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.models.compiler import call
from spo_jax.models.layers import Conv, Dense, GroupNorm, LayerNorm, low_rank
from spo_jax.models.lora import init_lora


def test_fresh_adapters_change_nothing_and_have_the_papers_spread():
    layer = Dense(64)
    x = jax.random.normal(jax.random.key(0), (5, 96))
    params = layer.init(jax.random.key(1), x)["params"]
    lora = init_lora(jax.random.key(2), {"to_q": params, "proj": params}, rank=8)
    assert set(lora) == {"to_q"}
    np.testing.assert_array_equal(
        layer.apply({"params": params}, x), layer.apply({"params": params, "lora": lora["to_q"]}, x)
    )
    np.testing.assert_allclose(lora["to_q"]["A"].std(), 1 / 8, rtol=0.1)
    strong = {"A": lora["to_q"]["A"], "B": jnp.ones((8, 64))}
    expected = layer.apply({"params": params}, x) + x @ strong["A"] @ strong["B"]
    np.testing.assert_allclose(layer.apply({"params": params, "lora": strong}, x), expected, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_adapters_have_the_gradients_of_their_product(dtype):
    keys = jax.random.split(jax.random.key(0), 4)
    x, a, b, cotangent = (
        jax.random.normal(key, shape) for key, shape in zip(keys, [(2, 5, 8), (8, 3), (3, 6), (2, 5, 6)], strict=True)
    )
    out, pull_back = jax.vjp(low_rank, x.astype(dtype), a, b)
    expected, expected_pull_back = jax.vjp(lambda x, a, b: x @ a @ b, x.astype(dtype).astype(jnp.float32), a, b)
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    for grad, wanted, x_dtype in zip(
        pull_back(cotangent), expected_pull_back(cotangent), (dtype, a.dtype, b.dtype), strict=True
    ):
        assert grad.dtype == x_dtype
        np.testing.assert_allclose(
            grad.astype(jnp.float32), wanted, rtol=1e-6 if x_dtype != jnp.bfloat16 else 2**-8, atol=1e-6
        )


@pytest.mark.parametrize(
    "layer, theirs, shape",
    [
        (Dense(6), nn.Dense(6), (2, 5, 8)),
        (Conv(6, (3, 3), 2, ((1, 1), (1, 1))), nn.Conv(6, (3, 3), strides=2, padding=1), (2, 6, 6, 8)),
        (GroupNorm(4, 1e-5), nn.GroupNorm(4, epsilon=1e-5, use_fast_variance=False), (2, 6, 6, 8)),
        (LayerNorm(1e-5), nn.LayerNorm(epsilon=1e-5, use_fast_variance=False), (2, 5, 8)),
    ],
    ids=["dense", "conv", "group norm", "layer norm"],
)
def test_layers_have_the_results_and_gradients_of_flax(layer, theirs, shape):
    x = jax.random.normal(jax.random.key(0), shape)
    params = layer.init(jax.random.key(1), x)

    def loss(module, params, x):
        return jnp.sin(module.apply(params, x)).sum()

    # Compiled, as they are used: by itself each product of a gradient may be computed in another order.
    gradient = jax.jit(jax.value_and_grad(loss, argnums=(1, 2)), static_argnums=0)
    ours, expected = (gradient(module, params, x) for module in (layer, theirs))
    if isinstance(layer, GroupNorm):  # adds the pixels of a channel first
        chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-6)
    else:
        chex.assert_trees_all_equal(ours, expected)


@pytest.mark.parametrize("argnums, barriers", [((0, 1), 1), (1, 0), (0, 0)], ids=["both", "input", "weights"])
def test_gradients_of_weights_are_made_first_where_they_learn_and_else_not_at_all(argnums, barriers):
    """Without a gradient that goes on, as in the first layer, there is nothing that could be made after theirs."""
    x, module = jnp.ones((2, 3)), Dense(4)
    params = module.init(jax.random.key(0), x)

    def grads(function):
        grad = jax.grad(jax.checkpoint(lambda params, x: function(params, x).sum()), argnums=argnums)
        text = str(jax.make_jaxpr(grad)(params, x))
        return {name: text.count(name) for name in ("dot_general", "optimization_barrier")}

    plain = grads(lambda params, x: x @ params["params"]["kernel"] + params["params"]["bias"])
    assert grads(module.apply) == plain | {"optimization_barrier": barriers}


class Modules(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x = x + Dense(4, name=f"layers_{i}")(x)
        return x


class Alike(nn.Module):
    remat: bool

    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x = x + call(self, Dense(4, parent=None), f"layers_{i}", x, remat=self.remat)
        return x


@pytest.mark.parametrize("remat", [False, True])
def test_layers_alike_are_traced_once_and_are_the_modules_they_stand_for(remat):
    x, modules, alike = jax.random.normal(jax.random.key(0), (2, 4)), Modules(), Alike(remat)
    params = modules.init(jax.random.key(1), x)
    chex.assert_trees_all_equal_shapes_and_dtypes(alike.init(jax.random.key(1), x), params)

    def gradient(module):
        return jax.grad(lambda params: jnp.sin(module.apply(params, x)).sum())(params)

    chex.assert_trees_all_close(gradient(alike), gradient(modules), rtol=1e-5)
    equations = jax.make_jaxpr(alike.apply)(params, x).eqns
    traces = [id(eqn.params["jaxpr"]) for eqn in equations if eqn.params.get("name") == "_call"]
    assert len(traces) == 3 and len(set(traces)) == 1
    captured = (module.apply(params, x, capture_intermediates=True)[1] for module in (alike, modules))
    chex.assert_trees_all_close(*captured)
