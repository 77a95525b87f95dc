"""SENTINEL_TARGETS, the paper's "span corruption + sentinel": only what is asked for begins so."""

import numpy as np
import pytest

from prompt_tuning.config import DataConfig, EvalConfig
from prompt_tuning.data import features, tasks
from prompt_tuning.data.vocabulary import SentinelTargets, load_vocabulary
from prompt_tuning.scoring import ranking
from prompt_tuning.scoring.eval_task import make_eval_task


@pytest.mark.parametrize("spec", ["tiny", "bytes"])
def test_the_vocabulary_adds_the_first_sentinel_and_takes_it_off(spec: str):
    plain = load_vocabulary(spec)
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
    tasks.register("tiny")


def test_a_task_is_asked_and_ranked_with_it():
    (plain,), (with_it,) = (features.load_eval_rows(data(on), limit=4) for on in (False, True))
    first = load_vocabulary("tiny").vocab_size - 1
    for one, other in zip(plain.rows.targets, with_it.rows.targets, strict=True):
        assert other.tolist() == [first, *one.tolist()]
    for one, other in zip(plain.rows.inputs, with_it.rows.inputs, strict=True):
        np.testing.assert_array_equal(one, other)
    assert plain.rows.target_texts == with_it.rows.target_texts
    task = make_eval_task(with_it, EvalConfig(method="both"))
    words = ranking.word_ids(task)[0]
    assert all(ids[0] == first and ids[-1] == 1 for ids in words)
    assert task.postprocess(0, task.vocabulary.decode(list(words[0]))) == 0
