"""Products in bfloat16: exact sums, rounded once, without copies, in whatever order and size."""

import dataclasses

import hlo_text
import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CONFIG, fit_to

from prompt_tuning.model import loss, products, t5
from prompt_tuning.model.products import einsum
from prompt_tuning.model.prompt import Prompt

# What a T5 multiplies, forward and backward.
MODEL = {
    "logits": "BQHK,BSHK->BHQS",
    "values": "BHQS,BSHK->BHQK",
    "gradients of keys and values": "BQHK,BHQS->BHKS",
    "logits of one row": "...QHK,...SHK->...HQS",
    "values of one row": "...HQS,...SHK->...HQK",
    "gradients of one row's keys": "...QHK,...HQS->...HKS",
    "the source's logits": "BHQD,BSD->BHQS",
    "the source's values": "BHQS,BSD->BHQD",
    "gradient of a dense kernel": "aD,aF->DF",
    "gradient of a kernel of heads": "BQHK,BHQD->HKD",
}
FUNCTIONS = {
    "multiply": (products.multiply, "abD,DF->abF"),
    "multiply one row": (products.multiply, "aD,DF->aF"),
    "widen_heads": (products.widen_heads, "BQHK,DHK->BHQD"),
    "narrow_heads": (products.narrow_heads, "BHQD,DHK->BQHK"),
    "sum_queries": (products.sum_queries, "BZHQS,BZHQD->BSD"),
}
SIZES = st.fixed_dictionaries({c: st.sampled_from([1, 2, 3, 8, 17, 40]) for c in "abBDFHKQSZ"})


def draw(axes, sizes, seed):
    shape = [sizes[c] for c in axes]
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.bfloat16)


def check_rounded_once(array, exact):
    assert array.dtype == jnp.bfloat16
    scale = np.abs(exact).max()
    np.testing.assert_allclose(np.asarray(array, np.float64), exact, 2**-8, 1e-5 * scale)


@pytest.mark.parametrize("name", MODEL)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(sizes=SIZES)
def test_bfloat16_is_summed_in_float32_and_rounded_once(name, sizes):
    """To a rounding of what float64 gives."""
    of_x, of_y, _ = MODEL[name].replace("...", "").replace("->", ",").split(",")
    x, y = (draw(axes, sizes, seed) for seed, axes in enumerate((of_x, of_y)))
    product = jax.jit(lambda x, y: einsum(MODEL[name], x, y))(x, y)
    check_rounded_once(product, np.einsum(MODEL[name], *(np.float64(a) for a in (x, y))))


@pytest.mark.parametrize("name", FUNCTIONS)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(sizes=SIZES)
def test_functions_are_their_products(name, sizes):
    """Forward and for both gradients, where they have some, to a rounding of what float64 gives."""
    function, spec = FUNCTIONS[name]
    of_x, of_y, out = spec.replace("->", ",").split(",")
    x, y, g = (draw(axes, sizes, seed) for seed, axes in enumerate((of_x, of_y, out)))
    exact = [np.asarray(a, np.float64) for a in (x, y, g)]
    if name == "sum_queries":  # part of a backward pass
        check_rounded_once(jax.jit(function)(x, y), np.einsum(spec, *exact[:2]))
        return

    @jax.jit
    def both(x, y, g):
        value, back = jax.vjp(function, x, y)
        return value, *back(g)

    wanted = (
        np.einsum(spec, exact[0], exact[1]),
        np.einsum(f"{out},{of_y}->{of_x}", exact[2], exact[1]),
        np.einsum(f"{of_x},{out}->{of_y}", exact[0], exact[2]),
    )
    for array, value in zip(both(x, y, g), wanted, strict=True):
        check_rounded_once(array, value)


def test_what_xla_fails_on_is_avoided():
    """Of the product alone: if XLA fails on it, the installed version is known to."""
    weights, x = (draw(axes, dict.fromkeys("HQSK", 40), 3) for axes in ("HQS", "QHK"))
    spec = "QHK,HQS->SHK"
    plain = jax.jit(lambda x, w: jnp.einsum(spec, x, w, preferred_element_type=jnp.float32))
    failure = ""
    try:
        exact = np.einsum(spec, np.float64(x), np.float64(weights))
        np.testing.assert_allclose(plain(x, weights), exact, 1e-5, 1e-5 * np.abs(exact).max())
    except jax.errors.JaxRuntimeError as error:
        failure = str(error)
    known = jaxlib.version.__version_info__ < products.XLA_FAILS_BEFORE
    assert not failure or (known and "DotThunk" in failure)


@pytest.mark.parametrize("name", MODEL)
def test_what_accelerators_run_is_the_same(name):
    """There a product of bfloat16 is asked for in bfloat16: the branch that is not taken here."""
    of_x, of_y, _ = MODEL[name].replace("...", "").replace("->", ",").split(",")
    x, y = (draw(axes, dict.fromkeys("abBDFHKQSZ", 8), 3) for axes in (of_x, of_y))
    product = jax.jit(lambda x, y: jnp.einsum(MODEL[name], x, y, preferred_element_type=x.dtype))
    check_rounded_once(product(x, y), np.einsum(MODEL[name], *(np.float64(a) for a in (x, y))))


def test_float32_is_jaxs():
    x, y = (draw(a, dict.fromkeys("BQSHK", 8), 1).astype(jnp.float32) for a in ("BQHK", "BSHK"))
    expected = jnp.einsum("BQHK,BSHK->BHQS", x, y)
    np.testing.assert_allclose(einsum("BQHK,BSHK->BHQS", x, y), expected, rtol=1e-5, atol=1e-5)


def test_no_operand_is_copied_to_float32():
    """Neither forward nor backward; rounded results would have XLA's CPU compiler do it."""
    x, kernel = jnp.ones((8, 20, 64), jnp.bfloat16), jnp.ones((64, 96), jnp.bfloat16)

    def both(function, x, kernel):
        value, back = jax.vjp(lambda x: function(x, kernel), x)
        return back(value)

    def copies(function):
        text = jax.jit(lambda *pair: both(function, *pair)).lower(x, kernel).compile().as_text()
        return hlo_text.float32_copies(text, {kernel.shape})

    if jaxlib.version.__version_info__ < (0, 12):  # from there on `multiply` is needless for this
        assert copies(jnp.dot)
    assert not copies(products.multiply)


# XLA's CPU compiler takes a product for one that it has an instruction for, and fails when it runs,
# if others change its axes later: so whole steps, of sizes that it treats differently.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "inputs", "targets", "prompt", "processors"),
    [
        (2, 32, 1, 3, 2),
        (3, 7, 9, 100, 2),
        (1, 1, 1, 1, 1),
        (5, 40, 2, 20, 1),
        (8, 48, 70, 1, 1),
    ],
)
def test_steps_of_all_sizes_run_in_bfloat16(rows, inputs, targets, prompt, processors):
    """With the gradients of all weights, and near to those in float32."""
    rng = np.random.default_rng(0)
    tokens = [rng.integers(1, CONFIG.num_embeddings, (rows, n)) for n in (inputs, targets)]
    batch = {
        "encoder_input_tokens": jnp.asarray(tokens[0]),
        "decoder_input_tokens": jnp.asarray(np.roll(tokens[1], 1, axis=1)),
        "decoder_target_tokens": jnp.asarray(tokens[1]),
        "decoder_loss_weights": jnp.ones((rows, targets)),
    }
    start = jnp.asarray(rng.normal(size=(prompt, CONFIG.embed_dim)), jnp.float32)
    params = t5.init_params(CONFIG, jax.random.key(1))

    def run(dtype):
        config = dataclasses.replace(CONFIG, dtype=dtype, dropout_rate=0.0)
        model = fit_to(config, jax.devices()[:processors])
        cast = {name: value.astype(dtype) for name, value in params.items()}

        def total(cast, prompt):
            return loss.loss_fn(loss.forward(model, cast, Prompt(prompt), batch), batch)[0]

        gradients = jax.jit(jax.grad(total, (0, 1)))(cast, start)
        return np.concatenate([np.ravel(x).astype(np.float32) for x in jax.tree.leaves(gradients)])

    found, wanted = run("bfloat16"), run("float32")
    assert np.isfinite(found).all()
    assert found @ wanted > 0.99 * np.linalg.norm(found) * np.linalg.norm(wanted)
