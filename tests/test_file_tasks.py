"""A task of the user's own files is a seqio task, and a run of it needs no Python."""

import csv
import dataclasses
import io
import json
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import seqio
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import load_data

import prompt_tuning as pt
from prompt_tuning import cli
from prompt_tuning.config import ConfigError, DataConfig, EvalConfig, Experiment, FileTask, InferRun
from prompt_tuning.evaluation.evaluate import describe_choice, mean_score
from prompt_tuning.serving.infer import read_file, run_infer
from prompt_tuning.serving.predictor import Predictor
from prompt_tuning.session import overview
from prompt_tuning.tasks import registry, task_rows
from prompt_tuning.tasks.file_examples import EVAL, TRAIN, load_split
from prompt_tuning.tasks.file_tasks import check_label_words, register_files
from prompt_tuning.vocabularies.vocabulary import load_vocabulary
from prompt_tuning.world import generator
from prompt_tuning.world.assets import TINY_CONFIG

ROOT = Path(__file__).resolve().parents[1]
DOC = (ROOT / "docs" / "your_own_data.md").read_text()


def write_reviews(path: Path, split: str, count: int, *, labels: bool = True) -> Path:
    """A CSV of the bundled world's reviews, as docs/your_own_data.md has it."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "review", *(["mood"] if labels else [])])
        for number, review in enumerate(generator.demo_reviews(split)[:count]):
            writer.writerow([number, review.text, *([review.mood] if labels else [])])
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    write_reviews(folder / "reviews.csv", "train", 400)
    write_reviews(folder / "new.csv", "test", 32, labels=False)
    return folder


def data_config(folder, **options) -> DataConfig:
    files = FileTask(
        **{
            "train_file": str(folder / "reviews.csv"),
            "input_template": "{review}",
            "target_field": "mood",
            "label_words": {"good": "up", "bad": "down"},
            **options,
        }
    )
    return DataConfig(
        mixture_or_task_name="reviews",
        task_feature_lengths={"inputs": 64, "targets": 4},
        vocabulary="tiny",
        files=files,
    )


def experiment(data: DataConfig) -> Experiment:
    return Experiment(model_dir="out", initial_checkpoint_path="tiny", model=TINY_CONFIG, data=data)


# The task


def test_it_is_a_seqio_task(folder):
    config = data_config(folder)
    (found,) = task_rows.load_eval_rows(config)
    assert found.label_words == registry.label_words("reviews") == ("up", "down")
    assert len(found.rows) == 40
    assert set(found.rows.target_texts) == {"up", "down"}
    task = seqio.TaskRegistry.get("reviews")
    metrics = {}
    for metric in task.predict_metric_fns:
        metrics |= metric([0, 1, 1, 0], [0, 1, 0, -1])
    assert metrics == {"accuracy": 50.0, "macro_f1": pytest.approx(100 * (1 / 2 + 2 / 3) / 2)}
    # Another table takes its place; without files it is gone.
    task_rows.load_eval_rows(data_config(folder, eval_share=0.5))
    assert len(task_rows.load_eval_rows(data_config(folder, eval_share=0.5))[0].rows) == 200
    register_files(DataConfig(mixture_or_task_name="x", task_feature_lengths=FULL))
    assert "reviews" not in registry.task_names()
    assert registry.label_words("reviews") == ()


FULL = {"inputs": 64, "targets": 8}


def test_it_can_be_part_of_a_mixture(folder):
    task_rows.load_eval_rows(data_config(folder))
    seqio.MixtureRegistry.add("own_mixture", [("reviews", 1.0), ("tiny_topic", 1.0)])
    try:
        rows, rates = task_rows.load_training_rows("own_mixture", "train", FULL)
        assert [len(r) for r in rows] == [360, 2000]
        assert rates == [1.0, 1.0]
        assert registry.label_words("own_mixture") == ("up", "down", "left", "right")
    finally:
        seqio.MixtureRegistry.remove("own_mixture")


def test_free_text_is_scored_by_exact_match_and_f1(folder):
    config = data_config(folder, label_words=(), input_template="{id}", target_field="review")
    data = load_data(experiment(config))
    (task,) = data.eval_tasks
    assert task.metrics(task.targets) == {"exact_match": 100.0, "f1": 100.0}
    assert task.label_words == ()


def test_task_metric_chooses_the_best_prompt(folder):
    config = data_config(folder)
    (task,) = load_data(experiment(config)).eval_tasks
    assert "mean of accuracy/generate, macro_f1/generate" in describe_choice([task], EvalConfig())
    by_f1 = EvalConfig(metric="macro_f1")
    assert "by macro_f1/generate" in describe_choice([task], by_f1)
    scores = [{"accuracy/generate": 10.0, "macro_f1/generate": 30.0}]
    assert (mean_score(scores, EvalConfig()), mean_score(scores, by_f1)) == (20.0, 30.0)
    with pytest.raises(ConfigError, match=r"TASK_METRIC = 'f1'.*accuracy, macro_f1"):
        describe_choice([task], EvalConfig(metric="f1"))


def test_no_label_words_are_one_setting_however_they_are_written():
    """A stored run with {} is that run: its settings are compared as they were saved."""
    assert FileTask(label_words={}) == FileTask(label_words=()) == FileTask()


def test_rows_without_labels_are_answered_and_not_scored(folder, tmp_path):
    config = data_config(folder, eval_file=str(folder / "new.csv"))
    (found,) = task_rows.load_eval_rows(config)
    assert len(found.rows) == 32
    with pytest.raises(ConfigError, match="no labels"):
        load_data(experiment(config))
    (tmp_path / "some.csv").write_text("review,mood\nlovely soup.,good\ndull cake.,\n")
    config = data_config(folder, eval_file=str(tmp_path / "some.csv"))
    with pytest.raises(ConfigError, match="1 of 2 rows of EVAL_SPLIT"):
        load_data(experiment(config))


def test_names_of_tasks_are_not_taken_over(folder):
    config = dataclasses.replace(data_config(folder), mixture_or_task_name="tiny_mood")
    with pytest.raises(ConfigError, match="tiny_mood"):
        task_rows.load_eval_rows(config)
    with pytest.raises(ConfigError, match="TASK_NAME"):
        dataclasses.replace(config, mixture_or_task_name=("reviews", "tiny_mood"))
    both = data_config(folder, name="reviews")
    both = dataclasses.replace(both, mixture_or_task_name=("reviews", "tiny_mood"))
    assert [found.task.name for found in task_rows.load_eval_rows(both)] == ["reviews", "tiny_mood"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("up", "\u6f22"), "'\u6f22'"),
        (("up", " down"), "' down' as 'down'"),
        (("up", "up and down and up"), "4 of TASK_FEATURE_LENGTHS"),
    ],
)
def test_words_that_the_model_cannot_answer_with(words, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_label_words(words, load_vocabulary("tiny"), {"inputs": 8, "targets": 4})


def test_mistakes_in_a_file_reach_the_user_whole(folder, tmp_path):
    (tmp_path / "bad.csv").write_text("review,mood\nlovely soup.,god\n")
    with pytest.raises(ConfigError, match=r"bad\.csv:2.*'mood'"):
        task_rows.load_eval_rows(data_config(folder, train_file=str(tmp_path / "bad.csv")))


# One way from a row to the model's input

# Names that have a meaning of their own elsewhere, and values that other formats would read.
FIELD = st.sampled_from(["text", "inputs", "prompt", "targets", "row", "a b", "caf\u00e9"])
VALUE = st.text(st.sampled_from("ab ,;\"'{}[]\u00e9\u2028\\"), max_size=8) | st.sampled_from(
    ["inputs", '"inputs"', "sep=;", "text,label", '{"inputs": "b"}', "\ufeff", "1.0", "\x0b"]
)
FORMS = (".csv", ".tsv", ".jsonl", ".json")


def write_table(path: Path, rows: list[dict[str, str]]) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            tabs = {"delimiter": "\t"} if path.suffix == ".tsv" else {}
            writer = csv.DictWriter(file, list(rows[0]), quoting=csv.QUOTE_ALL, **tabs)
            writer.writeheader()
            writer.writerows(rows)


@st.composite
def own_rows(draw):
    names = draw(st.lists(FIELD, min_size=1, max_size=3, unique=True))
    used = draw(st.lists(st.sampled_from(names), min_size=1, max_size=3))
    rows = draw(st.lists(st.tuples(*[VALUE] * len(names)), min_size=1, max_size=4))
    rows = [dict(zip(names, row, strict=True)) | {"label": "yes"} for row in rows]
    return rows, "q: " + " / ".join(f"{{{name}}}" for name in used)


def check_one_way(
    folder: Path, rows: list[dict[str, str]], template: str, predictor: Predictor | None = None
) -> None:
    """Training, evaluation and `infer` (of a file and of a pipe) read the same rows.

    With a predictor, their tokens are the predictor's.
    """
    expected = [template.format(**row) for row in rows]
    breaks = any(mark in value for row in rows for value in row.values() for mark in "\n\t")
    for form in FORMS:
        if breaks and form == ".tsv":  # where it cannot be written
            continue
        path = folder / f"rows{form}"
        write_table(path, rows)
        files = FileTask(train_file=str(path), eval_file=str(path), input_template=template)
        files = dataclasses.replace(files, quote_char='"' if breaks else None)
        for split in (TRAIN, EVAL):
            assert [example.inputs for example in load_split(files, split)] == expected
        run = InferRun(
            checkpoint_path="tiny",
            infer_output_dir="",
            model=TINY_CONFIG,
            data=DataConfig(
                mixture_or_task_name=(), task_feature_lengths=FULL, vocabulary="tiny", files=files
            ),
        )
        answered = read_file(run, str(path))
        assert [record["inputs"] for record in answered.records] == expected
        assert [record["row"] for record in answered.records] == rows
        with mock.patch("sys.stdin", io.TextIOWrapper(path.open("rb"))):
            piped = read_file(run, "-")
        assert piped.records == answered.records
        if predictor is not None and form == ".csv":
            data = dataclasses.replace(run.data, mixture_or_task_name="own")
            (loaded,) = task_rows.load_eval_rows(data)
            train = task_rows.load_rows("own", "train", FULL)
            assert loaded.rows.input_texts == train.input_texts == expected
            ids, _ = predictor.tokenize(expected)
            for rows_of in (loaded.rows, train):
                assert [row.tolist() for row in rows_of.inputs] == ids


@settings(max_examples=30, deadline=None)
@given(own_rows())
def test_every_command_reads_a_row_alike(tmp_path_factory, drawn):
    check_one_way(tmp_path_factory.mktemp("own"), *drawn)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor.from_checkpoint(
        "tiny", TINY_CONFIG, "tiny", {}, max_input_length=FULL["inputs"]
    )


@settings(max_examples=3, deadline=None)
@given(own_rows())
def test_every_command_makes_the_same_tokens_of_a_row(tmp_path_factory, predictor, drawn):
    check_one_way(tmp_path_factory.mktemp("own"), *drawn, predictor)


def infer_run(folder, **options) -> InferRun:
    data = dataclasses.replace(data_config(folder, **options), mixture_or_task_name=())
    return InferRun(checkpoint_path="tiny", infer_output_dir="", model=TINY_CONFIG, data=data)


def answered_texts(run: InferRun, path: str, standard_input: str = "") -> list[str]:
    with mock.patch("sys.stdin", io.TextIOWrapper(io.BytesIO(standard_input.encode()))):
        texts = [record["inputs"] for record in read_file(run, path).records]
    if not standard_input:
        assert pt.read_inputs(path, run.data.files) == texts
    return texts


def test_lines_of_text_are_the_field_of_the_template(folder, tmp_path, capsys):
    run = infer_run(folder, input_template="so: {review}")
    expected = ["so: a, b", "so: "]
    assert answered_texts(run, "-", "a, b\n\n") == expected
    assert "standard input: each line is the field 'review'" in capsys.readouterr().err
    (tmp_path / "t.txt").write_text("a, b\n\n")
    assert answered_texts(run, str(tmp_path / "t.txt")) == expected
    assert answered_texts(run, "-", "mood,review\ngood,a\n") == ["so: a"]
    assert answered_texts(run, "-", "mood\treview\ngood\ta, b\n") == ["so: a, b"]
    assert answered_texts(run, "-", '[{"review": "a"},\n {"review": "{b}"}]') == [
        "so: a",
        "so: {b}",
    ]
    run = infer_run(folder, input_template="{id} {review}")
    with pytest.raises(ConfigError, match="standard input: found lines of text"):
        answered_texts(run, "-", "a, b\n")


def test_a_template_without_files_is_filled_in_as_well(folder, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"review": "a", "inputs": "b"}\n')
    run = infer_run(folder, train_file="", input_template="so: {review}")
    assert answered_texts(run, str(path)) == ["so: a"]
    run = infer_run(folder, train_file="", input_template="{text}")
    assert [record["inputs"] for record in read_file(run, str(path)).records] == ["b"]
    path.write_text('{"text": "a", "inputs": "b"}\n')  # a CSV of this row is answered for "a"
    with pytest.raises(ConfigError, match=r"rows.jsonl:1: found \"inputs\" and \"text\""):
        read_file(run, str(path))


def test_ranking_without_words_names_their_setting(folder, tmp_path):
    run = infer_run(folder, label_words=())
    run = dataclasses.replace(run, eval=EvalConfig(method="rank"))
    with pytest.raises(ConfigError, match="Set LABEL_WORDS"):
        run_infer(run, input=str(folder / "new.csv"), output=str(tmp_path / "answers"))


def test_labels_in_another_unicode_form_are_known(shared_dir):
    path = str(shared_dir / "cases" / "17-decomposed-label.csv")
    examples = load_split(FileTask(train_file=path, label_words=("tea", "caf\u00e9")), TRAIN)
    assert {example.targets for example in examples} == {"tea", "caf\u00e9"}


def test_a_column_of_inputs_is_a_column(folder, shared_dir):
    run = infer_run(folder, input_template="{text}")
    texts = [
        answered_texts(run, str(shared_dir / "cases" / f"06-inputs-column.{suffix}"))
        for suffix in ("csv", "jsonl")
    ]
    assert texts == [["i loved the soup. loved the soup.", "we enjoyed the cake."]] * 2


# What is shown before the first step


def test_overview(tmp_path):
    train = ["a b c,good", "a b c,good", "a b c,bad", f"{'a ' * 80},bad", ",good"]
    (tmp_path / "t.csv").write_text("\n".join(["review,mood", *train, "up up,good"]) + "\n")
    (tmp_path / "e.csv").write_text("review,mood\na b c,good\nnew,good\n")
    config = data_config(
        tmp_path, train_file=str(tmp_path / "t.csv"), eval_file=str(tmp_path / "e.csv")
    )
    data = load_data(experiment(config))
    text = overview.describe_data(data, config.task_feature_lengths, "validation")
    lines = [line.strip() for line in text.splitlines()]
    assert lines[0] == "reviews:"
    whole = [len(data.vocabulary.encode(line.split(",")[0])) + 1 for line in [*train, "up up,"]]
    assert max(whole) > 64
    assert (
        f"6 rows; inputs of {np.mean(whole):.0f} tokens on average, {max(whole)} at 95%, "
        f"{max(whole)} at most; cut: 16.7% of the inputs (at 64), 0.0% of the targets (at 4)"
    ) in lines[1]
    assert "train       answers: 'up' 4 (66.7%), 'down' 2 (33.3%)" in lines
    assert "validation  answers: 'up' 2 (100.0%)" in lines
    assert f"note: 1 rows of train have an empty text (the first: {tmp_path / 't.csv'}:6)" in lines
    left_out = "macro_f1 is over the classes that occur"
    assert f"note: no row of validation has the answer 'down'; {left_out}" in lines
    assert (
        "note: 2 rows of train repeat the text of another; 1 texts have more than one answer"
    ) in lines
    assert any(line.startswith("note: 1 of the 2 texts of validation are") for line in lines)
    assert lines[-1] == "the first row, as the model sees it: 'a b c' -> 'up'"


def test_overview_suggests_classes(folder):
    config = data_config(folder, label_words=())
    data = load_data(experiment(config))
    text = overview.describe_data(data, config.task_feature_lengths, "validation")
    assert "note: only 2 different answers; LABEL_WORDS would make classes of them" in text


def test_overview_names_answers_that_are_cut_or_long(folder):
    config = data_config(folder, label_words={"good": "positive", "bad": "down"})
    config = dataclasses.replace(config, task_feature_lengths={"inputs": 64, "targets": 16})
    data = load_data(experiment(config))
    text = overview.describe_data(data, config.task_feature_lengths, "validation")
    assert f"of many tokens: 'positive' ({len(data.vocabulary.encode('positive'))});" in text
    assert "answers of train are truncated" not in text
    config = data_config(folder, label_words=(), input_template="{id}", target_field="review")
    data = load_data(experiment(config))
    text = overview.describe_data(data, config.task_feature_lengths, "validation")
    rows = data.train[0]
    assert f"note: {len(rows)} of the {len(rows)} answers of train are truncated" in text


def test_overview_of_free_text(folder):
    config = data_config(folder, label_words=(), input_template="{id}", target_field="review")
    config = dataclasses.replace(config, task_feature_lengths={"inputs": 8, "targets": 64})
    data = load_data(experiment(config))
    text = overview.describe_data(data, config.task_feature_lengths, "validation")
    assert "LABEL_WORDS" not in text
    assert re.search(r"train +answers: \d+ different, '.*' the most frequent \(\d+\)", text)


def write_rows(path: Path, rows: list[tuple[str, str]]) -> str:
    path.write_text("\n".join(json.dumps({"review": a, "mood": b}) for a, b in rows) + "\n")
    return str(path)


def test_overview_counts_what_the_vocabulary_cannot_write(tmp_path):
    answers = ["a \u2192 b", "b \u2190 a", "a cake"]
    rows = [(f"\u6c64 {i}" if i < 2 else f"soup {i}", answers[i % 3]) for i in range(6)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    config = data_config(tmp_path, train_file=file, eval_file=file, label_words=())
    config = dataclasses.replace(config, task_feature_lengths={"inputs": 64, "targets": 16})
    data = load_data(experiment(config))
    assert data.vocabulary.lost(answers[0]) == ["\u2192"]
    assert data.vocabulary.lost("\u00bd \u03c0") == ["\u00bd", "\u03c0"]  # a half is three pieces
    text = overview.describe_data(data, config.task_feature_lengths, "validation")
    for split in ("train", "validation"):
        assert re.search(rf"inputs of {split}: 2 of 6 .*'\u6c64' in 2 rows", text)
        assert re.search(
            rf"answers of {split}: 4 of 6 .*'\u2192' in 2 rows, '\u2190' in 2 rows", text
        )
    assert "The best score that is left: exact_match 33.3" in text


def test_overview_names_answers_that_are_numbers(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [(f"soup {i}", f"{i % 3}") for i in range(12)])
    config = data_config(tmp_path, train_file=file, eval_file=file, label_words=())
    data = load_data(experiment(config))
    (task,) = data.eval_tasks
    text = overview.describe_data(data, config.task_feature_lengths, "validation")
    assert "note: the answers of validation are numbers" in text
    assert "different answers" not in text  # one note, which says both
    correlations = {"pearson_corrcoef": pytest.approx(100), "spearman_corrcoef": pytest.approx(100)}
    assert task.metrics(task.targets) == {"exact_match": 100.0, **correlations}


def test_a_class_whose_rows_become_alike_is_refused(tmp_path):
    rows = [("\u6c64", "good"), ("\u997a", "good"), ("dull cake.", "bad"), ("horrid soup.", "bad")]
    new = write_rows(tmp_path / "new.jsonl", rows[2:])
    for words in ({"good": "up", "bad": "down"}, ()):
        file = write_rows(tmp_path / "rows.jsonl", rows)
        config = data_config(tmp_path, train_file=file, eval_file=new, label_words=words)
        scored = data_config(tmp_path, train_file=new, eval_file=file, label_words=words)
        for refused in (config, scored):
            with pytest.raises(
                ConfigError, match=r"2 inputs of reviews .*2 different.*'\u6c64' in 1"
            ):
                load_data(experiment(refused))
        # One that the model can tell from the others is enough; so are equal texts.
        for more in ([*rows, ("lovely", "good")], [rows[0], *rows[:1], *rows[2:]]):
            write_rows(tmp_path / "rows.jsonl", more)
            assert len(load_data(experiment(config)).train[0]) == len(more)


# The worked example of the documentation


def commands() -> list[list[str]]:
    """The commands of docs/your_own_data.md, as the shell would hand them over."""
    import shlex

    blocks = re.findall(r"```bash\n(.*?)```", DOC, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("t5x ")]


@pytest.mark.slow
def test_the_documented_commands(tmp_path, monkeypatch, capsys):
    """Shortened to two steps; the test below runs them as they are."""
    monkeypatch.chdir(tmp_path)
    write_reviews(tmp_path / "reviews.csv", "train", 60)
    write_reviews(tmp_path / "new.csv", "test", 4, labels=False)
    train, evaluate, infer = commands()
    short = ["--gin.TRAIN_STEPS_RELATIVE=2", "--gin.EVAL_PERIOD=2", "--gin.BATCH_SIZE=8"]
    short.append("--gin.EVAL_BASELINES=False")
    assert cli.main([*train, "--dry_run"]) == 0
    assert "\nTRAIN_FILE = 'reviews.csv'  # the command line\n" in capsys.readouterr().out
    assert cli.main([*train, *short]) == 0
    out = capsys.readouterr().out
    assert out.startswith("custom:\n  train       54 rows; ")
    assert "macro_f1/generate" in out
    with Path("reviews.csv").open("a") as file:
        file.write("60,lovely soup.,good\n")
    assert cli.main([*train, *short]) == 2
    assert "training or evaluation file" in capsys.readouterr().err
    assert cli.main(evaluate) == 0
    assert "runs/reviews/prompts/best" in capsys.readouterr().out
    assert cli.main(infer) == 0
    answers = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    assert [answer["row"]["id"] for answer in answers] == ["0", "1", "2", "3"]
    assert set(answers[0]["label_scores"]) == {"up", "down"}


@pytest.mark.slow
def test_the_documented_run_learns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_reviews(tmp_path / "reviews.csv", "train", 2000)
    train = commands()[0]
    assert cli.main(train) == 0
    text = Path("runs/reviews/metrics.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    scores = [r["value"] for r in records if r["name"] == "accuracy/rank" and "prompt" not in r]
    assert max(scores) >= 95.0


def test_the_python_api_takes_the_same(folder):
    data = load_data(
        dataclasses.replace(experiment(data_config(folder)), eval=EvalConfig(method="both"))
    )
    assert data.eval_tasks[0].label_words == ("up", "down")
