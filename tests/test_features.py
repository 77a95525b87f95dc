"""Rows and batches: any seqio task in, T5X's arrays out; training order as arithmetic."""

import dataclasses

import numpy as np
import pytest
import seqio
import superglue_rows
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from prompt_tuning.batches import batching, groups
from prompt_tuning.config import ConfigError, DataConfig
from prompt_tuning.tasks import metrics, prepare, registry, task_rows
from prompt_tuning.vocabularies.vocabulary import load_vocabulary

LENGTHS = {"inputs": 64, "targets": 16}
CB = "taskless_super_glue_cb_v102"
BYTES = seqio.ByteVocabulary()


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("superglue")
    prepare.prepare_superglue(superglue_rows.write_jsonl(folder / "jsonl"), folder / "tfds")
    return str(folder / "tfds")


@pytest.fixture(autouse=True)
def registered(tfds_dir):
    registry.register("bytes", tfds_data_dir=tfds_dir)


@pytest.fixture
def add_task():
    """Registers a task for one test; called with texts and what differs from the usual."""
    added = []

    def add(inputs=("one", "two"), targets=("a", "b"), preprocessors=None, **settings) -> str:
        name = f"theirs_{len(added)}"
        columns = {"inputs": list(inputs), "targets": list(targets)}
        usual = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim]
        seqio.TaskRegistry.add(
            name,
            source=seqio.FunctionDataSource(
                lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(columns),
                splits=["train"],
            ),
            preprocessors=usual if preprocessors is None else preprocessors,
            output_features=settings.get(
                "output_features",
                {key: seqio.Feature(BYTES) for key in ("inputs", "targets")},
            ),
        )
        added.append(name)
        return name

    yield add
    for name in added:
        seqio.TaskRegistry.remove(name)


# Rows.


def test_rows_of_a_task():
    rows = task_rows.load_rows(CB, "train", LENGTHS, vocabulary=load_vocabulary("bytes"))
    assert rows.task == CB
    assert len(rows) == len(rows.inputs) == len(rows.targets) == len(rows.examples) == 5
    for tokens, example in zip(rows.inputs, rows.examples, strict=True):
        assert tokens.dtype == np.int32
        assert tokens[-1] == 1
        text = BYTES.decode(tokens.tolist())
        assert example["inputs_pretokenized"].decode().startswith(text)
    assert {BYTES.decode(t.tolist()) for t in rows.targets} == set(registry.label_words(CB))


def test_rows_come_in_the_order_of_the_files_every_time():
    one, two = (task_rows.load_rows("tiny_mood", "validation", LENGTHS) for _ in range(2))
    for a, b in zip(one.inputs, two.inputs, strict=True):
        np.testing.assert_array_equal(a, b)
    first = task_rows.load_rows("tiny_mood", "validation", LENGTHS, limit=3)
    assert [e["inputs_pretokenized"] for e in first.examples] == [
        e["inputs_pretokenized"] for e in one.examples[:3]
    ]


def test_slices_of_a_tfds_split():
    assert len(task_rows.load_rows(CB, "train[:2]", LENGTHS)) == 2
    assert len(task_rows.load_rows(CB, "train[1:]+validation", LENGTHS)) == 6


def test_what_is_cut_is_counted(add_task):
    # 5 bytes and the end fill 6 exactly; 6 bytes lose one.
    name = add_task(inputs=("12345", "123456", "1"), targets=("a", "b", "abcdef"))
    rows = task_rows.load_rows(name, "train", {"inputs": 6, "targets": 4})
    assert [len(tokens) for tokens in rows.inputs] == [6, 6, 2]
    assert [len(tokens) for tokens in rows.targets] == [2, 2, 4]
    assert (rows.truncated_inputs, rows.truncated_targets) == (1, 1)
    assert all(tokens[-1] == 1 for tokens in rows.inputs)


def test_what_is_cut_without_an_end(add_task):
    plain = {key: seqio.Feature(BYTES, add_eos=False) for key in ("inputs", "targets")}
    name = add_task(
        inputs=("123456", "1234567"),
        preprocessors=[seqio.preprocessors.tokenize],
        output_features=plain,
    )
    rows = task_rows.load_rows(name, "train", {"inputs": 6, "targets": 4})
    assert [len(tokens) for tokens in rows.inputs] == [6, 6]
    assert rows.truncated_inputs == 1


def test_random_preprocessors_draw_the_same_every_time(add_task):
    @seqio.map_over_dataset(num_seeds=1)
    def shake(example, seed):
        noise = tf.random.stateless_uniform([8], seed, 3, 99, tf.int32)
        return {"inputs": noise, "targets": noise}

    name = add_task(inputs=["x"] * 4, targets=["y"] * 4, preprocessors=[shake])
    one, two = (task_rows.load_rows(name, "train", LENGTHS) for _ in range(2))
    np.testing.assert_array_equal(one.inputs, two.inputs)
    assert len({tuple(tokens) for tokens in one.inputs}) == 4


# What can be wrong.


def test_no_rows(add_task):
    nothing = [lambda dataset: dataset.filter(lambda row: False), seqio.preprocessors.tokenize]
    name = add_task(preprocessors=nothing)
    with pytest.raises(ConfigError, match=f"'train'.*{name}"):
        task_rows.load_rows(name, "train", LENGTHS)
    with pytest.raises(ConfigError, match=r"'train\[:0\]'.*_cb_v102"):
        task_rows.load_rows(CB, "train[:0]", LENGTHS)


def test_another_vocabulary(add_task):
    with pytest.raises(ConfigError, match=r"inputs.*VOCABULARY"):
        task_rows.load_rows(CB, "train", LENGTHS, vocabulary=load_vocabulary("tiny"))
    other = {
        "inputs": seqio.Feature(BYTES),
        "targets": seqio.Feature(seqio.ByteVocabulary(extra_ids=5)),
    }
    name = add_task(output_features=other)
    with pytest.raises(ConfigError, match="targets"):
        task_rows.load_rows(name, "train", LENGTHS, vocabulary=load_vocabulary("bytes"))


def test_features_that_are_not_there_or_not_tokens(add_task):
    only = {"targets": seqio.Feature(BYTES)}
    with pytest.raises(ConfigError, match=r"\['targets'\].*'inputs'"):
        task_rows.load_rows(add_task(output_features=only), "train", LENGTHS)

    def without_inputs(dataset):
        return dataset.map(lambda example: {"targets": example["targets"]})

    optional = {
        "inputs": seqio.Feature(BYTES, required=False),
        "targets": seqio.Feature(BYTES),
    }
    name = add_task(
        preprocessors=[without_inputs, seqio.preprocessors.tokenize], output_features=optional
    )
    with pytest.raises(ConfigError, match="'inputs'"):
        task_rows.load_rows(name, "train", LENGTHS)
    with pytest.raises(ConfigError, match="incorrect type"):
        task_rows.load_rows(add_task(preprocessors=[]), "train", LENGTHS)  # never tokenised


def test_a_mixture_is_not_a_task():
    with pytest.raises(ConfigError, match="proportional"):
        task_rows.load_rows("super_glue_v102_proportional", "train", LENGTHS)


# Mixtures.


def test_rows_of_a_mixture():
    names = ("boolq", "cb", "rte")
    rates = [(f"super_glue_{name}_v102", float(i)) for i, name in enumerate(names, start=1)]
    seqio.MixtureRegistry.add("three", rates)
    try:
        rows, found = task_rows.load_training_rows("three", "train", LENGTHS)
    finally:
        seqio.MixtureRegistry.remove("three")
    assert [(r.task, rate) for r, rate in zip(rows, found, strict=True)] == rates
    assert {r.task: len(r) for r in rows}["super_glue_cb_v102"] == 5


def test_a_mixture_reads_the_tasks_that_have_the_split(tmp_path):
    """WSC is trained on and evaluated by two tasks: each of them lacks the split of the other."""
    source = superglue_rows.OTHERS["WSC"]
    superglue_rows.write_rows(tmp_path / "WSC" / "train.jsonl", source)
    superglue_rows.write_rows(tmp_path / "WSC" / "val.jsonl", source)
    unlabelled = superglue_rows.unlabelled(source)
    superglue_rows.write_rows(tmp_path / "WSC" / "test.jsonl", unlabelled)
    prepare.prepare_superglue(tmp_path, tmp_path / "tfds")
    name = "taskless_super_glue_wsc_and_dev_v102_simple"
    config = DataConfig(
        mixture_or_task_name=name,
        task_feature_lengths=LENGTHS,
        vocabulary="bytes",
        tfds_data_dir=str(tmp_path / "tfds"),
    )
    (found,) = task_rows.load_eval_rows(config, class_labels=("commonsense", "pronoun"))
    assert found.task.name == "taskless_super_glue_wsc_v102_simple_eval"
    assert (len(found.rows), found.label_words, found.row_words(0)) == (2, (), ())
    assert found.is_labelled(0)
    (hidden,) = task_rows.load_eval_rows(dataclasses.replace(config, eval_split="test"))
    assert not any(hidden.is_labelled(row) for row in range(2))
    with pytest.raises(ConfigError, match=r"'validation\[:1\]'.*validation, test"):
        task_rows.load_eval_rows(dataclasses.replace(config, eval_split="validation[:1]"))
    rows, rates = task_rows.load_training_rows(name, "train", LENGTHS)
    assert [(r.task, len(r)) for r in rows] == [("taskless_super_glue_wsc_v102_simple_train", 1)]
    assert rates == [1.0]
    with pytest.raises(ConfigError, match=r"'dev'.*EVAL_SPLIT"):
        task_rows.load_eval_rows(dataclasses.replace(config, eval_split="dev"))
    with pytest.raises(ConfigError, match="MIXTURE_OR_TASK_NAME"):
        task_rows.load_eval_rows(dataclasses.replace(config, mixture_or_task_name=()))
    with pytest.raises(ConfigError, match=r"'dev'.*TRAIN_SPLIT"):
        task_rows.load_training_rows(name, "dev", LENGTHS)


def test_a_task_with_rate_0_needs_no_training_split(add_task):
    seqio.MixtureRegistry.add("with_eval", [(add_task(), 1.0), ("tiny_mood", 0.0)])
    try:
        rows, rates = task_rows.load_training_rows("with_eval", "train", LENGTHS)
        assert ([r.task for r in rows], rates) == (["theirs_0"], [1.0])
    finally:
        seqio.MixtureRegistry.remove("with_eval")


# Batches.

token_rows = st.lists(
    st.tuples(
        st.lists(st.integers(1, 258), max_size=40), st.lists(st.integers(1, 258), max_size=6)
    ),
    min_size=1,
    max_size=8,
)


@settings(deadline=None)
@given(token_rows)
def test_a_batch_is_its_rows(rows):
    inputs, targets = zip(*rows, strict=True)
    batch = batching.make_batch(inputs, targets, {"inputs": 40, "targets": 6})
    width = batch["encoder_input_tokens"].shape[1]
    assert width in groups.input_widths(40)
    assert batch["decoder_target_tokens"].shape == (len(rows), 6)
    for i, (row, target) in enumerate(rows):
        assert batch["encoder_input_tokens"][i].tolist() == row + [0] * (width - len(row))
        padded = target + [0] * (6 - len(target))
        assert batch["decoder_target_tokens"][i].tolist() == padded
        assert batch["decoder_input_tokens"][i].tolist() == [0, *padded[:-1]]
        assert batch["decoder_loss_weights"][i].tolist() == [float(t != 0) for t in padded]


def test_a_batch_equals_the_one_seqio_makes():
    """T5X feeds its model through this converter; ours differs in the padding of inputs alone."""
    rows = task_rows.load_rows(CB, "train", LENGTHS)
    batch = batching.make_batch(rows.inputs, rows.targets, LENGTHS)
    converted = seqio.get_dataset(
        CB,
        LENGTHS,
        seqio.EncDecFeatureConverter(pack=False),
        dataset_split="train",
        shuffle=False,
        batch_size=5,
    )
    (expected,) = converted.as_numpy_iterator()
    assert set(batch) == set(expected)
    width = batch["encoder_input_tokens"].shape[1]
    for key, value in expected.items():
        whole = np.pad(batch[key], ((0, 0), (0, value.shape[1] - batch[key].shape[1])))
        np.testing.assert_array_equal(whole, value)
    assert batch["encoder_input_tokens"][:, -width // 2 :].any()  # no narrower width would do


def test_a_row_that_was_not_cut_is_refused():
    with pytest.raises(AssertionError, match=r"7.*4"):
        batching.make_batch([[1]], [[1] * 7], {"inputs": 8, "targets": 4})
    with pytest.raises(AssertionError, match=r"9.*8"):
        batching.make_batch([[1] * 9], [[1]], {"inputs": 8, "targets": 4})


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_evaluation_goes_through_all_rows_once_and_in_order_of_length(batch_size):
    rows = task_rows.load_rows(CB, "train", LENGTHS)
    seen = []
    for batch, places in batching.eval_batches(rows, batch_size, LENGTHS):
        assert batch["encoder_input_tokens"].shape[0] == batch_size
        assert not batch["decoder_loss_weights"][len(places) :].any()
        for place, tokens in zip(places, batch["encoder_input_tokens"], strict=False):
            np.testing.assert_array_equal(tokens[tokens > 0], rows.inputs[place])
        seen += places
    assert sorted(seen) == list(range(len(rows)))
    lengths = [len(rows.inputs[place]) for place in seen]
    assert lengths == sorted(lengths, reverse=True)


def make_rows(task: str, size: int) -> batching.Rows:
    """Rows whose first input token is the row's number."""
    inputs = [np.asarray([2 + i, 1], np.int32) for i in range(size)]
    targets = [np.asarray([2 + i % 2, 1], np.int32) for i in range(size)]
    texts = [""] * size
    return batching.Rows(task, inputs, targets, texts, texts, [{} for _ in range(size)], 0, 0)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(1, 12), st.integers(0, 50))
def test_training_resumes_anywhere(seed, size, batch_size, start):
    rows = [make_rows("a", size)]

    def batch(step, size=batch_size):
        made = batching.train_batch(
            rows, [1.0], seed=seed, step=step, batch_size=size, lengths=LENGTHS
        )
        return made["encoder_input_tokens"][:, 0]

    ahead = [batch(step) for step in range(start, start + 3)]
    alone = batch(start + 2)  # as a resumed run would begin
    np.testing.assert_array_equal(alone, ahead[2])
    # The rows of a step do not depend on how the ones before it were batched.
    single = [
        batch(position, size=1)[0] for position in range(batch_size * start, batch_size * start + 3)
    ]
    np.testing.assert_array_equal(single[:batch_size], ahead[0][:3])


def test_groups_are_the_batch_in_another_order():
    rows = [task_rows.load_rows("tiny_mood", "validation", LENGTHS)]
    cutting = groups.Cutting(inputs=64, targets=16, fewest=4, most=4)
    where = {"seed": 3, "step": 1, "batch_size": 8}
    whole = batching.train_batch(rows, [1.0], lengths=LENGTHS, **where)
    cut = batching.train_groups(rows, [1.0], cutting, **where)
    assert [len(g["encoder_input_tokens"]) for g in cut] == [2, 2, 2, 2]

    def pairs(batches):
        found = []
        for batch in batches:
            columns = [batch["encoder_input_tokens"], batch["decoder_target_tokens"]]
            found += [tuple(tuple(c[c > 0]) for c in row) for row in zip(*columns, strict=True)]
        return found

    assert sorted(pairs(cut)) == sorted(pairs([whole]))


def test_one_epoch_of_batches_has_every_row_once():
    rows = [make_rows("a", 24)]
    batches = [
        batching.train_batch(rows, [1.0], seed=3, step=s, batch_size=8, lengths=LENGTHS)
        for s in range(3)
    ]
    seen = np.concatenate([batch["encoder_input_tokens"][:, 0] for batch in batches])
    assert sorted(seen - 2) == list(range(24))
    assert list(seen) != sorted(seen)


# The real data.


@pytest.mark.slow
def test_majority_class_of_the_real_rows(shared_dir, tmp_path):
    """The floors that the paper's label counts give (table 7): CB 50.0, RTE 52.7."""
    prepare.prepare_superglue(shared_dir / "data" / "superglue", tmp_path)
    path = shared_dir / "data" / "t5_vocab" / "sentencepiece.model"
    registry.register(str(path), tfds_data_dir=str(tmp_path))
    lengths = {"inputs": 512, "targets": 8}
    for name, count, floor in ((CB, 250, 50.0), ("super_glue_rte_v102", 2490, 52.7)):
        task = registry.resolve(name)
        train, validation = (task_rows.load_rows(name, s, lengths) for s in ("train", "validation"))
        assert len(train) == count
        assert train.truncated_targets == validation.truncated_targets == 0
        targets = [
            [task.postprocess_fn(e["targets_pretokenized"].decode(), example=e) for e in r.examples]
            for r in (train, validation)
        ]
        predictions = metrics.majority_predictions(targets[0], len(validation))
        assert metrics.accuracy(targets[1], predictions)["accuracy"] == pytest.approx(
            floor, abs=0.05
        )
    long = task_rows.load_rows(CB, "train", {"inputs": 64, "targets": 8})
    loaded = load_vocabulary(str(path))
    texts = [e["inputs_pretokenized"].decode() for e in long.examples]
    assert long.truncated_inputs == sum(len(loaded.encode(text)) + 1 > 64 for text in texts) > 0
