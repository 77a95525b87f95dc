"""seqio tasks: their text in tf.data, labels, registration by call, names, the user's modules."""

import ast
import itertools
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import seqio
import superglue_rows
import tensorflow as tf
from plain_conversions import to_examples
from rows_as_examples import convert, plain

from prompt_tuning.config import ConfigError
from prompt_tuning.tasks import glue, prepare, qa, registry, superglue
from prompt_tuning.vocabularies.vocabulary import load_vocabulary
from prompt_tuning.world import generator

GIN = Path(__file__).resolve().parents[1] / "gin" / "superglue"
SUPER_GLUE = [
    registry.full_name(spec.name, task_word)
    for spec in superglue.SUPER_GLUE
    for task_word in (True, False)
    if spec is not superglue.DPR
]


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("superglue")
    prepare.prepare_superglue(superglue_rows.write_all(folder / "jsonl"), folder / "tfds")
    return str(folder / "tfds")


@pytest.fixture(autouse=True)
def registered(tfds_dir):
    registry.register("bytes", tfds_data_dir=tfds_dir)


def read(name: str, split: str = "train") -> list[dict]:
    task = seqio.get_mixture_or_task(name)
    return list(task.get_dataset(None, split, shuffle=False).as_numpy_iterator())


def pretokenized(example: dict) -> dict[str, str]:
    return {key: example[f"{key}_pretokenized"].decode() for key in ("inputs", "targets")}


# Without its word a task takes the same operations, and so does another split;
# test_superglue.py has both forms.
@pytest.mark.parametrize("splits", ["first", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * n.startswith("taskless")) for n in SUPER_GLUE],
)
def test_tf_data_gives_what_the_pure_function_gives(name, splits):
    spec = registry.find_spec(name)
    source = seqio.get_mixture_or_task(name).source
    for split in [*source.splits][: 1 if splits == "first" else None]:
        raw = source.get_dataset(split, shuffle=False).as_numpy_iterator()
        expected = [
            example
            for row in raw
            for example in to_examples(spec, plain(row), task_word="taskless" not in name)
        ]
        examples = [plain(example) for example in read(name, split)]
        for example in examples:
            assert example.pop("input_fields")
            example.pop("input_spans")
        assert examples == expected


def random_text(chance: random.Random, words: list[str], most: int = 8) -> str:
    return "".join(chance.choices(words, k=chance.randint(0, most)))


@pytest.mark.parametrize("task_word", [True, False])
def test_pronouns_are_marked_alike(task_word):
    chance = random.Random(0)
    words = ["he ", "he, ", 'he," ', "X ", " ", "Zoë ", "hé ", "(he) ", "\n", "\\1 ", "he\u2026x "]
    rows = [
        {
            "text": random_text(chance, words) + " he" + random_text(chance, ["", " ", "."], 1),
            "span2_index": chance.randint(0, 9),
            "span2_text": "he",
            "span1_text": "Tom",
            "label": chance.randint(-1, 1),
            "idx": i,
        }
        for i in range(400)
    ]
    for spec in superglue.WSC:
        expected = [e for row in rows for e in to_examples(spec, row, task_word=task_word)]
        assert convert(spec, *rows, task_word=task_word) == expected


def test_highlights_and_answers_are_treated_alike():
    chance = random.Random(0)
    words = ["\n@highlight\n", "@highlight", ".", "!", '"', "'", "Zoë ", "\n", "<br>"]
    rows = []
    for _ in range(300):
        entities = [
            random_text(chance, ["Bo", ", ", "é", ""], 3) for _ in range(chance.randint(0, 4))
        ]
        rows.append(
            {
                "passage": random_text(chance, words),
                "query": random_text(chance, ["@placeholder", " ", "?", "\\1"]),
                "entities": entities,
                "answers": entities[: chance.randint(0, 4)],
            }
        )
    expected = [e for row in rows for e in to_examples(superglue.RECORD, row)]
    assert convert(superglue.RECORD, *rows) == expected


def test_markup_is_treated_alike():
    chance = random.Random(0)
    words = ["<br>", "<b>", "</b>", "<br", "b>", "<", "</", "ü", " ", "&lt;"]
    rows = [
        {**{name: random_text(chance, words) for name in superglue.MULTIRC.features}}
        | {"label": chance.randint(-1, 1)}
        for _ in range(200)
    ]
    expected = [e for row in rows for e in to_examples(superglue.MULTIRC, row)]
    assert convert(superglue.MULTIRC, *rows) == expected


def test_dpr_is_marked_alike():
    chance = random.Random(0)
    words = ["he", " he", " he,", " he.x", " (he)", " ", "\\1", "."]
    rows = [
        {
            "sentence": random_text(chance, words),
            "pronoun": chance.choice(["he", ".", "é", "\\", "he he"]),
            "candidates": ["Tom", "Zoë"],
            "label": chance.randint(-1, 1),
        }
        for _ in range(300)
    ]
    expected = [e for row in rows for e in to_examples(superglue.DPR, row, task_word=False)]
    assert convert(superglue.DPR, *rows, task_word=False) == expected


def test_similarities_are_rounded_alike():
    chance = random.Random(0)
    scores = [-1.0, 0.3, 0.5, 2.5, 4.9, *(chance.uniform(0, 5) for _ in range(200))]
    texts = dict.fromkeys(("sentence1", "sentence2"), "Zoë ran.")
    rows = [{**texts, "label": score, "idx": i} for i, score in enumerate(scores)]
    spec = glue.TASKS["glue_stsb_v002"]
    expected = [e for row in rows for e in to_examples(spec, row, task_word=False)]
    assert convert(spec, *rows, task_word=False) == expected
    assert expected[1]["targets"] in ("0.2", "0.4")


def test_questions_are_spaced_alike():
    chance = random.Random(0)
    words = ["Zoë", "«", "a-b", "?", " ", "\n", "\v", "\u00a0", "(1889)", "_", "\\", "¿"]
    rows = [
        {
            "qid": str(i),
            "question": random_text(chance, words),
            "context": random_text(chance, words),
            "answers": [random_text(chance, words) for _ in range(chance.randint(0, 3))],
        }
        for i in range(200)
    ]
    expected = [e for row in rows for e in to_examples(qa.MRQA[0], row)]
    assert convert(qa.MRQA[0], *rows) == expected
    nested = [{"id": "x", **row, "answers": {"text": row["answers"]}} for row in rows]
    (example,) = convert(qa.SQUAD, nested[5])
    assert example == {"id": "x"} | {k: v for k, v in expected[5].items() if k != "idx"}


def test_a_pronoun_that_is_not_in_the_text():
    row = {"text": "a b", "span2_index": 1, "span2_text": "he", "span1_text": "a"}
    with pytest.raises(tf.errors.InvalidArgumentError, match="span2_text"):
        convert(superglue.WSC_EVAL, {**row, "label": 1, "idx": 0})


def test_rows_without_labels_in_tf_data():
    examples = read("super_glue_cb_v102", "test")
    assert {pretokenized(example)["targets"] for example in examples} == {"<unk>"}
    (example,) = {pretokenized(e)["targets"] for e in read("super_glue_record_v102", "test")}
    assert example == "<unk>"
    assert {e["label"] for e in read("super_glue_wsc_v102_simple_eval", "test")} == {-1}


@pytest.mark.slow  # test_superglue.py has the same rows
@pytest.mark.parametrize("form", ["", "taskless_"])
def test_tf_data_equals_what_t5_makes_of_real_rows(shared_dir, tmp_path, form):
    prepare.prepare_superglue(shared_dir / "data" / "fewglue", tmp_path)
    registry.register("bytes", tfds_data_dir=str(tmp_path))
    seen = 0
    for name in SUPER_GLUE:
        if name.startswith("taskless_") != bool(form):
            continue
        spec = registry.find_spec(name)
        path = shared_dir / "goldens" / "t5_text" / f"{spec.config}.train.jsonl"
        if not path.exists() or "train" not in seqio.get_mixture_or_task(name).splits:
            continue
        golden = [json.loads(line) for line in path.read_text().splitlines()]
        if spec.convert is superglue.wsc_right:
            golden = [example for example in golden if example["label"]]
        for example, expected in zip(read(name), golden, strict=True):
            if form:
                inputs = re.sub(r"^\S+ ", "", expected["inputs"], count=1)
                expected = {**expected, "inputs": inputs}
            assert {key: plain(example)[key] for key in expected} == expected
            seen += 1
    assert seen == 6 * 32 + 154 + 44


@pytest.mark.parametrize("config", ["boolq", "cb", "copa", "rte", "wic"])
def test_tokens_labels_and_metrics(config):
    task = registry.resolve(f"taskless_super_glue_{config}_v102")
    example = read(task.name)[0]
    text = pretokenized(example)["inputs"]
    assert example["inputs"].tolist() == [*[b + 3 for b in text.encode()], 1]
    for index, word in enumerate(registry.label_words(task.name)):
        assert task.postprocess_fn(word, example=example, is_target=True) == index
        assert registry.row_words(task.name, example)[index] == word
    assert task.postprocess_fn("nothing of the kind", example=example) == -1
    values = {}
    for metric in task.metric_fns:
        values |= metric([0, 1], [0, 1])
    names = {"mean_3class_f1", "accuracy"} if config == "cb" else {"accuracy"}
    assert values.keys() == names
    assert values["accuracy"] == 100.0


def test_words_of_rows():
    example = read("taskless_super_glue_record_v102")[0]
    assert registry.row_words("taskless_super_glue_record_v102", example) == ("Bo", "Łucja")
    assert registry.label_words("taskless_super_glue_record_v102") == ()
    example = read("super_glue_wsc_v102_simple_eval", "validation")[0]
    assert registry.row_words("super_glue_wsc_v102_simple_eval", example) == ()
    assert registry.row_words("somebody's", example) == ()
    twice = {"candidates": [b"Bo", "Ann", b"Bo"]}
    assert registry.row_words("dpr_v001_simple", twice) == ("Bo", "Ann")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # The referent that is offered is named, which in one of two rows is wrong.
        ("super_glue_wsc_v102_simple_eval", {"accuracy": 50.0}),
        ("super_glue_multirc_v102", {"f1": 100.0, "exact_match": 100.0}),
        *(
            pytest.param(name, values, marks=pytest.mark.slow)
            for name, values in (
                ("super_glue_cb_v102", {"mean_3class_f1": 100.0, "accuracy": 100.0}),
                ("taskless_super_glue_record_v102", {"em": 100.0, "f1": 100.0}),
                ("super_glue_axb_v102", {"matthews_corrcoef": 100.0}),
                ("super_glue_axg_v102", {"gender_parity": 100.0, "accuracy": 100.0}),
            )
        ),
    ],
)
def test_seqio_evaluates_the_gold_answers(name, expected):
    """Upstream's own evaluator runs the tasks: text, postprocess and metrics fit together."""
    evaluator = seqio.Evaluator(
        name,
        seqio.EncDecFeatureConverter(pack=False),
        eval_split={"wsc": "validation", "axb": "test", "axg": "test"}.get(
            name.split("_")[2],
            "train",  # all three classes of CB
        ),
        sequence_length={"inputs": 256, "targets": 16},
    )

    def gold(dataset):
        return [
            (int(i), e["decoder_target_tokens"].tolist()) for i, e in dataset.as_numpy_iterator()
        ]

    metrics, _ = evaluator.evaluate(compute_metrics=True, step=0, predict_fn=gold)
    evaluator.close()
    assert metrics.result()[name] == expected


@pytest.mark.parametrize("config", ["cb", "record", "wsc.fixed"])
def test_a_position_in_the_rows_can_be_saved(config, tmp_path):
    """As upstream T5X does; TensorFlow refuses it where a dataset calls back into Python."""
    name = {"wsc.fixed": "super_glue_wsc_v102_simple_train"}.get(
        config, f"super_glue_{config}_v102"
    )
    dataset = registry.resolve(name).get_dataset(None, "train", shuffle=False).repeat()
    rows = iter(dataset)
    next(rows)
    saved = tf.train.Checkpoint(rows=rows).write(str(tmp_path / "position"))
    expected = next(rows)["inputs"].numpy().tolist()
    again = iter(dataset)
    tf.train.Checkpoint(rows=again).read(saved)
    assert next(again)["inputs"].numpy().tolist() == expected


def test_demo_tasks():
    (train,) = {len(read(name)) for name in generator.DEMO_TASKS}
    assert train == generator.DEMO_SPLITS["train"][0]
    task = registry.resolve("tiny_mood")
    assert task.source.num_input_examples("test") == generator.DEMO_SPLITS["test"][0]
    first = generator.demo_rows("tiny_mood", "validation")[0]
    assert pretokenized(read("tiny_mood", "validation")[0]) == first
    words = registry.label_words("tiny_mood")
    assert first["targets"] in words
    assert task.postprocess_fn(first["targets"], example=None) == words.index(first["targets"])


@pytest.mark.parametrize("mixture", [name for _, mixtures in registry.TABLES for name in mixtures])
def test_mixtures_draw_with_the_rates_of_the_table(mixture):
    (rates,) = (mixtures[mixture] for _, mixtures in registry.TABLES if mixture in mixtures)
    assert dict(registry.component_tasks(mixture)) == dict(rates)
    logged = dict(registry.component_tasks(f"{mixture}_examples"))
    assert logged == {f"{name}_examples": rate for name, rate in rates}
    if not mixture.startswith("squad"):  # they have no task word
        taskless = dict(registry.component_tasks(f"taskless_{mixture}"))
        assert taskless == {f"taskless_{name}": rate for name, rate in rates}
    assert registry.component_tasks("tiny_mood") == [("tiny_mood", 1.0)]


def test_every_task_of_the_tables_is_registered_in_all_forms():
    forms = {"super_glue_wsc_v102_simple_eval", "glue_ax_v200", "glue_qqp_from_mrpc_v002"}
    names = {form + end for form in forms for end in ("", "_examples")}
    names |= {f"taskless_{name}" for name in names}
    names |= {"squad_v010_allanswers", "mrqa_duo_rc_v100", "squad_to_race", "squad_to_mrqa"}
    names |= {"taskless_dpr_v001_simple_examples", "taskless_glue_mnli_and_dev_v200"}
    assert names <= set(registry.task_names())
    assert not {"taskless_squad_v010_allanswers", "taskless_squad_to_race"} & set(
        registry.task_names()
    )


def test_transfer_takes_the_words_of_the_task_it_was_trained_on():
    task = registry.resolve("taskless_glue_mrpc_from_qqp_v002")
    assert registry.label_words(task.name) == ("not_duplicate", "duplicate")
    for index, word in enumerate(registry.label_words(task.name)):
        assert task.postprocess_fn(word, example=None, is_target=False) == index
    for index, word in enumerate(("not_equivalent", "equivalent")):
        assert task.postprocess_fn(word, example=None, is_target=True) == index
    assert registry.label_words("glue_qqp_from_mrpc_v002_examples") == glue.EQUIVALENT


def test_label_words():
    assert registry.label_words("super_glue_boolq_v102") == ("False", "True")
    assert registry.label_words("taskless_super_glue_cb_v102") == superglue.CB.labels
    words = registry.label_words("super_glue_v102_proportional", otherwise=("x",))
    assert sorted(words) == sorted({w for spec in superglue.SUPER_GLUE for w in spec.labels})
    assert registry.label_words("somebody's task") == ()
    assert registry.label_words("somebody's task", otherwise=("x",)) == ("x",)
    # Free text, whatever words a prompt began with.
    assert registry.label_words("super_glue_wsc_v102_simple_eval", otherwise=("x",)) == ()


def test_registering_again_changes_nothing(tfds_dir):
    before = {name: registry.resolve(name) for name in registry.task_names()}
    registry.register("bytes", tfds_data_dir=tfds_dir)
    assert {name: registry.resolve(name) for name in registry.task_names()} == before


def test_another_vocabulary_replaces_tasks_and_mixtures(tfds_dir, vocabulary_file):
    before = set(registry.task_names())
    registry.register(vocabulary_file, tfds_data_dir=tfds_dir)
    assert set(registry.task_names()) == before
    for name in ("super_glue_cb_v102", "super_glue_v102_proportional", "tiny_mood"):
        for feature in registry.resolve(name).output_features.values():
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
        registry.register("bytes", tfds_data_dir=str(tmp_path / "tfds"))
        assert len(read("super_glue_cb_v102")) == 2
        assert len(read("theirs_over_cb")) == 2
    finally:
        seqio.TaskRegistry.remove("theirs_over_cb")


def test_a_bad_vocabulary_leaves_what_was_registered():
    before = {name: registry.resolve(name) for name in registry.task_names()}
    with pytest.raises(ConfigError, match=r"nowhere\.model"):
        registry.register("nowhere.model")
    assert {name: registry.resolve(name) for name in registry.task_names()} == before


def test_names_of_others_stay_theirs(tfds_dir, vocabulary_file):
    seqio.TaskRegistry.remove("super_glue_cb_v102")
    theirs = seqio.Task(
        "super_glue_cb_v102",
        source=seqio.FunctionDataSource(lambda split, shuffle_files: None, splits=["train"]),
        output_features=registry.resolve("super_glue_rte_v102").output_features,
    )
    seqio.TaskRegistry.add_provider("super_glue_cb_v102", theirs)
    try:
        for vocabulary in (vocabulary_file, "bytes"):
            registry.register(vocabulary, tfds_data_dir=tfds_dir)
            assert registry.resolve("super_glue_cb_v102") is theirs
    finally:
        seqio.TaskRegistry.remove("super_glue_cb_v102")
    registry.register(vocabulary_file, tfds_data_dir=tfds_dir)
    assert registry.resolve("super_glue_cb_v102") is not theirs


@pytest.fixture(scope="module")
def vocabulary_file() -> str:
    """The small SentencePiece model that comes with seqio."""
    return str(Path(seqio.__file__).parent / "test_data" / "sentencepiece" / "sentencepiece.model")


def test_unknown_names_come_with_the_nearest_ones():
    with pytest.raises(ConfigError, match=r"'taskless_super_glue_cb_v12'.*Did you mean taskless_s"):
        registry.resolve("taskless_super_glue_cb_v12")
    with pytest.raises(ConfigError, match=r"MIXTURE_OR_TASK_MODULE"):
        registry.component_tasks("zzz")


def no_rate(task):
    raise TypeError("no row counts")


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ((0.0, 0.0), "bad_rates"),
        ((-1.0, 2.0), "tiny_mood: -1.0"),
        ((no_rate, 1.0), "no row counts"),
    ],
)
def test_rates_that_are_no_rates(rates, message):
    names = ("tiny_mood", "tiny_topic")
    seqio.MixtureRegistry.add("bad_rates", list(zip(names, rates, strict=True)))
    try:
        with pytest.raises(ConfigError, match=message):
            registry.component_tasks("bad_rates")
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
        registry.import_task_module("their_tasks")
        registry.import_task_module("their_tasks")  # a second call does nothing
        assert registry.component_tasks("their_mixture") == [
            ("tiny_mood", 1.0),
            ("tiny_topic", 3.0),
        ]
    finally:
        seqio.MixtureRegistry.remove("their_mixture")
        sys.modules.pop("their_tasks", None)


def test_a_module_may_take_names_of_ours(tmp_path, monkeypatch, vocabulary_file):
    """As `import t5` does, which registers T5's own tasks under the names that are ours too."""
    (tmp_path / "takes_names.py").write_text(
        "import seqio\n"
        "mood = seqio.TaskRegistry.get('tiny_mood')\n"
        "source = seqio.FunctionDataSource(lambda split, shuffle_files, seed=0: 0, ['train'])\n"
        "name = 'super_glue_cb_v102'\n"
        "seqio.TaskRegistry.add(name, source, mood.output_features)\n"
        "seqio.MixtureRegistry.add('super_glue_v102_proportional', [name], 1.0)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    registry.register(vocabulary_file)
    ours = registry.resolve("super_glue_cb_v102")
    names = ("super_glue_cb_v102", "super_glue_v102_proportional")
    try:
        registry.import_task_module("takes_names")
        theirs = [registry.resolve(name) for name in names]
        assert theirs[0] is not ours
        assert list(theirs[0].splits) == ["train"]
        assert registry.component_tasks(names[1]) == [(names[0], 1.0)]
        registry.register(vocabulary_file)  # stays theirs, whatever is registered anew
        registry.register("bytes")
        assert [registry.resolve(name) for name in names] == theirs
        with pytest.raises(ValueError, match="duplicate provider"):  # in there alone
            seqio.TaskRegistry.add_provider("tiny_mood", ours)
    finally:
        seqio.TaskRegistry.remove(names[0])
        seqio.MixtureRegistry.remove(names[1])
        sys.modules.pop("takes_names", None)
        registry.register(vocabulary_file)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("no_such_module", None, "'no_such_module'"),
        ("no.such.module", None, "'no.such.module'"),
        (
            "needs_more",
            "import no_such_package",
            "'no_such_package'",
        ),
        ("broken", "x = 1\nx.y", r"AttributeError.*broken.py, line 2"),
        ("no_python", "x =", r"'no_python'.*SyntaxError"),
    ],
)
def test_a_module_that_fails(name, text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    if text is not None:
        (tmp_path / f"{name}.py").write_text(text)
    with pytest.raises(ConfigError, match=f"MIXTURE_OR_TASK_MODULE.*{message}"):
        registry.import_task_module(name)


@pytest.mark.slow  # a process of its own
def test_the_module_for_upstream_registers_on_import(vocabulary_file):
    """Nothing is registered before, and importing `tasks` does not."""
    code = (
        "from prompt_tuning.tasks import registry; assert registry.task_names() == []\n"
        "import prompt_tuning.tasks.register\n"
        "task = registry.resolve('taskless_super_glue_rte_v102')\n"
        "print(task.output_features['inputs'].vocabulary.sentencepiece_model_file)"
    )
    environment = {**os.environ, "PROMPT_TUNING_VOCABULARY": vocabulary_file}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == vocabulary_file


FILES = sorted(path.stem for path in GIN.glob("*.gin"))
# What the paper begins prompts of free-text tasks with (Lester et al., 2021, 3.2).
PAPER = {
    "record": ("commonsense", "reasoning", "reading", "comprehension"),
    "wsc": ("commonsense", "pronoun", "resolution"),
}


def test_there_is_a_gin_file_for_every_task():
    names = {spec.config.removesuffix(".fixed") for spec in superglue.SUPER_GLUE} - {""}
    assert set(FILES) == {*names, "proportional"}


@pytest.mark.parametrize("name", FILES)
def test_gin_files_fit_the_tasks(name):
    macros = read_macros(GIN / f"{name}.gin")
    task = macros["MIXTURE_OR_TASK_NAME"]
    assert task in registry.task_names()
    if name == "proportional":
        assert set(macros["CLASS_LABELS"]) == set(registry.label_words(task))
    else:
        assert macros["CLASS_LABELS"] == PAPER.get(name, registry.label_words(task))
    assert ("EVAL_SPLIT" in macros) == (name in ("axb", "axg"))


@pytest.mark.parametrize("name", FILES)
def test_labels_fit_the_target_length_with_the_real_vocabulary(name, shared_dir):
    path = shared_dir / "data" / "t5_vocab" / "sentencepiece.model"
    loaded = load_vocabulary(str(path))
    macros = read_macros(GIN / f"{name}.gin")
    longest = max(len(loaded.encode(word)) for word in macros["CLASS_LABELS"]) + 1
    assert longest <= macros["TASK_FEATURE_LENGTHS"]["targets"]


def read_macros(path: Path) -> dict:
    """The macros of a gin file that holds nothing else."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    pairs = (line.split(" = ", maxsplit=1) for line in lines)
    return {name: ast.literal_eval(value) for name, value in pairs}


def test_label_words_differ_within_a_task():
    for name in itertools.chain(generator.DEMO_TASKS, ["super_glue_v102_proportional"]):
        words = registry.label_words(name)
        assert len(set(words)) == len(words) > 1
