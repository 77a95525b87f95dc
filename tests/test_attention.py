"""The backward passes that are written by hand are those that JAX derives."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from tiny_models import CONFIG

from prompt_tuning.model import attention, layers


def draw(*shape, seed=0):
    return 3.0 * jax.random.normal(jax.random.key(seed), shape)


def gradients(function, *arguments):
    """Of a sum that weighs every output differently."""
    weights = draw(*jax.eval_shape(function, *arguments).shape, seed=9)
    total = jax.value_and_grad(
        lambda *given: (function(*given) * weights).sum(), tuple(range(len(arguments)))
    )
    return jax.jit(total)(*arguments)


def check(function, expected, *arguments):
    np.testing.assert_array_equal(jax.jit(function)(*arguments), jax.jit(expected)(*arguments))
    (value, found), (same, wanted) = (
        gradients(function, *arguments),
        gradients(expected, *arguments),
    )
    np.testing.assert_allclose(value, same, rtol=1e-6)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


def test_softmax_is_jaxs():
    logits = draw(2, 3, 5, 7).at[0, :, :, 4:].add(attention.MASKED)
    check(attention.softmax, jax.nn.softmax, logits)


def test_norm_is_flaxs():
    def flaxs(x, scale):
        norm = nn.RMSNorm(epsilon=attention.NORM_EPSILON, use_fast_variance=False)
        return norm.apply({"params": {"scale": scale}}, x)

    check(attention.rms_norm, flaxs, draw(2, 5, 32), draw(32, seed=1))


@pytest.mark.parametrize("activations", [("gelu", "linear"), ("relu",), ("silu", "linear")])
def test_activations_that_are_computed_again_are_the_same(activations):
    def plain(*parts):
        product = layers.ACTIVATIONS[activations[0]](parts[0])
        return product * parts[1] if len(parts) > 1 else product

    parts = [draw(2, 5, 8, seed=seed) for seed in range(len(activations))]
    check(lambda *given: layers.activate(activations, *given), plain, *parts)


def test_little_is_kept_for_the_backward_pass():
    """Of the width of the activations: of softmax its result, of a norm its input."""

    def kept(function, *arguments):
        _, backward = jax.vjp(function, *arguments)  # a tree of what it keeps
        return sorted(leaf.shape for leaf in jax.tree.leaves(backward))

    logits, x, scale = draw(2, 3, 5, 7), draw(2, 5, 32), draw(32)
    assert kept(attention.softmax, logits) == [(2, 3, 5, 7)]
    assert kept(attention.rms_norm, x, scale) == [(2, 5, 1), (2, 5, 32), (32,)]
    part = draw(2, 5, CONFIG.mlp_dim)
    gated = kept(lambda a, b: layers.activate(("gelu", "linear"), a, b), part, part + 1)
    assert gated == [part.shape] * 2
    assert len(kept(lambda a, b: nn.gelu(a) * b, part, part + 1)) > 2  # what it would be
