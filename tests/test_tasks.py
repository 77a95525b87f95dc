"""seqio tasks: their text in tf.data, labels, registration by call, names, the user's modules."""

import ast
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import seqio
import superglue_rows

from prompt_tuning.config import ConfigError
from prompt_tuning.data import prepare, tasks
from prompt_tuning.data.vocabulary import load_vocabulary
from prompt_tuning.text import superglue
from prompt_tuning.world import generator

GIN = Path(__file__).resolve().parents[1] / "gin" / "superglue"
SPECS = list(superglue.TASKS.values())


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("superglue")
    prepare.prepare_superglue(superglue_rows.write_jsonl(folder / "jsonl"), folder / "tfds")
    return str(folder / "tfds")


@pytest.fixture(autouse=True)
def registered(tfds_dir):
    tasks.register("bytes", tfds_data_dir=tfds_dir)


@pytest.mark.parametrize("task_word", [True, False])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_text_in_tf_data_is_that_of_the_pure_function(spec, task_word):
    examples = read(tasks.superglue_name(spec, task_word=task_word))
    rows = {row["idx"]: row for row in superglue_rows.labelled(spec.folder)}
    assert len(examples) == len(rows)
    for example in examples:
        expected = superglue.to_text(spec, rows[int(example["idx"])], task_word=task_word)
        assert pretokenized(example) == expected


def test_rows_without_labels_in_tf_data():
    examples = read("super_glue_cb_v102", "test")
    assert {pretokenized(example)["targets"] for example in examples} == {"<unk>"}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_tf_data_equals_what_t5_makes_of_real_rows(spec, shared_dir, tmp_path):
    prepare.prepare_superglue(shared_dir / "data" / "fewglue", tmp_path)
    tasks.register("bytes", tfds_data_dir=str(tmp_path))
    path = shared_dir / "goldens" / "t5_text" / f"{spec.name}.train.jsonl"
    golden = [json.loads(line) for line in path.read_text().splitlines()]
    name = tasks.superglue_name(spec, task_word=True)
    for example, expected in zip(read(name), golden, strict=True):
        assert {**pretokenized(example), "idx": int(example["idx"])} == expected
    taskless = read(tasks.superglue_name(spec, task_word=False))
    for example, expected in zip(taskless, golden, strict=True):
        assert pretokenized(example)["inputs"] == re.sub(r"^\S+ ", "", expected["inputs"], count=1)


def read(name: str, split: str = "train") -> list[dict]:
    task = seqio.get_mixture_or_task(name)
    return list(task.get_dataset(None, split, shuffle=False).as_numpy_iterator())


def pretokenized(example: dict) -> dict[str, str]:
    return {key: example[f"{key}_pretokenized"].decode() for key in ("inputs", "targets")}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_tokens_labels_and_metrics(spec):
    task = tasks.resolve(tasks.superglue_name(spec, task_word=False))
    example = read(task.name)[0]
    text = pretokenized(example)["inputs"]
    assert example["inputs"].tolist() == [*[b + 3 for b in text.encode()], 1]
    for index, word in enumerate(tasks.label_words(task.name)):
        assert task.postprocess_fn(word, example=example, is_target=True) == index
    assert task.postprocess_fn("nothing of the kind", example=example) == -1
    values = {}
    for metric in task.metric_fns:
        values |= metric([0, 1], [0, 1])
    names = {"mean_3class_f1", "accuracy"} if spec.name == "cb" else {"accuracy"}
    assert values.keys() == names
    assert values["accuracy"] == 100.0


def test_seqio_evaluates_the_gold_answers_as_perfect(tmp_path):
    """Upstream's own evaluator runs the tasks: text, postprocess and metrics fit together."""
    evaluator = seqio.Evaluator(
        "super_glue_cb_v102",
        seqio.EncDecFeatureConverter(pack=False),
        eval_split="train",  # all three classes
        sequence_length={"inputs": 128, "targets": 16},
    )

    def gold(dataset):
        return [
            (int(i), e["decoder_target_tokens"].tolist()) for i, e in dataset.as_numpy_iterator()
        ]

    metrics, _ = evaluator.evaluate(compute_metrics=True, step=0, predict_fn=gold)
    evaluator.close()
    assert metrics.result()["super_glue_cb_v102"] == {"mean_3class_f1": 100.0, "accuracy": 100.0}


def test_demo_tasks():
    (train,) = {len(read(name)) for name in generator.DEMO_TASKS}
    assert train == generator.DEMO_SPLITS["train"][0]
    task = tasks.resolve("tiny_mood")
    assert task.source.num_input_examples("test") == generator.DEMO_SPLITS["test"][0]
    first = generator.demo_rows("tiny_mood", "validation")[0]
    assert pretokenized(read("tiny_mood", "validation")[0]) == first
    words = tasks.label_words("tiny_mood")
    assert first["targets"] in words
    assert task.postprocess_fn(first["targets"], example=None) == words.index(first["targets"])


def test_the_mixture_draws_in_proportion_to_the_training_rows():
    rates = tasks.component_tasks("taskless_super_glue_v102_proportional")
    assert dict(rates) == {
        "taskless_super_glue_boolq_v102": 9427.0,
        "taskless_super_glue_cb_v102": 250.0,
        "taskless_super_glue_rte_v102": 2490.0,
    }
    prefixed = tasks.component_tasks("super_glue_v102_proportional")
    assert [(f"taskless_{name}", rate) for name, rate in prefixed] == rates
    assert tasks.component_tasks("tiny_mood") == [("tiny_mood", 1.0)]


def test_label_words():
    assert tasks.label_words("super_glue_boolq_v102") == ("False", "True")
    assert tasks.label_words("taskless_super_glue_cb_v102") == superglue.CB.labels
    words = tasks.label_words("super_glue_v102_proportional")
    assert sorted(words) == sorted({w for spec in SPECS for w in spec.labels})
    assert tasks.label_words("somebody's task") == ()


def test_registering_again_changes_nothing(tfds_dir):
    before = {name: tasks.resolve(name) for name in tasks.task_names()}
    tasks.register("bytes", tfds_data_dir=tfds_dir)
    assert {name: tasks.resolve(name) for name in tasks.task_names()} == before


def test_another_vocabulary_replaces_tasks_and_mixtures(tfds_dir, vocabulary_file):
    before = set(tasks.task_names())
    tasks.register(vocabulary_file, tfds_data_dir=tfds_dir)
    assert set(tasks.task_names()) == before
    for name in ("super_glue_cb_v102", "super_glue_v102_proportional", "tiny_mood"):
        for feature in tasks.resolve(name).output_features.values():
            assert feature.vocabulary.sentencepiece_model_file == vocabulary_file


def test_another_directory_is_read_though_the_first_one_was(tmp_path):
    assert len(read("super_glue_cb_v102")) == 5
    superglue_rows.write_rows(tmp_path / "CB" / "train.jsonl", superglue_rows.labelled("CB")[:2])
    prepare.prepare_superglue(tmp_path, tmp_path / "tfds")
    seqio.TaskRegistry.add(
        "theirs_over_cb",
        source=seqio.TfdsDataSource("super_glue/cb:1.0.2"),
        output_features={},
        preprocessors=[],
    )
    try:
        assert len(read("theirs_over_cb")) == 5
        tasks.register("bytes", tfds_data_dir=str(tmp_path / "tfds"))
        assert len(read("super_glue_cb_v102")) == 2
        assert len(read("theirs_over_cb")) == 2
    finally:
        seqio.TaskRegistry.remove("theirs_over_cb")


def test_a_bad_vocabulary_leaves_what_was_registered():
    before = {name: tasks.resolve(name) for name in tasks.task_names()}
    with pytest.raises(ConfigError, match=r"nowhere\.model"):
        tasks.register("nowhere.model")
    assert {name: tasks.resolve(name) for name in tasks.task_names()} == before


def test_names_of_others_stay_theirs(tfds_dir, vocabulary_file):
    seqio.TaskRegistry.remove("super_glue_cb_v102")
    theirs = seqio.Task(
        "super_glue_cb_v102",
        source=seqio.FunctionDataSource(lambda split, shuffle_files: None, splits=["train"]),
        output_features=tasks.resolve("super_glue_rte_v102").output_features,
    )
    seqio.TaskRegistry.add_provider("super_glue_cb_v102", theirs)
    try:
        for vocabulary in (vocabulary_file, "bytes"):
            tasks.register(vocabulary, tfds_data_dir=tfds_dir)
            assert tasks.resolve("super_glue_cb_v102") is theirs
    finally:
        seqio.TaskRegistry.remove("super_glue_cb_v102")
    tasks.register(vocabulary_file, tfds_data_dir=tfds_dir)
    assert tasks.resolve("super_glue_cb_v102") is not theirs


@pytest.fixture(scope="module")
def vocabulary_file() -> str:
    """The small SentencePiece model that comes with seqio."""
    return str(Path(seqio.__file__).parent / "test_data" / "sentencepiece" / "sentencepiece.model")


def test_unknown_names_come_with_the_nearest_ones():
    with pytest.raises(ConfigError, match=r"'taskless_super_glue_cb_v12'. Did you mean taskless_s"):
        tasks.resolve("taskless_super_glue_cb_v12")
    with pytest.raises(ConfigError, match=r"MIXTURE_OR_TASK_MODULE"):
        tasks.component_tasks("zzz")


def no_rate(task):
    raise TypeError("no row counts")


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ((0.0, 0.0), "one of them more"),
        ((-1.0, 2.0), "found tiny_mood: -1.0"),
        ((no_rate, 1.0), "cannot be computed: no row counts"),
    ],
)
def test_rates_that_are_no_rates(rates, message):
    names = ("tiny_mood", "tiny_topic")
    seqio.MixtureRegistry.add("bad_rates", list(zip(names, rates, strict=True)))
    try:
        with pytest.raises(ConfigError, match=message):
            tasks.component_tasks("bad_rates")
    finally:
        seqio.MixtureRegistry.remove("bad_rates")


MODULE = """
import seqio
seqio.MixtureRegistry.add("their_mixture", [("tiny_mood", 1.0), ("tiny_topic", 3.0)])
"""


def test_the_users_module_is_found_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "their_tasks.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != ""])
    try:
        tasks.import_task_module("their_tasks")
        tasks.import_task_module("their_tasks")  # a second call does nothing
        assert tasks.component_tasks("their_mixture") == [("tiny_mood", 1.0), ("tiny_topic", 3.0)]
    finally:
        seqio.MixtureRegistry.remove("their_mixture")
        sys.modules.pop("their_tasks", None)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("no_such_module", None, "'no_such_module' is not found in the working directory"),
        ("no.such.module", None, "'no.such.module' is not found in the working directory"),
        (
            "needs_more",
            "import no_such_package",
            "imports 'no_such_package', which is not installed",
        ),
        ("broken", "x = 1\nx.y", r"failed with AttributeError.*broken.py, line 2"),
        ("no_python", "x =", r"'no_python' failed with SyntaxError"),
    ],
)
def test_a_module_that_fails(name, text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    if text is not None:
        (tmp_path / f"{name}.py").write_text(text)
    with pytest.raises(ConfigError, match=f"MIXTURE_OR_TASK_MODULE.*{message}"):
        tasks.import_task_module(name)


def test_the_module_for_upstream_registers_on_import(vocabulary_file):
    """In a process of its own: nothing is registered before, and importing `tasks` does not."""
    code = (
        "from prompt_tuning.data import tasks; assert tasks.task_names() == []\n"
        "import prompt_tuning.data.register\n"
        "task = tasks.resolve('taskless_super_glue_rte_v102')\n"
        "print(task.output_features['inputs'].vocabulary.sentencepiece_model_file)"
    )
    environment = {**os.environ, "PROMPT_TUNING_VOCABULARY": vocabulary_file}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == vocabulary_file


@pytest.mark.parametrize("name", ["boolq", "cb", "rte", "proportional"])
def test_gin_files_fit_the_tasks(name):
    macros = read_macros(GIN / f"{name}.gin")
    task = macros["MIXTURE_OR_TASK_NAME"]
    assert task in tasks.task_names()
    assert set(macros["CLASS_LABELS"]) == set(tasks.label_words(task))
    if name != "proportional":
        assert macros["CLASS_LABELS"] == tasks.label_words(task)


@pytest.mark.parametrize("name", ["boolq", "cb", "rte", "proportional"])
def test_labels_fit_the_target_length_with_the_real_vocabulary(name, shared_dir):
    path = shared_dir / "data" / "t5_vocab" / "sentencepiece.model"
    loaded = load_vocabulary(str(path))
    macros = read_macros(GIN / f"{name}.gin")
    longest = max(len(loaded.encode(word)) for word in macros["CLASS_LABELS"]) + 1
    assert longest <= macros["TASK_FEATURE_LENGTHS"]["targets"] < 2 * longest


def read_macros(path: Path) -> dict:
    """The macros of a gin file that holds nothing else."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    pairs = (line.split(" = ", maxsplit=1) for line in lines)
    return {name: ast.literal_eval(value) for name, value in pairs}


def test_label_words_differ_within_a_task():
    for name in itertools.chain(generator.DEMO_TASKS, ["super_glue_v102_proportional"]):
        words = tasks.label_words(name)
        assert len(set(words)) == len(words) > 1
