"""The backbone against T5X's outputs, the published sizes, and its own invariances."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CONFIG, as_model, as_prompt, forward, random_batch, random_params

from prompt_tuning.config import ModelConfig
from prompt_tuning.model import attention, layers, t5
from prompt_tuning.model.loss import forward as plain_forward
from prompt_tuning.model.loss import loss_fn, sequence_log_likelihood

# encoder layers, decoder layers, heads, embed, mlp, parameters as published
PUBLISHED = {
    "small": (8, 8, 6, 512, 1024, 76_961_152),
    "base": (12, 12, 12, 768, 2048, 247_577_856),
    "large": (24, 24, 16, 1024, 2816, 783_150_080),
    "xl": (24, 24, 32, 2048, 5120, 2_849_757_184),
    "xxl": (24, 24, 64, 4096, 10240, 11_135_332_352),
}
NO_PROMPT = jnp.zeros((0, CONFIG.embed_dim))


@pytest.mark.slow  # operation by operation
def test_a_seed_gives_the_same_model_however_it_is_traced():
    key = jax.random.key(3)
    config = dataclasses.replace(CONFIG, num_encoder_layers=1, num_decoder_layers=1)
    expected = t5.init_params(config, key)
    for name, value in jax.jit(lambda key: t5.init_params(config, key))(key).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameter_counts_are_the_published_ones(size):
    encoder, decoder, heads, embed, mlp, count = PUBLISHED[size]
    config = ModelConfig(
        num_encoder_layers=encoder,
        num_decoder_layers=decoder,
        num_heads=heads,
        head_dim=64,
        embed_dim=embed,
        mlp_dim=mlp,
        num_embeddings=32128,
    )
    assert sum(s.size for s in t5.param_shapes(config).values()) == count


@pytest.fixture(scope="module")
def golden(shared_dir):
    folder = shared_dir / "goldens" / "t5x"
    params = {k: jnp.asarray(v) for k, v in np.load(folder / "params.npz").items()}
    arrays = dict(np.load(folder / "golden.npz"))
    batch = {k[3:]: jnp.asarray(v) for k, v in arrays.items() if k.startswith("in/")}
    return params, batch, arrays


def test_names_and_shapes_are_t5x(golden):
    params, _, _ = golden
    ours = {k: v.shape for k, v in t5.param_shapes(CONFIG).items()}
    assert ours == {k: v.shape for k, v in params.items()}


def test_logits_losses_and_scores_equal_t5x(golden):
    params, batch, arrays = golden
    logits = jax.jit(lambda p: forward(CONFIG, p, NO_PROMPT, batch))(params)
    scale = np.abs(arrays["logits"]).max()
    np.testing.assert_allclose(logits, arrays["logits"], atol=1e-5 * scale, rtol=0)
    for z, name in ((1e-4, "zloss1e-4"), (0.0, "zloss0")):
        loss, _ = loss_fn(logits, batch, z_loss=z)
        np.testing.assert_allclose(loss, arrays[f"loss/{name}"], rtol=1e-5)
    scores = sequence_log_likelihood(logits, batch)
    np.testing.assert_allclose(scores, arrays["score_batch"], rtol=1e-5)


def test_gradients_equal_t5x(golden):
    params, batch, arrays = golden
    loss = lambda p: loss_fn(forward(CONFIG, p, NO_PROMPT, batch), batch)[0]  # noqa: E731
    grads = jax.jit(jax.grad(loss))(params)
    for name, grad in grads.items():
        expected = arrays[f"grad/{name}"]
        scale = np.abs(expected).max()
        np.testing.assert_allclose(grad, expected, atol=1e-5 * scale, rtol=0, err_msg=name)


@settings(max_examples=10, deadline=None)
@given(extra=st.sampled_from([1, 7]), seed=st.integers(0, 100))
def test_padding_changes_nothing(extra, seed):
    params, batch = random_params(), random_batch(seed=seed)
    longer = dict(batch)
    longer["encoder_input_tokens"] = np.pad(batch["encoder_input_tokens"], ((0, 0), (0, extra)))
    plain = np.asarray(forward(CONFIG, params, NO_PROMPT, batch))
    padded = np.asarray(forward(CONFIG, params, NO_PROMPT, longer))
    real = np.asarray(batch["decoder_target_tokens"] > 0)
    np.testing.assert_allclose(padded[real], plain[real], atol=1e-4)


def test_rows_do_not_see_each_other():
    params, batch = random_params(), jax.tree.map(np.asarray, random_batch())
    together = np.asarray(forward(CONFIG, params, NO_PROMPT, batch))
    for row in range(4):
        one = {k: v[row : row + 1] for k, v in batch.items()}
        alone = np.asarray(forward(CONFIG, params, NO_PROMPT, one))
        np.testing.assert_allclose(alone[0], together[row], atol=1e-4)


def test_a_target_does_not_see_those_after_it():
    params, batch = random_params(), random_batch(targets=6)
    changed = dict(batch)
    tokens = batch["decoder_input_tokens"]
    changed["decoder_input_tokens"] = tokens.at[0, 4].set((tokens[0, 4] + 7) % 384)
    before = forward(CONFIG, params, NO_PROMPT, batch)
    after = forward(CONFIG, params, NO_PROMPT, changed)
    np.testing.assert_array_equal(after[0, :4], before[0, :4])
    assert np.abs(after[0, 4] - before[0, 4]).max() > 1e-3


def test_dropout_is_off_unless_asked_for_and_repeats_with_its_key():
    config = ModelConfig(**{**CONFIG.__dict__, "dropout_rate": 0.5})
    params, batch = random_params(), random_batch()
    off = forward(config, params, NO_PROMPT, batch)
    np.testing.assert_array_equal(off, forward(CONFIG, params, NO_PROMPT, batch))
    first, again, other = (
        forward(config, params, NO_PROMPT, batch, dropout_key=jax.random.key(k)) for k in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - off).max() > 1e-2
    assert np.abs(first - other).max() > 1e-2


def test_t5_drops_out_everywhere_with_one_mask_for_all_positions(monkeypatch):
    """And no two with the same mask, though layers are one function once compiled."""
    params, batch = random_params(), random_batch(rows=5)  # no other test has compiled such
    config = ModelConfig(**{**CONFIG.__dict__, "dropout_rate": 0.5})
    seen, drop = [], layers.drop

    def spied(x, kept, rate):
        out = drop(x, kept, rate)
        jax.debug.callback(lambda *pair: seen.append(pair), x, out, ordered=True)
        return out

    for module in (layers, t5):
        monkeypatch.setattr(module, "drop", spied)
    run = functools.partial(plain_forward, as_model(config), params, as_prompt(NO_PROMPT), batch)
    jax.jit(run)(dropout_key=jax.random.key(0))
    jax.effects_barrier()
    seen = [(np.asarray(before), np.asarray(after)) for before, after in seen]
    # T5X's places. Encoder: input, output, and in every layer attention weights, attention output,
    # MLP hidden, MLP output; decoder layers have two attentions.
    assert len(seen) == (2 + 4 * config.num_encoder_layers) + (2 + 6 * config.num_decoder_layers)
    masks = []
    for before, after in seen:
        kept = (after != 0) | (before == 0)
        np.testing.assert_allclose(after, np.where(kept, 2.0 * before, 0.0), rtol=1e-6)
        dropped = (after == 0) & (before != 0)
        assert 0.3 < dropped.mean() < 0.7
        if before.shape[-2] > 1:
            whole = ~(dropped.any(axis=-2) & (after != 0).any(axis=-2))
            assert whole.all(), "a mask that differs from position to position"
        masks.append(dropped.any(axis=-2))
    for one, other in itertools.combinations(masks, 2):
        assert one.shape != other.shape or 0.3 < (one == other).mean() < 0.7


@pytest.mark.slow
def test_dropout_draws_as_often_for_many_layers_as_for_one(monkeypatch):
    """Its draws are a loop over the layers: what is compiled does not grow with them."""
    traced, draw_masks = [], t5.draw_masks

    def spied(*args):
        traced.append(args)
        return draw_masks(*args)

    monkeypatch.setattr(t5, "draw_masks", spied)
    counts = []
    for count in (1, 3):
        config = dataclasses.replace(
            CONFIG, num_encoder_layers=count, num_decoder_layers=count, dropout_rate=0.5
        )
        run = functools.partial(
            plain_forward, as_model(config), random_params(config), as_prompt(NO_PROMPT)
        )
        traced.clear()
        jax.make_jaxpr(lambda key, run=run: run(random_batch(), dropout_key=key))(jax.random.key(0))
        counts.append(len(traced))
    assert counts[0] == counts[1] > 0


@given(st.integers(1, 200))
@settings(max_examples=20, deadline=None)
def test_buckets_are_symmetric_and_monotone(length):
    both = attention.relative_position_buckets(
        length, length, bidirectional=True, num_buckets=32, max_distance=128
    )
    after, before = both[0], both[:, 0]
    assert (after[1:] == before[1:] + 16).all()
    assert (np.diff(before) >= 0).all()
    assert before.max() <= 15
    causal = attention.relative_position_buckets(
        length, length, bidirectional=False, num_buckets=32, max_distance=128
    )
    assert (np.diff(causal[:, 0]) >= 0).all()
    assert (causal[0] == 0).all()
    assert causal.max() <= 31


def test_bfloat16_is_close_to_float32():
    config = ModelConfig(**{**CONFIG.__dict__, "dtype": "bfloat16"})
    params, batch = random_params(), random_batch()
    full = forward(CONFIG, params, NO_PROMPT, batch)
    half = forward(config, params, NO_PROMPT, batch)
    assert half.dtype == jnp.float32
    cosine = jnp.vdot(full, half) / jnp.linalg.norm(full) / jnp.linalg.norm(half)
    assert cosine > 0.99
