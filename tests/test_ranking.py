"""Words ranked in batches against words ranked one by one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seqio
from jax.sharding import Mesh
from tiny_models import CONFIG, random_params, random_prompt

from prompt_tuning.config import ConfigError, DataConfig, EvalConfig, Experiment
from prompt_tuning.data import features, tasks
from prompt_tuning.model import loss, sharding
from prompt_tuning.scoring import ranking
from prompt_tuning.scoring.eval_task import EvalTask
from prompt_tuning.scoring.evaluate import Evaluator, evaluate

LENGTHS = {"inputs": 16, "targets": 5}
WORDS = ("yes", "no", "maybe not")
RAGGED = (*(tuple("abcdefghi"[:n]) for n in (1, 9, 3)), ("yes", "nobody at all"))


@pytest.fixture(scope="module")
def task():
    tasks.import_task_module("user_tasks")
    found = seqio.get_mixture_or_task("two_as")
    rows = features.load_rows("two_as", "validation", LENGTHS, limit=11)
    targets = list(rows.target_texts)
    return EvalTask(found, rows, targets, label_words=WORDS)


@pytest.fixture(scope="module")
def ragged(task):
    """Every row with words of its own, from 1 to 9 of them."""
    words = tuple(RAGGED[row % len(RAGGED)] for row in range(len(task.rows)))
    return dataclasses.replace(task, label_words=(), row_words=words)


@pytest.fixture(scope="module")
def params():
    return random_params(), random_prompt(3)


@functools.cache  # compiled once
def make_evaluator(mesh=None, batch_size=8, **settings) -> Evaluator:
    experiment = Experiment(
        model_dir="unused",
        initial_checkpoint_path="unused",
        model=CONFIG,
        data=DataConfig(
            mixture_or_task_name="two_as",
            task_feature_lengths=LENGTHS,
            vocabulary="bytes",
            batch_size=batch_size,
        ),
        eval=EvalConfig(**{"method": "rank", **settings}),
    )
    return Evaluator(experiment, mesh or sharding.make_mesh(1))


def one_device() -> Mesh:
    return Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))


@jax.jit
def log_likelihood(backbone, prompt, batch):
    return loss.sequence_log_likelihood(loss.forward(CONFIG, backbone, prompt, batch), batch)


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


@pytest.mark.parametrize("which", ["task", "ragged"])
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


def test_eight_devices_score_as_one_does(ragged, params):
    one = ranking.rank(make_evaluator(one_device()), params, ragged)
    mesh = sharding.make_mesh(2)
    shardings = sharding.param_shardings(params[0], mesh)
    placed = (
        jax.device_put(params[0], shardings),
        jax.device_put(params[1], sharding.replicated(mesh)),
    )
    assert mesh.size == 8
    eight = ranking.rank(make_evaluator(mesh), placed, ragged)
    np.testing.assert_allclose(np.concatenate(eight), np.concatenate(one), rtol=1e-5)


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
    found = list(ranking.chunks(words, 6, longest=1))
    assert [chunk.row[: chunk.used].tolist() for chunk in found] == [
        [0, 0, 0, 1, 1],
        [2, 2, 2, 2, 3, 4],
        [5, 5, 5, 5],
    ]
    assert {len(chunk.row) for chunk in found} == {6}


def test_words_that_cannot_be_ranked_are_refused(task):
    silent = dataclasses.replace(task, label_words=(), row_words=((),) * len(task.rows))
    with pytest.raises(ConfigError, match=r"row 0 of two_as cannot be ranked: its words are \(\)"):
        ranking.word_ids(silent)


def test_probabilities_that_are_not_numbers_are_refused(task, params):
    broken = {**params[0], "decoder/decoder_norm/scale": jnp.full(CONFIG.embed_dim, jnp.nan)}
    with pytest.raises(FloatingPointError, match="33 of 33 log probabilities are not finite"):
        ranking.rank(make_evaluator(), (broken, params[1]), task)
