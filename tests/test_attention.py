"""The backward passes that are written by hand are those that JAX derives."""

import dataclasses
import functools

import flax.linen as nn
import hlo_text
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CONFIG

from prompt_tuning.config import ModelConfig
from prompt_tuning.model import attention, layers
from prompt_tuning.model.device import ANY, Device, choose_device


def draw(*shape, seed=0):
    values = 3.0 * np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(values, jnp.float32)  # without a program for each shape


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


@pytest.mark.parametrize(("keys", "drops"), [("heads", 0), ("source", 0), ("source", 1)])
def test_attention_is_softmax_of_all_keys(keys, drops):
    """Of its value and all of its gradients, also where a row sees nothing, and of one bias."""
    dropped = [2.0 * (draw(2, 3, 1, 7, seed=4) > 0)] if drops else []
    bias = draw(2, 3, 5, 7, seed=3).at[0, :, :, 4:].add(attention.MASKED)
    bias = bias.at[1, :, 2].add(attention.MASKED)
    if keys == "heads":
        function, source = attention.attend, [draw(2, 7, 3, 8, seed=n) / 3 for n in (1, 2)]
        query, spec = draw(2, 5, 3, 8) / 3, ("BQHK,BSHK->BHQS", "BHQS,BSHK->BQHK")
    else:
        function, source = attention.attend_to_source, [draw(2, 7, 8, seed=1) / 3]
        query, spec = draw(2, 3, 5, 8) / 3, ("BHQK,BSK->BHQS", "BHQS,BSK->BHQK")

    def plain(query, *given):
        key, value = given[0], given[-2 - drops]
        weights = jax.nn.softmax(jnp.einsum(spec[0], query, key) + given[-1 - drops], axis=-1)
        return jnp.einsum(spec[1], weights * given[-1] if drops else weights, value)

    for shared in (bias, bias[:1], bias[:, :1], bias[1:, 1:2]):
        (value, found), (same, wanted) = (
            gradients(f, query, *source, shared, *dropped)
            for f in (lambda *given: function(*given).mean, plain)
        )
        np.testing.assert_allclose(value, same, rtol=1e-5)
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


def test_norm_is_flaxs():
    def flaxs(x, scale):
        norm = nn.RMSNorm(epsilon=layers.NORM_EPSILON, use_fast_variance=False)
        return norm.apply({"params": {"scale": scale}}, x)

    check(layers.rms_norm, flaxs, draw(2, 5, 32), draw(32, seed=1))


@pytest.mark.parametrize("activations", [("gelu", "linear"), ("relu",), ("silu", "linear")])
def test_activations_that_are_computed_again_are_the_same(activations):
    def plain(*parts):
        product = layers.ACTIVATIONS[activations[0]](parts[0])
        return product * parts[1] if len(parts) > 1 else product

    parts = [draw(2, 5, 8, seed=seed) for seed in range(len(activations))]
    check(lambda *given: layers.activate(activations, *given), plain, *parts)


def test_little_is_kept_for_the_backward_pass():
    """Of the width of the activations: of attention its weights, of a norm its input."""

    def kept(function, *arguments):
        _, backward = jax.vjp(function, *arguments)  # a tree of what it keeps
        return sorted(leaf.shape for leaf in jax.tree.leaves(backward))

    x, scale = draw(2, 5, 32), draw(32)
    query, key = draw(2, 5, 3, 4), draw(2, 7, 3, 4)
    heads = kept(
        lambda query, key: attention.attend(query, key, key, draw(1, 1, 5, 7)).mean, query, key
    )
    assert heads.count((2, 3, 5, 7)) == 1
    assert kept(layers.rms_norm, x, scale) == [(2, 5, 1), (2, 5, 32), (32,)]
    part = draw(2, 5, CONFIG.mlp_dim)
    gated = kept(lambda a, b: layers.activate(("gelu", "linear"), a, b), part, part + 1)
    assert gated == [part.shape] * 2
    assert len(kept(lambda a, b: nn.gelu(a) * b, part, part + 1)) > 2  # what it would be


@pytest.mark.parametrize("drops", [False, True])
def test_absorbed_attention_is_that_of_keys_and_values(drops):
    """Their gradients too, those of the kernels among them."""
    module = layers.Attention(dataclasses.replace(CONFIG, dropout_rate=0.3))
    x, source = draw(2, 3, CONFIG.embed_dim), draw(2, 7, CONFIG.embed_dim, seed=1)
    bias = draw(2, 1, 3, 7, seed=2).at[1, ..., 4:].add(attention.MASKED)
    mask = None
    if drops:
        mask = jax.random.bernoulli(jax.random.key(4), 0.7, (2, CONFIG.num_heads * 7))

    def of_keys(module, x, source):
        return module(x, module.keys_values(source), bias, mask=mask)

    def absorbed(module, x, source):
        return module.absorbed(x, source, bias, mask)

    params = module.init(jax.random.key(3), x, source, method=of_keys)["params"]

    def result(method, params, x, source):
        return module.apply({"params": params}, x, source, method=method)

    one, same = (
        jax.jit(functools.partial(result, m))(params, x, source) for m in (absorbed, of_keys)
    )
    np.testing.assert_allclose(one, same, atol=1e-5 * np.abs(same).max())
    (_, found), (_, wanted) = (
        gradients(functools.partial(result, method), params, x, source)
        for method in (absorbed, of_keys)
    )
    for mine, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5 * np.abs(other).max())


@given(st.integers(1, 5), st.integers(1, 4), st.lists(st.integers(1, 40), min_size=1, max_size=4))
@settings(max_examples=4, deadline=None)  # each compiles
def test_what_a_row_keeps_does_not_depend_on_the_rows_behind_it(rows, more, widths):
    config = dataclasses.replace(CONFIG, dropout_rate=0.4)
    names = {str(n): (1 + n % 2, width) for n, width in enumerate(widths)}
    keys = jax.random.split(jax.random.key(1), len(layers.mesh_splits(names)))
    few, many = (layers.draw_masks(config, keys, n, names) for n in (rows, rows + more))
    for name, (split, rest) in names.items():
        assert few[name].shape == (rows, split * rest)
        np.testing.assert_array_equal(few[name], many[name][:rows])


def test_dropout_keeps_its_share_and_the_mean():
    config = dataclasses.replace(CONFIG, dropout_rate=0.4)
    keys = jax.random.split(jax.random.key(0))
    kept = layers.draw_masks(config, keys, 100, {"a": (1, 300), "b": (4, 50)})
    for one in kept.values():
        share = float(one.mean())
        assert abs(share - 0.6) < 4 * (0.24 / one.size) ** 0.5
        x = jnp.ones((*one.shape[:1], 2, *one.shape[1:]))
        np.testing.assert_allclose(layers.drop(x, one, 0.4).mean(), share / 0.6, rtol=1e-5)
    assert abs(np.corrcoef(kept["a"][:, :200].ravel(), kept["b"].ravel())[0, 1]) < 0.03


def test_absorbed_attention_multiplies_the_targets_alone_by_kernels():
    """The products of a decoder, counted, are fewer up to the length that `absorbs` names."""

    def counted(targets, absorbed):
        module, source = layers.Attention(CONFIG), jax.ShapeDtypeStruct((1, 90, 32), np.float32)
        x = jax.ShapeDtypeStruct((1, targets, 32), np.float32)

        bias = jnp.zeros((1, 1, targets, 90))

        def look(module, x, source):
            if absorbed and not module.is_initializing():
                return module.absorbed(x, source, bias)
            return module(x, module.keys_values(source), bias)

        params = jax.eval_shape(
            functools.partial(module.init, method=look), jax.random.key(0), x, source
        )
        apply = functools.partial(module.apply, method=look)
        return hlo_text.dot_flops(jax.jit(apply).lower(params, x, source).compile().as_text())

    for targets in (1, 9, 10, 20):
        fewer = counted(targets, True) < counted(targets, False)
        assert fewer == attention.absorbs(CONFIG, targets, 90)


IN_PARTS = {"num_heads": 3, "head_dim": 8, "mlp_dim": 8, "embed_dim": 24, "num_embeddings": 8}


# All rows at once; some at a time; not as many in the last part; one at a time; more than a few.
@pytest.mark.parametrize(
    ("batch", "heads"),
    [
        pytest.param(*sizes, marks=[pytest.mark.slow] * (sizes in [(2, 3), (8, 13)]))
        for sizes in [(2, 3), (8, 3), (5, 6), (8, 13), (33, 13)]
    ],
)
def test_attention_in_parts_is_that_of_all_rows(batch, heads):
    """Rows that do not divide by their parts, a bias of one row or of each."""
    config = ModelConfig(
        **IN_PARTS | {"num_heads": heads}, num_encoder_layers=1, num_decoder_layers=1
    )
    rows = attention.rows_at_once(config, Device("processor"), batch, 40)
    query = draw(batch, 40, heads, 8)
    key, value = draw(batch, 50, heads, 8, seed=1), draw(batch, 50, heads, 8, seed=2)
    for shared in (1, batch):
        bias = draw(shared, heads, 40, 50, seed=4).at[-1, ..., 30:].add(attention.MASKED)

        def parts(*given, bias=bias):
            return attention.attend_in_parts(rows, given, bias)

        def whole(query, key, value, bias=bias):
            return attention.attend(query, key, value, bias).mean

        (one, found), (same, wanted) = (
            gradients(function, query, key, value) for function in (parts, whole)
        )
        np.testing.assert_allclose(one, same, rtol=1e-5)
        scale = max(float(np.abs(other).max()) for other in wanted)
        for mine, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(mine, other, atol=1e-5 * scale)


def test_attention_is_in_parts_on_one_processor_alone():
    devices = jax.devices()
    one, all_of_them = choose_device(CONFIG, devices[:1]), choose_device(CONFIG, devices)
    assert one == Device("processor")
    assert all_of_them == ANY
    assert attention.rows_at_once(CONFIG, all_of_them, 8, 228) == 8
    assert attention.rows_at_once(CONFIG, one, 8, 228) < 8
    assert attention.rows_at_once(CONFIG, one, 8, 1) == 8  # a step of decoding
    # What a device stands for.
    assert choose_device(CONFIG, devices, "gpu") == Device("gpu", "xla")
    assert choose_device(CONFIG, devices[:1], "tpu") == ANY


def test_attention_to_lengths_is_attention_with_a_mask():
    """JAX's kernel, to which cuDNN's is the same: values, and gradients of all that is read."""
    lengths, bias = jnp.asarray([7, 3]), draw(1, 3, 7, 7, seed=3)
    given = [draw(2, 7, 3, 8, seed=n) / 3 for n in range(3)]
    valid = jnp.arange(7) < lengths[:, None]

    def by_length(query, key, value, bias):
        return attention.attend_to_lengths(query, key, value, bias, lengths, "xla")

    def masked(query, key, value, bias):
        hidden = attention.attention_bias(attention.sees(valid, valid))
        return valid[..., None, None] * attention.attend(query, key, value, bias + hidden).mean

    (value, found), (same, wanted) = (gradients(f, *given, bias) for f in (by_length, masked))
    np.testing.assert_allclose(value, same, rtol=1e-5)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())
