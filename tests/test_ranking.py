"""Words ranked in batches against words ranked one by one."""

import dataclasses
import functools

import hlo_text
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seqio
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tiny_models import ONE_LAYER as CONFIG
from tiny_models import evaluator_of, random_params, random_prompt

from prompt_tuning.batches import batching
from prompt_tuning.batches.groups import Cutting
from prompt_tuning.config import ConfigError, DataConfig, EvalConfig, Experiment
from prompt_tuning.evaluation import ranking
from prompt_tuning.evaluation.evaluate import Evaluator, evaluate
from prompt_tuning.model import loss, sharding, t5
from prompt_tuning.model.prompt import Encoded, Prompt, no_prompt
from prompt_tuning.planning import hlo
from prompt_tuning.tasks import registry, task_rows
from prompt_tuning.tasks.eval_task import EvalTask

MODEL = t5.T5(CONFIG)
LENGTHS = {"inputs": 16, "targets": 5}
WORDS = ("yes", "no", "maybe not")
RAGGED = (*(tuple("abcdefghi"[:n]) for n in (1, 9, 3)), ("yes", "nobody at all"))


@pytest.fixture(scope="module")
def task():
    registry.import_task_module("user_tasks")
    found = seqio.get_mixture_or_task("two_as")
    rows = task_rows.load_rows("two_as", "validation", LENGTHS, limit=11)
    targets = list(rows.target_texts)
    return EvalTask(found, rows, targets, label_words=WORDS)


@pytest.fixture(scope="module")
def ragged(task):
    """Every row with words of its own, from 1 to 9 of them."""
    words = tuple(RAGGED[row % len(RAGGED)] for row in range(len(task.rows)))
    return dataclasses.replace(task, label_words=(), row_words=words)


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG), Prompt(random_prompt(3))


@functools.cache  # compiled once
def make_evaluator(mesh=None, batch_size=8, inputs=16, **settings) -> Evaluator:
    experiment = Experiment(
        model_dir="unused",
        initial_checkpoint_path="unused",
        model=CONFIG,
        data=DataConfig(
            mixture_or_task_name="two_as",
            task_feature_lengths={**LENGTHS, "inputs": inputs},
            vocabulary="bytes",
            batch_size=batch_size,
        ),
        eval=EvalConfig(**{"method": "rank", **settings}),
    )
    return evaluator_of(experiment, mesh or sharding.make_mesh(1))


def one_device() -> Mesh:
    return Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))


@jax.jit
def log_likelihood(backbone, prompt, batch):
    return loss.sequence_log_likelihood(loss.forward(MODEL, backbone, prompt, batch), batch)


def one_by_one(params, task):
    """log p of every word of every row, a batch of one at a time, nothing padded."""
    found = []
    for row, ids in enumerate(ranking.word_ids(task)):
        scores = []
        for word in ids:
            targets = jnp.asarray([word])
            batch = {
                "encoder_input_tokens": jnp.asarray(task.rows.inputs[row])[None],
                "decoder_input_tokens": jnp.pad(targets, ((0, 0), (1, 0)))[:, :-1],
                "decoder_target_tokens": targets,
                "decoder_loss_weights": jnp.ones(targets.shape),
            }
            scores.append(float(log_likelihood(*params, batch)[0]))
        found.append(scores)
    return found


@pytest.mark.parametrize("which", [pytest.param("task", marks=pytest.mark.slow), "ragged"])
def test_words_ranked_in_batches_are_words_ranked_one_by_one(which, request, params):
    task = request.getfixturevalue(which)
    expected = one_by_one(params, task)
    found = ranking.rank(make_evaluator(), params, task)
    assert [len(row) for row in found] == [len(task.words(row)) for row in range(len(task.rows))]
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(expected), rtol=1e-5)
    answered = evaluate(make_evaluator(), params, task).outputs["rank"]
    best = [task.words(row)[int(np.argmax(scores))] for row, scores in enumerate(expected)]
    assert answered == best


def test_scores_depend_neither_on_the_batch_nor_on_the_order_of_rows(ragged, params):
    both = make_evaluator(method="both")
    whole = evaluate(both, params, ragged)
    other = evaluate(make_evaluator(one_device(), batch_size=3, method="both"), params, ragged)
    assert other.outputs == whole.outputs
    assert other.metrics == whole.metrics
    order = np.random.default_rng(0).permutation(len(ragged.rows))
    mixed = evaluate(both, params, reordered(ragged, order))
    for method in ("generate", "rank"):
        assert mixed.outputs[method] == [whole.outputs[method][i] for i in order]
    assert mixed.metrics == pytest.approx(whole.metrics)


def reordered(task, order):
    lists = ("inputs", "targets", "input_texts", "target_texts", "examples")
    rows = {name: [getattr(task.rows, name)[i] for i in order] for name in lists}
    return dataclasses.replace(
        task,
        rows=dataclasses.replace(task.rows, **rows),
        targets=[task.targets[i] for i in order],
        row_words=tuple(task.row_words[i] for i in order),
    )


@pytest.fixture(scope="module")
def alone(ragged, params):
    return evaluate(make_evaluator(one_device(), method="both"), params, ragged)


@pytest.mark.skipif(len(jax.devices()) != 8, reason="needs 8 devices")
@pytest.mark.parametrize(
    "shape",
    [(2, 4), *(pytest.param(m, marks=pytest.mark.slow) for m in ((8, 1), (4, 2), (1, 8)))],
    ids=str,
)
def test_eight_devices_score_as_one_does(shape, ragged, params, alone):
    mesh = sharding.make_mesh(shape[1])
    assert tuple(mesh.shape.values()) == shape
    shardings = sharding.param_shardings(params[0], mesh)
    placed = (
        jax.device_put(params[0], shardings),
        jax.device_put(params[1], sharding.replicated(mesh)),
    )
    eight = evaluate(make_evaluator(mesh, method="both"), placed, ragged)
    assert eight.outputs == alone.outputs
    assert eight.metrics == alone.metrics
    for row, expected in zip(eight.rows, alone.rows, strict=True):
        assert row["label_scores"] == pytest.approx(expected["label_scores"], rel=1e-5)


@pytest.fixture(scope="module")
def long_and_short(task):
    """Rows of 2 to 64 tokens in no order, so that batches of like length have several widths."""
    random = np.random.default_rng(3)
    inputs = [random.integers(3, 259, n).astype(np.int32) for n in random.integers(2, 65, 24)]
    rows = dataclasses.replace(
        task.rows,
        **{
            name: getattr(task.rows, name)[:1] * 24
            for name in ("targets", "input_texts", "target_texts", "examples")
        },
        inputs=inputs,
    )
    return dataclasses.replace(task, rows=rows, targets=list(rows.target_texts))


@pytest.mark.slow
def test_rows_grouped_by_length_are_answered_as_rows_of_one_width(long_and_short, params):
    """Whole width, order of the file: the same words, the same texts, log p to 1e-5."""
    evaluator = make_evaluator(one_device(), inputs=64, method="both")
    grouped = evaluate(evaluator, params, long_and_short)
    widths = {tokens.shape for tokens, _ in evaluator.batches(long_and_short.rows)}
    assert len(widths) > 1
    rows = long_and_short.rows
    whole = jnp.asarray(
        batching.pad_batch(rows.inputs, rows.targets, 64, 5)["encoder_input_tokens"]
    )
    tokens, _ = evaluator.generate(*params, whole, np.arange(24, dtype=np.int32))
    texts = [long_and_short.vocabulary.decode(np.asarray(row).tolist()) for row in tokens]
    assert grouped.outputs["generate"] == texts
    encoded = evaluator.encode(*params, whole)
    ids = ranking.word_ids(long_and_short)
    (chunk,) = ranking.make_packing(ids, 24, parts=1).chunks(ids)
    assert chunk.used == [(k, k // len(WORDS)) for k in range(24 * len(WORDS))]
    scores = np.asarray(evaluator.score_pairs(*params, encoded, chunk.row, chunk.tokens))
    found = np.concatenate(ranking.rank(evaluator, params, long_and_short))
    np.testing.assert_allclose(found, scores, rtol=1e-5)
    best = scores.reshape(24, -1).argmax(axis=1)
    assert grouped.outputs["rank"] == [WORDS[i] for i in best]


@pytest.mark.slow  # test_step.py has its gradient
def test_the_loss_of_length_groups_is_that_of_rows_of_one_width(long_and_short, params):
    rows, how = [long_and_short.rows], {"seed": 0, "step": 0, "batch_size": 24}
    cutting = Cutting(inputs=64, targets=5, fewest=4, most=4)
    groups = batching.train_groups(rows, [1.0], cutting, **how)
    assert len({group["encoder_input_tokens"].shape for group in groups}) == 4

    @jax.jit
    def total(batch):
        return loss.loss_fn(loss.forward(MODEL, *params, batch), batch)[1]

    whole = batching.train_batch(rows, [1.0], lengths={"inputs": 64, "targets": 5}, **how)
    assert whole["encoder_input_tokens"].shape == (24, 64)
    sums = jax.tree.map(lambda *parts: sum(parts), *map(total, groups))
    for name, value in total(whole).items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-5, err_msg=name)


def test_targets_do_not_reach_the_answers(task, params):
    rows = task.rows
    other = dataclasses.replace(
        rows,
        targets=[np.asarray([9, 1], np.int32)] * len(rows),
        target_texts=["no"] * len(rows),
    )
    changed = dataclasses.replace(task, rows=other, targets=["no"] * len(rows))
    evaluator = make_evaluator(method="both")
    assert evaluate(evaluator, params, changed).outputs == evaluate(evaluator, params, task).outputs


def test_a_model_that_knows_nothing_ranks_by_length(task, params):
    """Logits of 0: every token has the probability 1 / V, so log p is -length log V."""
    ignorant = {**params[0], "decoder/decoder_norm/scale": jnp.zeros(CONFIG.embed_dim)}
    uniform = -np.log(CONFIG.num_embeddings)
    lengths = np.array([4, 3, 10])  # bytes and an end-of-sequence
    sums = ranking.rank(make_evaluator(), (ignorant, params[1]), task)
    np.testing.assert_allclose(sums, [lengths * uniform] * len(task.rows), rtol=1e-5)
    means = ranking.rank(make_evaluator(rank_score="mean"), (ignorant, params[1]), task)
    np.testing.assert_allclose(means, np.full((len(task.rows), 3), uniform), rtol=1e-5)
    assert set(evaluate(make_evaluator(), (ignorant, params[1]), task).outputs["rank"]) == {"no"}


def test_few_shapes_are_compiled_whatever_the_words(ragged, params):
    evaluator = make_evaluator.__wrapped__()
    ranking.rank(evaluator, params, ragged)
    widths = {len(ids) for row in ranking.word_ids(ragged) for ids in row}
    assert widths == {2, 4, 14}
    assert evaluator.score_pairs._cache_size() <= 2
    assert evaluator.encode._cache_size() == 1


def test_a_row_stays_within_one_chunk():
    words = [[(5,)] * n for n in (3, 2, 4, 1, 1, 4)]
    found = list(ranking.Packing(parts=1, rows=6, size=6, longest=1).chunks(words))
    assert [[row for _, row in chunk.used] for chunk in found] == [
        [0, 0, 0, 1, 1],
        [2, 2, 2, 2, 3, 4],
        [5, 5, 5, 5],
    ]
    assert {chunk.row.shape for chunk in found} == {(1, 6)}


@given(
    words=st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=9), min_size=1, max_size=8),
    parts=st.sampled_from([1, 2, 4, 8]),
)
def test_every_word_is_ranked_once_on_the_device_of_its_row(words, parts):
    """Also where the last batch is not full; a row's words keep their order."""
    ids = [[(row + 1,) * length for length in lengths] for row, lengths in enumerate(words)]
    packing = ranking.make_packing(ids, 8, parts)
    found = [[] for _ in ids]
    for chunk in packing.chunks(ids):
        tokens = iter(chunk.tokens)
        for part, rows in enumerate(chunk.row):
            for row, word in zip(rows, tokens, strict=False):
                if word.any():
                    found[part * packing.rows + row].append(tuple(word[word > 0].tolist()))
        assert [(part, row) for part, row in chunk.used] == [
            (k, chunk.row.flat[k] + k // packing.size * packing.rows)
            for k, word in enumerate(chunk.tokens)
            if word.any()
        ]
    assert found == ids


def test_words_that_cannot_be_ranked_are_refused(task):
    silent = dataclasses.replace(task, label_words=(), row_words=((),) * len(task.rows))
    with pytest.raises(ConfigError, match="row 0 of two_as"):
        ranking.word_ids(silent)


def test_probabilities_that_are_not_numbers_are_refused(task, params):
    broken = {**params[0], "decoder/decoder_norm/scale": jnp.full(CONFIG.embed_dim, jnp.nan)}
    with pytest.raises(FloatingPointError, match="33 of 33"):
        ranking.rank(make_evaluator(), (broken, params[1]), task)


@pytest.mark.parametrize("words", [2, 6])
def test_the_keys_of_a_row_are_computed_once_for_all_of_its_words(words):
    """The products of a chunk, counted: those of the encoder's positions are the rows', not K's.

    For few words there are none: their own products with the kernels are fewer.
    """
    rows, pairs, s, t = 2, 2 * words, 24, 3
    struct = jax.ShapeDtypeStruct
    encoded = Encoded(struct((rows, s, CONFIG.embed_dim), np.float32), struct((rows, s), bool))
    lowered = jax.jit(functools.partial(loss.pair_log_likelihoods, MODEL)).lower(
        t5.param_shapes(CONFIG),
        no_prompt(CONFIG),
        encoded,
        struct((1, pairs), np.int32),
        struct((pairs, t), np.int32),
    )
    joined = CONFIG.num_heads * CONFIG.head_dim
    projection, mlp = CONFIG.embed_dim * joined, 3 * CONFIG.embed_dim * CONFIG.mlp_dim
    crossing, width = rows * s, joined
    if words == 2:
        crossing, width = pairs * t, CONFIG.num_heads * CONFIG.embed_dim
    weights = pairs * t * (6 * projection + mlp) + crossing * 2 * projection
    attention = 2 * pairs * (joined * t * t + width * t * s)
    logits = pairs * t * CONFIG.embed_dim * CONFIG.num_embeddings
    expected = 2 * (CONFIG.num_decoder_layers * (weights + attention) + logits)
    assert hlo_text.dot_flops(lowered.compile().as_text()) == expected


def collectives(mesh, function, *arguments):
    """What the devices send each other in a program: operation and shape."""
    shapes = t5.param_shapes(CONFIG)
    places = sharding.param_shardings(shapes, mesh)
    backbone = {name: one.update(sharding=places[name]) for name, one in shapes.items()}
    text = function.lower(backbone, *arguments).compile().as_text()
    found = [
        one for one in hlo_text.instructions(text) if one.operation.startswith(hlo.COLLECTIVES)
    ]
    return [(one.operation.removesuffix("-start"), one.shape) for one in found]


def split_rows(mesh, *shape, dtype=np.int32):
    where = NamedSharding(mesh, PartitionSpec("data"))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)


@pytest.mark.skipif(len(jax.devices()) != 8, reason="needs 8 devices")
@pytest.mark.parametrize("shape", [(8, 1), (4, 2)], ids=str)
def test_no_device_is_sent_what_another_has_computed_of_a_row(shape):
    """Nothing but the scores is gathered, and nothing of the encoder's positions summed."""
    (data, model), rows, pairs, s, t = shape, 8, 6, 40, 3
    mesh = sharding.make_mesh(model)
    struct = functools.partial(split_rows, mesh)
    moved = collectives(
        mesh,
        make_evaluator(mesh).score_pairs,
        no_prompt(CONFIG),
        Encoded(struct(rows, s, CONFIG.embed_dim, dtype=np.float32), struct(rows, s, dtype=bool)),
        struct(data, pairs),
        struct(data * pairs, t),
    )
    assert [shape for kind, shape in moved if kind != "all-reduce"] == [(data * pairs,)]
    assert not [shape for _, shape in moved if s in shape]


@pytest.mark.skipif(len(jax.devices()) != 8, reason="needs 8 devices")
@pytest.mark.parametrize("beams", [1, 3])
def test_no_device_is_sent_what_another_generates(beams):
    """The answers are gathered, and what `top_k` chooses from; keys and values stay."""
    mesh = sharding.make_mesh(1)
    evaluator = make_evaluator(mesh, method="generate", num_decodes=beams)
    prompt = Prompt(jax.ShapeDtypeStruct((3, CONFIG.embed_dim), np.float32))
    struct = functools.partial(split_rows, mesh)
    moved = collectives(mesh, evaluator.generate, prompt, struct(8, 16), struct(8))
    assert moved
    assert max(len(shape) for _, shape in moved) <= 2
