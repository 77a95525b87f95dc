"""Decoding against T5X, against itself without a cache, and against brute force."""

import itertools

import hlo_text
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CONFIG, MODEL, apply_t5, random_batch, random_params, random_prompt

from prompt_tuning.config import Decoding
from prompt_tuning.decoding import beam, decode, sample
from prompt_tuning.model import prompt, t5
from prompt_tuning.model.prompt import Prompt, no_prompt


def encoded(params, tokens, rows):
    return jax.jit(prompt.encode, static_argnums=0)(MODEL, params, Prompt(rows), tokens)


@pytest.mark.parametrize(("targets", "absorbed"), [(6, True), (16, False)])
def test_step_by_step_equals_all_at_once(targets, absorbed):
    params, batch, rows = random_params(), random_batch(targets=targets), random_prompt(3)
    encoding, valid = encoded(params, batch["encoder_input_tokens"], rows)
    tokens = batch["decoder_input_tokens"]
    full = apply_t5(MODEL, params, "decode", tokens, encoding, valid)
    cache = t5.apply(t5.T5(CONFIG), params, "init_cache", encoding, valid, tokens.shape[1])
    assert ("encoded" in cache) == absorbed
    for i in range(tokens.shape[1]):
        logits, cache = apply_t5(MODEL, params, "decode_step", tokens[:, i], cache, jnp.int32(i))
        np.testing.assert_allclose(logits, full[:, i], atol=1e-4)


@pytest.mark.parametrize("decoding", [Decoding(), Decoding(method="sample")])
@pytest.mark.parametrize("length", [4, 16])
def test_what_the_encoder_gave_is_there_once_for_all_beams(decoding, length):
    """Of 3 rows with 4 beams nothing as long as the source has 12 rows."""
    params, batch = random_params(), random_batch(rows=3, inputs=23)
    encoding = encoded(params, batch["encoder_input_tokens"], random_prompt(3))
    assert encoding[0].shape == (3, 26, CONFIG.embed_dim)
    search = decode.Search(length, num_decodes=4, decoding=decoding)

    def run(params, encoding):
        return decode.generate_all(
            MODEL, params, no_prompt(CONFIG), encoding, search, numbers=jnp.arange(3)
        )

    text = jax.jit(run).lower(params, encoding).as_text(dialect="hlo")
    shapes = {i.shape for i in hlo_text.instructions(text) if 26 in i.shape}
    assert shapes
    assert not [shape for shape in shapes if shape[0] == 12], shapes


@pytest.mark.parametrize("beams", [1, 2])
def test_beam_search_equals_t5x(shared_dir, beams):
    folder = shared_dir / "goldens" / "t5x"
    params = {k: jnp.asarray(v) for k, v in np.load(folder / "params.npz").items()}
    expected = np.load(folder / "golden.npz")
    tokens = jnp.asarray(expected["in/encoder_input_tokens"])
    encoding = encoded(params, tokens, jnp.zeros((0, 32)))
    cache = t5.apply(t5.T5(CONFIG), params, "init_cache", *encoding, 8)

    def step(last, cache, index):
        return t5.apply(t5.T5(CONFIG), params, "decode_step", last, cache, index)

    sequences, scores = beam.beam_search(
        step, cache, 3, beams=beams, length=8, rules=beam.t5x_rules()
    )
    np.testing.assert_array_equal(sequences, expected[f"beam{beams}/decodes"])
    np.testing.assert_allclose(scores, expected[f"beam{beams}/scores"], rtol=1e-5)
    greedy, _ = sample.greedy(step, cache, 3, length=8)
    np.testing.assert_array_equal(greedy, expected["greedy/decodes"][:, 0])


def markov(seed, vocab=5):
    """A language with a memory of one token, as `step`; the cache holds each row's table."""
    table = jax.random.normal(jax.random.key(seed), (2, vocab, vocab)) * 2.0

    def step(last, cache, index):
        return cache["table"][jnp.arange(last.shape[0]), last], cache

    return step, {"table": table}, np.asarray(jax.nn.log_softmax(table))


def all_ended(log_p, length):
    """(tokens, log p) of every sequence that ends with token 1 within `length`."""
    for n in range(1, length + 1):
        for body in itertools.product([i for i in range(5) if i != 1], repeat=n - 1):
            tokens = (*body, 1)
            previous = (0, *tokens[:-1])
            yield tokens, sum(log_p[a, b] for a, b in zip(previous, tokens, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_wide_beams_find_what_brute_force_finds(seed):
    step, cache, log_p = markov(seed)
    length, beams = 3, 40
    sequences, scores = beam.beam_search(
        step, cache, 2, beams=beams, length=length, rules=beam.t5x_rules()
    )
    for row in range(2):
        ranked = sorted(
            (
                (float(p / ((5 + len(t)) / 6) ** 0.6), t + (0,) * (length - len(t)))
                for t, p in all_ended(log_p[row], length)
            ),
            reverse=True,
        )
        # 1 + 4 + 16 sequences end; the rest of the beams is empty.
        assert len(ranked) == 21
        np.testing.assert_allclose(scores[row, ::-1][:21], [s for s, _ in ranked], atol=1e-5)
        assert tuple(np.asarray(sequences[row, -1])) == ranked[0][1]


@pytest.mark.parametrize("seed", range(4))
def test_one_beam_and_greedy_follow_the_best_token(seed):
    step, cache, log_p = markov(seed)
    tokens, scores = sample.greedy(step, cache, 2, length=6)
    for row in range(2):
        last, total, expected = 0, 0.0, []
        for _ in range(6):
            best = int(log_p[row, last].argmax())
            total += log_p[row, last, best]
            expected.append(best)
            last = best
            if best == 1:
                break
        expected += [0] * (6 - len(expected))
        assert np.asarray(tokens[row]).tolist() == expected
        np.testing.assert_allclose(scores[row], total, rtol=1e-5)


def test_scores_ascend_and_nothing_follows_the_end():
    params, batch, rows = random_params(), random_batch(), random_prompt(3)
    encoding = encoded(params, batch["encoder_input_tokens"], rows)
    cache = t5.apply(t5.T5(CONFIG), params, "init_cache", *encoding, 6)

    def step(last, cache, index):
        logits, cache = t5.apply(t5.T5(CONFIG), params, "decode_step", last, cache, index)
        return logits.at[:, 1].add(4.0), cache  # make ends likely

    sequences, scores = beam.beam_search(step, cache, 4, beams=4, length=6, rules=beam.t5x_rules())
    assert (np.diff(scores, axis=1) >= 0).all()
    for tokens in np.asarray(sequences).reshape(-1, 6):
        end = np.flatnonzero(tokens == 1)
        assert len(end) <= 1
        if len(end):
            assert (tokens[end[0] + 1 :] == 0).all()


@pytest.mark.parametrize("method", ["greedy", "sample", "beam"])
def test_decoding_stops_when_every_row_has_ended(method):
    """One row ends with its second token, the other with its third; there is room for 20."""
    steps, ends = [], jnp.array([1, 2])
    cache = {"valid": jnp.ones((2, 1), bool)}

    def step(last, cache, index):
        jax.debug.callback(steps.append, index)
        likely = jnp.where(index < jnp.repeat(ends, len(last) // 2), 2, 1)
        return 50.0 * jax.nn.one_hot(likely, 5), cache

    if method == "greedy":
        tokens, _ = sample.greedy(step, cache, 2, length=20)
    elif method == "sample":
        keys = sample.row_keys(0, jnp.arange(2))
        how = {"num_decodes": 2, "length": 20, "decoding": Decoding(method="sample")}
        tokens = sample.temperature_sample(step, cache, keys, **how)[0][:, -1]
    else:
        rules = beam.t5x_rules()
        tokens = beam.beam_search(step, cache, 2, beams=1, length=20, rules=rules)[0][:, -1]
    jax.effects_barrier()
    assert np.asarray(tokens[:, :4]).tolist() == [[2, 1, 0, 0], [2, 2, 1, 0]]
    assert len(steps) == 3
