"""The prompt: exact equivalence to tokens, and its mask."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CONFIG as TWO_LAYERS
from tiny_models import ONE_LAYER as CONFIG
from tiny_models import (
    apply_t5,
    as_model,
    fit_to,
    forward,
    random_batch,
    random_params,
    random_prompt,
)

from prompt_tuning.config import ConfigError
from prompt_tuning.decoding import decode
from prompt_tuning.model import prompt
from prompt_tuning.model.loss import loss_fn
from prompt_tuning.model.prompt import Prompt, no_prompt

MODEL = as_model(CONFIG)
GENERATE = jax.jit(decode.generate, static_argnums=0, static_argnames=("length", "num_decodes"))


@settings(max_examples=8, deadline=None)
@given(length=st.sampled_from([1, 9]), seed=st.integers(0, 99))
def test_a_prompt_of_token_embeddings_is_those_tokens(length, seed):
    params, batch = random_params(CONFIG), random_batch(seed=seed)
    ids = np.random.default_rng(seed).integers(3, 384, length).astype(np.int32)
    rows = np.asarray(params["token_embedder/embedding"])[ids]
    as_prompt = forward(CONFIG, params, rows, batch)
    tokens = batch["encoder_input_tokens"]
    front = np.broadcast_to(ids, (tokens.shape[0], length))
    prepended = {**batch, "encoder_input_tokens": np.concatenate([front, tokens], axis=1)}
    as_tokens = forward(CONFIG, params, np.zeros((0, 32), np.float32), prepended)
    np.testing.assert_array_equal(as_prompt, as_tokens)


def test_an_empty_prompt_is_no_prompt():
    params, batch = random_params(CONFIG), random_batch()
    empty = forward(MODEL, params, no_prompt(CONFIG), batch)
    valid = batch["encoder_input_tokens"] > 0
    x = apply_t5(MODEL, params, "embed", batch["encoder_input_tokens"])
    encoded = apply_t5(MODEL, params, "encode", x, valid)
    plain = apply_t5(
        MODEL,
        params,
        "decode",
        batch["decoder_input_tokens"],
        encoded,
        valid,
        target_valid=batch["decoder_target_tokens"] > 0,
    )
    np.testing.assert_array_equal(empty, plain)


def test_padding_behind_the_input_is_ignored_with_a_prompt():
    params, batch, rows = random_params(CONFIG), random_batch(), random_prompt(5)
    longer = dict(batch)
    longer["encoder_input_tokens"] = np.pad(batch["encoder_input_tokens"], ((0, 0), (0, 7)))
    real = np.asarray(batch["decoder_target_tokens"] > 0)
    plain, padded = (np.asarray(forward(CONFIG, params, rows, b))[real] for b in (batch, longer))
    np.testing.assert_allclose(padded, plain, atol=1e-4)


def test_the_order_of_the_rows_matters():
    params, batch, rows = random_params(CONFIG), random_batch(), random_prompt(5)
    turned = forward(CONFIG, params, rows[::-1], batch)
    assert np.abs(turned - forward(CONFIG, params, rows, batch)).max() > 1e-3


def test_a_prompt_has_the_dtype_of_the_input_it_stands_before():
    """One float32 array in front would run all of the encoder in float32."""
    rows, tokens = random_prompt(3), random_batch()["encoder_input_tokens"]
    text = jnp.zeros((*tokens.shape, CONFIG.embed_dim), jnp.bfloat16)
    x, _ = prompt.prepend_prompt(rows, text, tokens > 0)
    assert x.dtype == jnp.bfloat16
    model = as_model(dataclasses.replace(CONFIG, dtype="bfloat16"))
    encode = jax.jit(functools.partial(prompt.encode, model, random_params(model.config)))
    alone, member = (
        encode(Prompt(rows), tokens),
        encode(Prompt(rows[None]), tokens, jnp.zeros(4, int)),
    )
    np.testing.assert_array_equal(alone.states[0], member.states[0])


@pytest.mark.parametrize("members", [False, True])
def test_the_prompt_drops_out_as_the_text_does(members):
    """If layers add nothing, the output shows the masks: the same for all positions of a row."""
    config = dataclasses.replace(CONFIG, dropout_rate=0.5)
    params = {
        name: jnp.zeros_like(value) if name.endswith(("out/kernel", "wo/kernel")) else value
        for name, value in random_params(config).items()
    }
    rows, which = random_prompt(3), jnp.zeros(4, int) if members else None
    states = jax.jit(prompt.encode, static_argnums=0)(
        as_model(config),
        params,
        Prompt(rows[None] if members else rows),
        random_batch()["encoder_input_tokens"],
        which,
        dropout_key=jax.random.key(0),
    ).states
    stays = np.asarray(states != 0)
    assert 0.1 < stays[:, 0].mean() < 0.4  # of two masks, a half each
    np.testing.assert_array_equal(stays, np.broadcast_to(stays[:, :1], stays.shape))


def test_equals_the_original_implementation(shared_dir):
    model = as_model(TWO_LAYERS)
    folder = shared_dir / "goldens" / "t5x"
    params = {k: jnp.asarray(v) for k, v in np.load(folder / "params.npz").items()}
    inputs = np.load(folder / "golden.npz")
    batch = {k[3:]: jnp.asarray(v) for k, v in inputs.items() if k.startswith("in/")}
    expected = np.load(folder / "prompt_reference.npz")
    rows = jnp.asarray(expected["prompt"])
    # The original multiplies padded positions away, T5X's network does not: compare the others.
    real = np.asarray(batch["decoder_target_tokens"] > 0)
    logits = forward(model, params, rows, batch)
    scale = np.abs(expected["logits"]).max()
    found = np.asarray(logits)[real]
    np.testing.assert_allclose(found, expected["logits"][real], atol=1e-5 * scale)
    np.testing.assert_allclose(loss_fn(logits, batch)[0], expected["loss"], rtol=1e-5)
    grad = jax.jit(jax.grad(lambda p: loss_fn(forward(model, params, p, batch), batch)[0]))(rows)
    scale = np.abs(expected["grad_prompt"]).max()
    np.testing.assert_allclose(grad, expected["grad_prompt"], atol=1e-5 * scale)
    tokens = batch["encoder_input_tokens"]
    for beams, name in ((1, "greedy/decodes"), (2, "beam2/decodes")):
        ids, _ = GENERATE(model, params, Prompt(rows), tokens, length=8, num_decodes=beams)
        np.testing.assert_array_equal(ids, expected[name][:, -1])


def test_the_gradient_is_the_finite_difference():
    params, batch, rows = random_params(CONFIG), random_batch(), random_prompt(3)

    def loss(p):
        return loss_fn(forward(CONFIG, params, p, batch), batch)[0]

    both = jax.jit(jax.value_and_grad(loss))
    _, grad = both(rows)
    for seed in range(5):
        direction = jax.random.normal(jax.random.key(seed), rows.shape)
        direction /= jnp.linalg.norm(direction)
        h = 3e-2
        ahead, behind = (both(rows + by * direction)[0] for by in (h, -h))
        difference = (ahead - behind) / (2 * h)
        expected = jnp.vdot(grad, direction)
        assert abs(difference - expected) < 2e-3 * jnp.linalg.norm(grad)


@pytest.mark.parametrize("drops", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_attention_by_lengths_sees_what_masks_show(drops):
    """What cuDNN is asked for, computed by JAX's own kernel: loss and gradient of the prompt."""
    plain = dataclasses.replace(CONFIG, dtype="bfloat16", dropout_rate=0.3 * drops)
    by_length = fit_to(dataclasses.replace(plain, attention="cudnn"), jax.devices(), "gpu")
    params = {name: value.astype(jnp.bfloat16) for name, value in random_params(CONFIG).items()}
    batch, rows = random_batch(rows=8, inputs=30), random_prompt(5)

    def run(config):
        def loss(p):
            key = jax.random.key(7) if drops else None
            return loss_fn(forward(config, params, p, batch, dropout_key=key), batch)[0]

        value, gradient = jax.jit(jax.value_and_grad(loss))(rows)
        return float(value), np.asarray(gradient).ravel()

    def length(config):
        encode = functools.partial(prompt.encode, as_model(config))
        encoded, _ = jax.eval_shape(encode, params, Prompt(rows), batch["encoder_input_tokens"])
        return encoded.shape[1]

    wide = fit_to(plain, jax.devices(), "gpu")
    assert length(by_length) == length(wide) == 40
    (value, found), (same, wanted) = run(by_length), run(wide)
    assert value == pytest.approx(same, rel=2e-2)
    assert value != same  # another program
    cosine = found @ wanted / np.linalg.norm(found) / np.linalg.norm(wanted)
    assert cosine > 0.999


def test_attention_by_lengths_takes_rows_of_one_example():
    config = dataclasses.replace(CONFIG, dtype="bfloat16", attention="cudnn")
    packed = {"segments": jnp.ones((2, 8), jnp.int32)}
    with pytest.raises(ConfigError, match=r"PACK = False.*ATTENTION = 'xla'"):
        prompt.encode(
            fit_to(config, jax.devices(), "gpu"),
            random_params(CONFIG),
            Prompt(random_prompt(0)),
            jnp.ones((2, 8), jnp.int32),
            **packed,
        )
    with pytest.raises(ConfigError, match=r"NVIDIA.* cpu"):
        fit_to(config, jax.devices())


def test_positions_that_a_gpu_needs_change_nothing():
    """Its products of bfloat16 want multiples of 8: what is added is not valid, and not seen."""
    plain = dataclasses.replace(CONFIG, dtype="bfloat16")
    for_gpu = fit_to(plain, jax.devices(), "gpu")
    params = {name: value.astype(jnp.bfloat16) for name, value in random_params(CONFIG).items()}
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 9, (3, 21)))

    def encode(config):
        run = jax.jit(prompt.encode, static_argnums=0)
        encoded, valid = run(as_model(config), params, Prompt(random_prompt(5)), tokens)
        return np.asarray(encoded, np.float32), np.asarray(valid)

    (wide, more), (narrow, valid) = encode(for_gpu), encode(plain)
    assert wide.shape[1] == 32
    assert not more[:, 26:].any()
    np.testing.assert_array_equal(more[:, :26], valid)
    np.testing.assert_allclose(wide[:, :26][valid], narrow[valid], atol=0.05)
    batch = random_batch()
    counts = np.asarray(batch["decoder_loss_weights"]) > 0  # what does not sees all, and nothing
    both = [forward(config, params, random_prompt(5), batch) for config in (for_gpu, plain)]
    np.testing.assert_allclose(*(np.asarray(logits)[counts] for logits in both), atol=0.1)
