"""The loss: known values, weights, and T5X's normalised forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import ONE_LAYER as CONFIG
from tiny_models import as_model, forward, random_batch, random_params, random_prompt

from prompt_tuning.model import loss
from prompt_tuning.model.prompt import Prompt, encode

MODEL = as_model(CONFIG)


def logits_for(batch, seed=0):
    shape = (*batch["decoder_target_tokens"].shape, 384)
    return jax.random.normal(jax.random.key(seed), shape)


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary():
    batch = random_batch()
    tokens = float(batch["decoder_loss_weights"].sum())
    total, metrics = loss.loss_fn(jnp.zeros((4, 6, 384)), batch, z_loss=1e-4)
    log_v = np.log(384)
    np.testing.assert_allclose(metrics["cross_entropy"], tokens * log_v, rtol=1e-5)
    np.testing.assert_allclose(metrics["z_loss"], tokens * 1e-4 * log_v**2, rtol=1e-5)
    np.testing.assert_allclose(total, metrics["cross_entropy"] + metrics["z_loss"], rtol=1e-6)


def test_padding_has_no_weight():
    batch = random_batch()
    logits = logits_for(batch)
    noise = jnp.where(batch["decoder_loss_weights"][..., None] > 0, logits, logits * 17.0)
    assert loss.loss_fn(logits, batch)[0] == loss.loss_fn(noise, batch)[0]


def test_a_sum_over_rows_is_the_sum_of_rows():
    batch = random_batch()
    logits = logits_for(batch)
    whole = loss.loss_fn(logits, batch)[1]
    rows = [
        loss.loss_fn(logits[i : i + 1], {k: v[i : i + 1] for k, v in batch.items()})[1]
        for i in range(4)
    ]
    for name, value in whole.items():
        np.testing.assert_allclose(value, sum(float(r[name]) for r in rows), rtol=1e-5)


def test_smoothing_is_the_entropy_against_the_smoothed_target():
    batch = random_batch()
    logits, targets = logits_for(batch), batch["decoder_target_tokens"]
    smoothed, _ = loss.cross_entropy(logits, targets, label_smoothing=0.1)
    low = 0.1 / 383
    soft = jax.nn.one_hot(targets, 384) * (0.9 - low) + low
    plain = -(soft * jax.nn.log_softmax(logits)).sum(-1)
    entropy = -(soft * jnp.log(soft)).sum(-1)
    np.testing.assert_allclose(smoothed, plain - entropy, atol=1e-4)


def test_log_likelihood_is_a_product_of_probabilities():
    batch = random_batch()
    logits, targets = logits_for(batch), np.asarray(batch["decoder_target_tokens"])
    p = np.asarray(jax.nn.softmax(logits))
    scores = loss.sequence_log_likelihood(logits, batch)
    for row in range(4):
        real = [p[row, i, t] for i, t in enumerate(targets[row]) if t > 0]
        np.testing.assert_allclose(np.exp(scores[row]), np.prod(real), rtol=1e-4)


@pytest.mark.parametrize("at_once", [pytest.param(16, marks=pytest.mark.slow), 2])
def test_labels_scored_together_are_labels_scored_one_by_one(monkeypatch, at_once):
    """And some at a time, where there are many: the last part is filled up."""
    monkeypatch.setattr(loss, "MOST_LABELS", at_once)
    params, prompt, batch = random_params(CONFIG), random_prompt(3), random_batch()
    labels = np.array([[7, 8, 1], [9, 1, 0], [300, 1, 0]], np.int32)
    prompt = Prompt(prompt)
    encoded = jax.jit(encode, static_argnums=0)(
        MODEL, params, prompt, batch["encoder_input_tokens"]
    )
    score = jax.jit(functools.partial(loss.label_log_likelihoods, MODEL))
    together = score(params, prompt, encoded, jnp.asarray(labels))
    assert together.shape == (4, 3)
    for number, label in enumerate(labels):
        targets = jnp.tile(jnp.asarray(label), (4, 1))
        one = {
            "encoder_input_tokens": batch["encoder_input_tokens"],
            "decoder_input_tokens": jnp.pad(targets, ((0, 0), (1, 0)))[:, :-1],
            "decoder_target_tokens": targets,
            "decoder_loss_weights": (targets > 0).astype(jnp.float32),
        }
        logits = forward(CONFIG, params, prompt, one)
        alone = loss.sequence_log_likelihood(logits, one)
        np.testing.assert_allclose(together[:, number], alone, rtol=1e-5)
