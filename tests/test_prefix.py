"""Keys and values in front of the layers' own: against float64, and as tokens that do not see."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_t5 import PlainT5
from tiny_models import CONFIG as TWO_LAYERS
from tiny_models import ONE_LAYER as CONFIG
from tiny_models import apply_t5, forward, random_batch, random_params, random_prompt

from prompt_tuning.decoding import decode
from prompt_tuning.methods.method import Frozen
from prompt_tuning.methods.table import METHODS
from prompt_tuning.model import loss, prompt, t5
from prompt_tuning.model.prompt import Prompt, no_prompt

# H x K is not D, and stacks of different depth.
ODD = dataclasses.replace(TWO_LAYERS, num_encoder_layers=3, num_heads=3, head_dim=5)
# What is true of any layer.
MODEL = t5.T5(CONFIG)
# Compiled: operation by operation, each is a program of its own.
ENCODE = jax.jit(prompt.encode, static_argnums=0, static_argnames="width")
DECODE = jax.jit(prompt.decode, static_argnums=0)
SCORE = jax.jit(loss.label_log_likelihoods, static_argnums=0)
SEARCH = jax.jit(decode.generate_all, static_argnums=(0, 4))
ENCODE_KEYS_VALUES = jax.jit(t5.encode_keys_values, static_argnums=0)
DECODE_KEYS_VALUES = jax.jit(t5.decode_keys_values, static_argnums=0)
INIT_CACHE = jax.jit(prompt.init_cache, static_argnums=0, static_argnames="length")
FIELDS = ("encoder", "decoder", "cross", "memory")
LENGTHS = {"encoder": 3, "decoder": 2, "cross": 4, "memory": 1}


def random_prefix(config=CONFIG, *, fields=FIELDS, seed=0, rows=0, lengths=None) -> Prompt:
    """A prompt of each of these fields, of another length each, and so many rows."""
    rng = np.random.default_rng(seed)
    shapes, lengths = {}, lengths or LENGTHS
    for name in fields:
        layers = config.num_encoder_layers if name == "encoder" else config.num_decoder_layers
        shapes[name] = (layers, 2, lengths[name], config.num_heads, config.head_dim)
        if name == "memory":
            shapes[name] = (lengths[name], config.embed_dim)
    arrays = {n: jnp.asarray(np.float32(rng.normal(size=s))) for n, s in shapes.items()}
    return Prompt(random_prompt(rows, config, seed=seed + 1), **arrays)


def layers_of(array) -> list:
    return [(layer[0], layer[1]) for layer in np.asarray(array, float)]


def plain_logits(params, config, given: Prompt, batch, row: int) -> np.ndarray:
    """What the reference makes of a row, whose padding it does not have."""
    plain = PlainT5(params, config)
    inputs = np.asarray(batch["encoder_input_tokens"])[row]
    targets = np.asarray(batch["decoder_input_tokens"])[row]
    x = np.concatenate([np.asarray(given.rows, float), plain.embed(inputs[inputs > 0])])
    states, _ = plain.encode(x, True, None if given.encoder is None else layers_of(given.encoder))
    cross = None if given.cross is None else layers_of(given.cross)
    if given.memory is not None:
        states = np.concatenate([np.asarray(given.memory, float), states])
    length = int((np.asarray(batch["decoder_target_tokens"])[row] > 0).sum())
    front = None if given.decoder is None else layers_of(given.decoder)
    return plain.decode(targets[:length], states, front, cross)


@pytest.mark.parametrize(
    ("targets", "fields"),
    [
        # Where keys are computed, each field alone is the same code as where they are absorbed.
        pytest.param(n, fields, id=f"{how}-{fields}", marks=[pytest.mark.slow] * one)
        for n, how in ((3, "absorbed"), (40, "plain"))
        for fields in ((), *((name,) for name in FIELDS), FIELDS)
        for one in [how == "plain" and len(fields) == 1]
    ],
)
def test_logits_are_those_of_attention_written_out(fields, targets):
    params, batch = random_params(ODD), random_batch(rows=2, inputs=9, targets=targets)
    given = random_prefix(ODD, fields=fields, rows=2)
    found = np.asarray(forward(ODD, params, given, batch))
    for row in range(2):
        expected = plain_logits(params, ODD, given, batch, row)
        np.testing.assert_allclose(found[row][: len(expected)], expected, atol=2e-4)


def test_a_prefix_of_tokens_is_those_tokens_which_do_not_see_the_input():
    """In the encoder, with the tokens' own outputs as memory, and in the decoder."""
    params, batch = random_params(CONFIG), random_batch(rows=1, inputs=9, targets=5)
    plain, ids = PlainT5(params, CONFIG), np.asarray([[7, 300, 12, 45]], np.int32)
    x, valid = params["token_embedder/embedding"][ids], jnp.ones((1, 4), bool)
    states, keys_values = ENCODE_KEYS_VALUES(MODEL, params, x, valid)
    given = no_prompt(CONFIG)._replace(encoder=keys_values[0], memory=states[0])
    inputs, targets = batch["encoder_input_tokens"], batch["decoder_input_tokens"]

    seen = np.ones((13, 13), bool)
    seen[:4, 4:] = False
    both = np.concatenate([ids[0], np.asarray(inputs[0])])
    encoded, own = plain.encode(plain.embed(both), seen)
    for n, layer in enumerate(own):
        for one, other in zip(layer, keys_values[0, n], strict=True):
            np.testing.assert_allclose(other, one[:4], atol=1e-5)
    found = ENCODE(MODEL, params, given, inputs)
    np.testing.assert_allclose(found.states[0], encoded[4:], atol=1e-5)
    logits = forward(MODEL, params, given, batch)[0]
    expected = plain.decode(np.asarray(targets[0]), encoded)
    np.testing.assert_allclose(logits, expected, atol=1e-4)

    # Tokens before the targets do not see these in any case.
    encoded = ENCODE(MODEL, params, no_prompt(CONFIG), inputs)
    front = DECODE_KEYS_VALUES(MODEL, params, x, *encoded)
    given = no_prompt(CONFIG)._replace(decoder=front[0])
    longer = jnp.concatenate([jnp.asarray(ids), targets], axis=1)
    expected = DECODE(MODEL, params, no_prompt(CONFIG), longer, encoded)[:, 4:]
    found = DECODE(MODEL, params, given, targets, encoded)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_shared_prompt_is_a_plain_one_that_does_not_see_the_input():
    """Its logits and their gradient, against attention under that mask written out."""
    params, batch = random_params(CONFIG), random_batch(rows=2, inputs=9, targets=5)
    plain, rows = PlainT5(params, CONFIG), np.asarray(random_prompt(4), np.float64)
    frozen = Frozen(CONFIG, params)
    rng = np.random.default_rng(0)
    lengths = (np.asarray(batch["decoder_target_tokens"]) > 0).sum(axis=1).tolist()
    weights = [rng.normal(size=(n, CONFIG.num_embeddings)) for n in lengths]

    def masked(rows):
        """The logits of each row of the batch."""
        logits = []
        for row, length in enumerate(lengths):
            inputs = np.asarray(batch["encoder_input_tokens"][row])
            x = np.concatenate([rows, plain.embed(inputs[inputs > 0])])
            seen = np.ones((len(x), len(x)), bool)
            seen[: len(rows), len(rows) :] = False
            targets = np.asarray(batch["decoder_input_tokens"][row])[:length]
            logits.append(plain.decode(targets, plain.encode(x, seen)[0]))
        return logits

    @jax.jit
    def shared(rows):
        given = METHODS["shared_prompt"].fold(None, {"prompt": rows}, frozen, None)
        return loss.forward(MODEL, params, given, batch)

    def total(rows):
        pairs = zip(shared(rows), lengths, weights, strict=True)
        return sum((logits[:n] * jnp.asarray(w, jnp.float32)).sum() for logits, n, w in pairs)

    start = jnp.asarray(rows, jnp.float32)
    for found, expected in zip(shared(start), masked(rows), strict=True):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found[: len(expected)], expected, rtol=0, atol=1e-5 * scale)
    gradient = np.asarray(jax.grad(total)(start), np.float64)
    for seed in range(3):
        step = 1e-5 * np.random.default_rng(seed).normal(size=rows.shape)
        ahead, behind = (
            sum((one * w).sum() for one, w in zip(masked(rows + by), weights, strict=True))
            for by in (step, -step)
        )
        error = (ahead - behind) / 2 - (gradient * step).sum()
        assert abs(error) <= 1e-5 * np.linalg.norm(gradient) * np.linalg.norm(step)


@pytest.mark.parametrize(
    "fields",
    [*(pytest.param((name,), marks=pytest.mark.slow) for name in FIELDS), FIELDS],
    ids=str,
)
def test_a_field_of_length_0_is_no_field(fields):
    params, batch = random_params(CONFIG), random_batch()
    empty = random_prefix(fields=fields, lengths=dict.fromkeys(FIELDS, 0))
    np.testing.assert_allclose(
        forward(MODEL, params, empty, batch),
        forward(MODEL, params, no_prompt(CONFIG), batch),
        atol=1e-6,
    )


# test_dropout_is_the_same... compares the gradients of both.
@pytest.mark.parametrize(
    "targets", [3, pytest.param(40, marks=pytest.mark.slow)], ids=["absorbed", "plain"]
)
def test_every_slot_has_a_gradient_of_its_own(targets):
    """With dropout as without, equal to a difference quotient where one is taken."""
    params, batch = random_params(CONFIG), random_batch(targets=targets)
    given = jax.tree.map(np.asarray, random_prefix(CONFIG, rows=1))

    def total(given, key=None, rate=0.0):
        model = t5.T5(dataclasses.replace(CONFIG, dropout_rate=rate))
        logits = loss.forward(model, params, given, batch, dropout_key=key)
        return loss.loss_fn(logits, batch)[0] / 100

    both = jax.jit(jax.value_and_grad(total))
    _, gradient = both(given)
    dropped = jax.jit(jax.grad(total), static_argnums=2)(given, jax.random.key(3), 0.1)
    for field in ("rows", *FIELDS):
        for found in (gradient, dropped):
            assert np.all(np.asarray(getattr(found, field)) != 0), field
    for field in FIELDS:
        direction = random_prefix(CONFIG, seed=9)
        step = jax.tree.map(np.zeros_like, given)
        step = step._replace(**{field: np.asarray(getattr(direction, field)) * np.float32(1e-2)})
        ahead, behind = (jax.tree.map(lambda x, d, s=s: x + s * d, given, step) for s in (1, -1))
        quotient = (both(ahead)[0] - both(behind)[0]) / 2
        slope = np.vdot(getattr(gradient, field), getattr(step, field))
        np.testing.assert_allclose(quotient, slope, rtol=2e-2)


def test_dropout_is_the_same_whether_keys_are_computed_or_absorbed(monkeypatch):
    config = dataclasses.replace(CONFIG, dropout_rate=0.3)
    params, batch = random_params(CONFIG), random_batch(targets=3)
    given = random_prefix(CONFIG, rows=1)

    def outcome():
        def total(given, params, batch):
            key = jax.random.key(1)
            logits = loss.forward(t5.T5(config), params, given, batch, dropout_key=key)
            return loss.loss_fn(logits, batch)[0]

        return jax.tree.leaves(jax.jit(jax.value_and_grad(total))(given, params, batch))

    absorbed = outcome()
    for module in ("t5", "layers"):
        monkeypatch.setattr(f"prompt_tuning.model.{module}.absorbs", lambda *sizes: False)
    jax.clear_caches()
    for one, other in zip(absorbed, outcome(), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * np.abs(other).max())


def mixed() -> tuple[list[Prompt], Prompt]:
    """Members of every kind and of different lengths, apart and together."""
    longer = {"encoder": 5, "decoder": 4, "cross": 1, "memory": 3}
    members = [
        random_prefix(rows=2),
        random_prefix(rows=3, fields=("encoder", "cross"), seed=5, lengths=longer),
        no_prompt(CONFIG),
        random_prefix(rows=0, fields=("decoder", "memory"), seed=7, lengths=longer),
    ]
    return members, prompt.stack_prompts(members)


@pytest.mark.parametrize(
    ("length", "decodes"),
    [
        (2, 3),
        pytest.param(2, 1, marks=pytest.mark.slow),
        pytest.param(30, 3, marks=pytest.mark.slow),
    ],
    ids=["absorbed", "absorbed, greedy", "plain"],
)
def test_a_mixed_batch_answers_as_separate_runs(length, decodes):
    members, together = mixed()
    params, which = random_params(CONFIG), jnp.asarray([3, 0, 1, 2])
    tokens = np.asarray(random_batch(rows=4)["encoder_input_tokens"])
    width = 12 + 3
    encoded = ENCODE(MODEL, params, together, tokens, which, width=width)
    search = decode.Search(length, decodes)
    found = SEARCH(MODEL, params, together, encoded, search, which)
    labels = random_batch(rows=3, targets=length, seed=4)["decoder_target_tokens"]
    ranked = SCORE(MODEL, params, together, encoded, labels, which)
    for row, member in enumerate(which.tolist()):
        own = members[member]
        alone = ENCODE(MODEL, params, own, tokens[row : row + 1])
        expected = SEARCH(MODEL, params, own, alone, search)
        np.testing.assert_array_equal(found[0][row], expected[0][0])
        np.testing.assert_allclose(found[1][row], expected[1][0], atol=1e-3)
        scores = SCORE(MODEL, params, own, alone, labels)
        np.testing.assert_allclose(ranked[row], scores[0], atol=1e-3)


def test_memory_that_was_read_once_is_read_the_same():
    params, batch, given = random_params(CONFIG), random_batch(), random_prefix(rows=1)
    read = prompt.read_memory(MODEL, params, given)
    assert (read.memory, read.cross.shape[2]) == (None, LENGTHS["cross"] + LENGTHS["memory"])
    expected = forward(MODEL, params, given, batch)
    np.testing.assert_allclose(forward(MODEL, params, read, batch), expected, atol=1e-5)
    assert prompt.read_memory(MODEL, params, no_prompt(CONFIG)).cross is None


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_a_prefix_is_cast_with_the_model(dtype):
    config = dataclasses.replace(CONFIG, dtype=dtype)
    params, batch = random_params(CONFIG), random_batch()
    cast = {name: value.astype(dtype) for name, value in params.items()}
    given = random_prefix(rows=2)
    encoded = ENCODE(t5.T5(config), cast, given, batch["encoder_input_tokens"])
    assert encoded.states.dtype == dtype
    found = forward(config, cast, given, batch)
    expected = forward(MODEL, params, given, batch)
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error < (1e-6 if dtype == "float32" else 5e-2)


@pytest.mark.parametrize(
    "length", [pytest.param(3, marks=pytest.mark.slow), 30], ids=["absorbed", "plain"]
)
def test_step_by_step_equals_all_at_once(length):
    model, params = t5.T5(TWO_LAYERS), random_params(TWO_LAYERS)
    batch, given = random_batch(targets=length), random_prefix(TWO_LAYERS, rows=2)
    encoded = ENCODE(model, params, given, batch["encoder_input_tokens"])
    tokens = batch["decoder_input_tokens"]
    expected = DECODE(model, params, given, tokens, encoded)
    cache = INIT_CACHE(model, params, given, encoded, length=length)
    assert ("encoded" in cache) == (length == 3)
    assert cache["self_key"].shape[2] == length  # prefixes are not in it
    for index in range(length):
        step = (tokens[:, index], cache, jnp.int32(index))
        logits, cache = apply_t5(model, params, "decode_step", *step)
        np.testing.assert_allclose(logits, expected[:, index], atol=1e-4)
