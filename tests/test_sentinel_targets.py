"""SENTINEL_TARGETS, the paper's "span corruption + sentinel": only what is asked for begins so."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CONFIG, evaluator_of, random_params

from prompt_tuning.config import TINY, DataConfig, EvalConfig, Experiment
from prompt_tuning.evaluation import ranking
from prompt_tuning.evaluation.evaluate import evaluate
from prompt_tuning.model import sharding
from prompt_tuning.model.prompt import Prompt
from prompt_tuning.serving.predictor import Predictor
from prompt_tuning.tasks import registry, task_rows
from prompt_tuning.tasks.eval_task import make_eval_task
from prompt_tuning.tasks.vocabulary import SentinelTargets, load_seqio_vocabulary
from prompt_tuning.vocabularies import vocabulary as serving_vocabulary


@pytest.mark.parametrize("spec", ["tiny", "bytes"])
def test_the_vocabulary_adds_the_first_sentinel_and_takes_it_off(spec: str):
    plain = load_seqio_vocabulary(spec)
    wrapped = SentinelTargets(plain)
    assert wrapped.encode("lovely soup") == [plain.vocab_size - 1, *plain.encode("lovely soup")]
    assert wrapped.encode_tf("lovely soup").numpy().tolist() == wrapped.encode("lovely soup")
    for ids in (wrapped.encode("lovely soup"), plain.encode("lovely soup")):
        assert wrapped.decode([*ids, 1]) == "lovely soup"
    assert (wrapped.eos_id, wrapped.vocab_size) == (1, plain.vocab_size)


def data(sentinel_targets: bool) -> DataConfig:
    return DataConfig(
        mixture_or_task_name="tiny_mood",
        task_feature_lengths={"inputs": 64, "targets": 8},
        vocabulary="tiny",
        sentinel_targets=sentinel_targets,
    )


@pytest.fixture(autouse=True)
def as_before():
    yield
    registry.register("tiny")


def test_a_task_is_asked_and_ranked_with_it():
    (plain,), (with_it,) = (task_rows.load_eval_rows(data(on), limit=4) for on in (False, True))
    first = load_seqio_vocabulary("tiny").vocab_size - 1
    for one, other in zip(plain.rows.targets, with_it.rows.targets, strict=True):
        assert other.tolist() == [first, *one.tolist()]
    for one, other in zip(plain.rows.inputs, with_it.rows.inputs, strict=True):
        np.testing.assert_array_equal(one, other)
    assert plain.rows.target_texts == with_it.rows.target_texts
    task = make_eval_task(with_it, EvalConfig(method="both"))
    words = ranking.word_ids(task)[0]
    assert all(ids[0] == first and ids[-1] == 1 for ids in words)
    assert task.postprocess(0, task.vocabulary.decode(list(words[0]))) == 0


def test_the_predictor_answers_as_evaluation_does():
    """Ranked and generated under the same prompt, from seqio's tokens there and from texts here."""
    model = dataclasses.replace(
        CONFIG, num_encoder_layers=1, num_decoder_layers=1, num_embeddings=512
    )
    params = random_params(model)
    # A model that answers with a sentinel, as one that was trained on span corruption.
    sentinel = load_seqio_vocabulary("tiny").vocab_size - 1
    head = params["decoder/logits_dense/kernel"]
    params["decoder/logits_dense/kernel"] = head.at[:, sentinel].multiply(8.0)
    prompt = np.random.default_rng(0).normal(size=(3, model.embed_dim)).astype(np.float32)
    (rows,) = task_rows.load_eval_rows(data(True), limit=6)
    texts = [example["inputs_pretokenized"].decode() for example in rows.rows.examples]
    predictor = Predictor(
        model,
        params,
        serving_vocabulary.load_vocabulary("tiny"),
        {"it": prompt},
        max_input_length=64,
        max_target_length=8,
        sentinel_targets=True,
    )
    experiment = Experiment(
        model_dir="unused",
        initial_checkpoint_path=TINY,
        model=model,
        data=dataclasses.replace(data(True), batch_size=8),
        eval=EvalConfig(method="both"),
    )
    task = make_eval_task(rows, experiment.eval)
    mesh = sharding.make_mesh(1, jax.devices()[:1])
    found = evaluate(
        evaluator_of(experiment, mesh), (params, Prompt(jnp.asarray(prompt))), task
    ).rows
    labels = rows.label_words
    scores = predictor.score(texts, labels, "it")
    expected = [[row["label_scores"][label] for label in labels] for row in found]
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)
    answers = predictor.generate_all(texts, "it")
    assert [one.text for (one,) in answers] == [row["output"] for row in found]
    plain = dataclasses.replace(predictor, sentinel_targets=False)
    assert not np.allclose(plain.score(texts, labels, "it"), scores, atol=1e-3)
