"""Sampling against T5X's samples, against exact probabilities, and row by row."""

import dataclasses
import functools
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from test_decode import markov
from tiny_models import ONE_LAYER as CONFIG
from tiny_models import (
    apply_t5,
    as_model,
    evaluator_of,
    load_data,
    random_batch,
    random_params,
    random_prompt,
)

from prompt_tuning.config import ConfigError, DataConfig, Decoding, EvalConfig, Experiment
from prompt_tuning.decoding import beam, decode
from prompt_tuning.decoding.sample import mask_logits, row_keys, temperature_sample
from prompt_tuning.evaluation.evaluate import evaluate
from prompt_tuning.model import sharding
from prompt_tuning.model.prompt import Prompt, encode, no_prompt
from prompt_tuning.world.assets import TINY_CONFIG

MODEL = as_model(CONFIG)
GOLDEN = np.load(Path(__file__).parent / "golden" / "t5x_samples.npz")
CASES = json.loads(GOLDEN["cases"].tobytes())
SEED = 5  # of the golden file


def table_step(last, cache, index):
    return cache["table"][jnp.arange(last.shape[0]), last], cache


# Compiled: operation by operation, each is a program of its own.
draw = jax.jit(
    temperature_sample, static_argnums=0, static_argnames=("num_decodes", "length", "decoding")
)


def decoding_of(options) -> tuple[Decoding, int]:
    options = {"rescale_log_probs": True, **options}  # T5X's default
    num_decodes = options.pop("num_decodes", 1)
    return Decoding(method="sample", **options), num_decodes


# Against T5X


@pytest.mark.parametrize(
    ("name", "draws"),
    [*((name, "alone") for name in CASES), ("hot", "joint"), ("topp", "joint")],
)
def test_samples_are_t5xs(name, draws):
    decoding, num_decodes = decoding_of(CASES[name])
    cache = {"table": jnp.asarray(GOLDEN["table"])}
    keys = jax.random.key(SEED) if draws == "joint" else row_keys(SEED, jnp.arange(3))
    tokens, scores = draw(
        table_step, cache, keys, num_decodes=num_decodes, length=7, decoding=decoding
    )
    np.testing.assert_array_equal(tokens, GOLDEN[f"{name}/{draws}/tokens"])
    np.testing.assert_allclose(scores, GOLDEN[f"{name}/{draws}/scores"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.0])
def test_beams_are_t5xs_for_every_alpha(alpha):
    tokens, scores = beam.beam_search(
        table_step,
        {"table": jnp.asarray(GOLDEN["table"])},
        3,
        beams=3,
        length=7,
        rules=beam.t5x_rules(alpha),
    )
    np.testing.assert_array_equal(tokens, GOLDEN[f"beam_{alpha}/tokens"])
    np.testing.assert_allclose(scores, GOLDEN[f"beam_{alpha}/scores"], rtol=1e-5)


# Against exact probabilities: every sequence of a vocabulary of five


LENGTH = 2
DRAWS = 4000


def exact(table, decoding):
    """The probability of every sequence of at most LENGTH tokens; token 1 ends one."""
    p = np.asarray(
        [[_allowed(np.asarray(row, np.float64), decoding) for row in rows] for rows in table]
    )
    found = []
    for rows in p:
        chances = {}
        for tokens in itertools.product(range(5), repeat=LENGTH):
            if tokens[0] == 1 and tokens[1] != 0:
                continue
            chance = rows[0, tokens[0]] * (1.0 if tokens[0] == 1 else rows[tokens[0], tokens[1]])
            chances[tokens] = chance
        found.append(chances)
    return found


def _allowed(logits, decoding):
    """The distribution that is drawn from, written without the code under test."""
    p = np.exp((logits - logits.max()) / decoding.temperature)
    p /= p.sum()
    order = np.argsort(-p)
    keep = len(p)
    if decoding.topk:
        keep = decoding.topk
    if decoding.topp:
        keep = int(np.searchsorted(np.cumsum(p[order]), decoding.topp)) + 1
    p[order[keep:]] = 0.0
    return p / p.sum()


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"temperature": 2.0}, marks=pytest.mark.slow),
        {"topk": 3},
        pytest.param({"topp": 0.5}, marks=pytest.mark.slow),
        {"topp": 0.9, "temperature": 2.0},
        pytest.param({"topp": 1.0}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_samples_have_the_exact_distribution(options):
    decoding = Decoding(method="sample", **options)
    _, cache, _ = markov(3)
    tokens, scores = draw(
        table_step,
        cache,
        row_keys(0, jnp.arange(2)),
        num_decodes=DRAWS,
        length=LENGTH,
        decoding=decoding,
    )
    log_p = np.asarray(jax.nn.log_softmax(cache["table"]))
    for row, chances in enumerate(exact(cache["table"], decoding)):
        assert sum(chances.values()) == pytest.approx(1.0)
        drawn = [tuple(sample) for sample in np.asarray(tokens[row]).tolist()]
        possible = {sequence: p for sequence, p in chances.items() if p > 0}
        assert set(drawn) <= set(possible)  # nothing outside the support, after the end only 0
        counts = {sequence: drawn.count(sequence) for sequence in possible}
        # Rare sequences together, as the test of fit asks.
        common = [s for s, p in possible.items() if p * DRAWS >= 5]
        observed = [counts[s] for s in common]
        expected = [possible[s] * DRAWS for s in common]
        rest = DRAWS - sum(observed), DRAWS - sum(expected)
        if rest[1] > 1e-6:
            observed, expected = [*observed, rest[0]], [*expected, rest[1]]
        if len(expected) > 1:
            expected = np.asarray(expected) * DRAWS / np.sum(expected)
            assert stats.chisquare(observed, expected).pvalue > 1e-4
        for sample, score in zip(drawn[:50], scores[row, :50], strict=True):
            total = log_p[row, 0, sample[0]]
            total += 0.0 if sample[0] == 1 else log_p[row, sample[0], sample[1]]
            np.testing.assert_allclose(score, total, rtol=1e-4, atol=1e-5)


def test_ties_at_the_edge_stay_together():
    logits = jnp.asarray([[2.0, 1.0, 1.0, 1.0, 0.0]])
    kept = mask_logits(logits, Decoding(method="sample", topk=2)) > -1e6
    assert kept.tolist() == [[True, True, True, True, False]]
    p = float(jax.nn.softmax(logits)[0, 0])
    for share, expected in ((p - 0.01, 1), (p + 0.01, 4), (0.999, 5)):
        kept = mask_logits(logits, Decoding(method="sample", topp=share)) > -1e6
        assert int(kept.sum()) == expected


# In the model


@pytest.mark.slow
def test_evaluation_draws_the_same_with_any_batch_size():
    data = DataConfig(
        mixture_or_task_name="tiny_mood",
        task_feature_lengths={"inputs": 40, "targets": 3},
        vocabulary="tiny",
        batch_size=8,
    )
    decoding = Decoding(method="sample", topk=20)
    run = Experiment(
        model_dir="out",
        initial_checkpoint_path="tiny",
        model=TINY_CONFIG,
        data=data,
        eval=EvalConfig(decoding=decoding, num_examples=12),
    )
    (task,) = load_data(run, train=False).eval_tasks
    mesh = sharding.make_mesh(1)
    params = random_params(TINY_CONFIG), no_prompt(TINY_CONFIG)
    outputs = []
    for size in (8, 16):
        other = dataclasses.replace(run, data=dataclasses.replace(data, batch_size=size))
        rows = evaluate(evaluator_of(other, mesh), params, task).rows
        outputs.append([row["output"] for row in rows])
    assert outputs[0] == outputs[1]
    assert len(set(outputs[0])) > 6


@functools.partial(jax.jit, static_argnums=2)
def sample(tokens, numbers, search):
    encoded = encode(MODEL, random_params(CONFIG), Prompt(random_prompt(3)), tokens)
    return decode.generate_all(
        MODEL, random_params(CONFIG), no_prompt(CONFIG), encoded, search, numbers=numbers
    )


SEARCH = decode.Search(6, 3, Decoding(method="sample", temperature=1.5))


def test_a_row_draws_the_same_in_any_batch():
    tokens = random_batch()["encoder_input_tokens"]
    numbers = jnp.arange(4)
    expected, scores = sample(tokens, numbers, SEARCH)
    order = jnp.asarray([2, 0, 3, 1])
    found, found_scores = sample(tokens[order], numbers[order], SEARCH)
    np.testing.assert_array_equal(found, expected[order])
    np.testing.assert_allclose(found_scores, scores[order], rtol=1e-5)
    # The same text as another row draws anew, and another seed does.
    other, _ = sample(tokens, numbers + 4, SEARCH)
    assert (np.asarray(other) != np.asarray(expected)).any(axis=(1, 2)).all()
    assert (np.diff(scores, axis=1) >= 0).all()


def test_scores_are_those_of_the_whole_sequence_without_a_cache():
    tokens = random_batch()["encoder_input_tokens"]
    drawn, scores = sample(tokens, jnp.arange(4), SEARCH)
    encoded, valid = jax.jit(encode, static_argnums=0)(
        MODEL, random_params(CONFIG), Prompt(random_prompt(3)), tokens
    )
    for k in range(3):
        targets = np.asarray(drawn)[:, k]
        inputs = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
        logits = apply_t5(MODEL, random_params(CONFIG), "decode", inputs, encoded, valid)
        log_p = jax.nn.log_softmax(logits)
        each = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
        ended = jnp.cumsum(inputs == 1, axis=1) > 0
        np.testing.assert_allclose(jnp.where(ended, 0, each).sum(1), scores[:, k], rtol=1e-4)


# Settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "sample", "topk": 2, "topp": 0.5}, "at most one, as in T5X"),
        ({"method": "sample", "temperature": -1.0}, "TEMPERATURE = -1.0: out of range"),
        ({"method": "sample", "topp": 1.5}, "TOPP = 1.5: out of range"),
        ({"method": "sample", "topk": -1}, "TOPK = -1: out of range"),
        ({"method": "sample", "alpha": 1.0}, "ALPHA is set (1.0), but DECODING is 'sample'"),
        ({"topk": 5}, "TOPK is set (5), but DECODING is 'beam'"),
        ({"seed": 5}, "DECODE_SEED is set (5), but DECODING is 'beam'"),
        ({"alpha": -1.0}, "ALPHA = -1.0: out of range"),
    ],
)
def test_impossible_settings(options, message):
    with pytest.raises(ConfigError) as error:
        Decoding(**options)
    assert message in str(error.value)
