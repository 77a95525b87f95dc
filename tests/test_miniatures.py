"""The miniatures can be answered by who reads them, and not by who counts their words."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from prompt_tuning.config import ConfigError, gin_reader
from prompt_tuning.model import t5

WORLD = Path(__file__).parents[1] / "benchmarks" / "world"
sys.path.append(str(WORLD))
import language  # noqa: E402
import make  # noqa: E402
import miniatures  # noqa: E402

sys.path.pop()
pytestmark = pytest.mark.slow

SEED = 23
SIZES = {"train": 700, "val": 150, "test": 20}


@pytest.fixture(scope="module")
def worlds() -> dict[str, dict[str, list[dict]]]:
    return {task: make.make_rows(task, SEED + i, SIZES) for i, task in enumerate(miniatures.TASKS)}


def facts(text: str) -> set[str]:
    return {part.strip() for part in text.split(".") if part.strip()}


# A reader for each task: what the rows of `val` say, worked out from their text alone.


def read_boolq(row) -> bool:
    known, asked = facts(row["passage"]), row["question"]
    if found := re.fullmatch(r"does (\w+) have (a \w+ \w+)", asked):
        return f"{found[1]} has {found[2]}" in known
    if found := re.fullmatch(r"is (\w+) at the (\w+)", asked):
        return f"{found[1]} is at the {found[2]}" in known
    found = re.fullmatch(r"does (\w+) have the (\w+)", asked)
    return any(re.fullmatch(rf"{found[1]} has a \w+ {found[2]}", fact) for fact in known)


def read_cb(row) -> str:
    (report,) = (part for part in facts(row["premise"]) if part.endswith(row["hypothesis"]))
    verb = report.split(" ", 1)[1]
    return next(k for k, verbs in language.REPORTS.items() if verb.startswith(tuple(verbs)))


def read_copa(row) -> int:
    name, given = row["premise"].rstrip(".").split(" ", 1)
    wanted = {cause: effect for cause, effect in language.RULES}
    if row["question"] == "cause":
        wanted = {effect: cause for cause, effect in language.RULES}
    return [row["choice1"], row["choice2"]].index(f"{name} {wanted[given]}.")


def read_rte(row) -> str:
    known = facts(row["premise"])
    first, middle, last = re.fullmatch(
        r"(.*\w) (is .*(?:than|in)) (.*)\.", row["hypothesis"]
    ).groups()
    step = {part.split(" is ")[0]: re.split(r" (?:than|in) ", part)[1] for part in known}
    del middle
    return "entailment" if step.get(step.get(first, "")) == last else "not_entailment"


def read_wic(row) -> bool:
    def sense(sentence: str) -> int:
        told = sentence.split(" says that ")[1].rstrip(".")
        return next(i for i, texts in enumerate(language.SENSES[row["word"]]) if told in texts)

    for place in ("1", "2"):
        text = row[f"sentence{place}"]
        assert text[row[f"start{place}"] : row[f"end{place}"]] == row["word"]
    return sense(row["sentence1"]) == sense(row["sentence2"])


def read_wsc(row) -> bool:
    doer, deed, other, _, she, reason = row["text"].rstrip(".").split(" ", 5)
    target, words = row["target"], row["text"].split()
    assert words[target["span1_index"]] == target["span1_text"]
    assert words[target["span2_index"]] == target["span2_text"] == she
    (about,) = (a for d, r, a in language.DEEDS if (d, r) == (deed, reason))
    return target["span1_text"] == (doer if about == "doer" else other)


def read_multirc(row) -> list[int]:
    known = facts(row["passage"]["text"])
    answers = []
    for question in row["passage"]["questions"]:
        name = re.fullmatch(r"what does (\w+) have\?", question["question"])[1]
        answers += [int(f"{name} has {answer['text']}" in known) for answer in question["answers"]]
    return answers


def read_record(row) -> str:
    text, (query,) = row["passage"]["text"], row["qas"]
    names = {text[e["start"] : e["end"] + 1] for e in row["passage"]["entities"]}
    if found := re.fullmatch(r"@placeholder has the (\w+)\.", query["query"]):
        pattern = rf"(\w+) has a \w+ {found[1]}\."
    else:
        place = re.fullmatch(r"the one at the (\w+) is @placeholder\.", query["query"])[1]
        pattern = rf"(\w+) is at the {place}\."
    (name,) = re.findall(pattern, text)
    assert name in names
    return name


READERS = {
    "BoolQ": read_boolq,
    "CB": read_cb,
    "COPA": read_copa,
    "RTE": read_rte,
    "WiC": read_wic,
    "WSC": read_wsc,
    "MultiRC": read_multirc,
    "ReCoRD": read_record,
}


def label(task: str, row) -> object:
    if task == "MultiRC":
        return [a["label"] for q in row["passage"]["questions"] for a in q["answers"]]
    return row["qas"][0]["answers"][0]["text"] if task == "ReCoRD" else row["label"]


@pytest.mark.parametrize("task", READERS)
def test_a_reader_answers_every_row(worlds, task: str):
    rows = worlds[task]["train"] + worlds[task]["val"]
    assert [READERS[task](row) for row in rows] == [label(task, row) for row in rows]


def items(task: str, rows) -> tuple[list[str], list]:
    """The words of what is to be judged, and the judgement."""
    if task != "MultiRC":
        return [words(row) for row in rows], [row["label"] for row in rows]
    texts, labels = [], []
    for row in rows:
        for question in row["passage"]["questions"]:
            for answer in question["answers"]:
                texts.append(f"{row['passage']['text']} {question['question']} {answer['text']}")
                labels.append(answer["label"])
    return texts, labels


def words(row) -> str:
    parts = [v for k, v in row.items() if isinstance(v, str) and k != "label"]
    return " ".join([*parts, row.get("target", {}).get("span1_text", "")])


@pytest.mark.parametrize("task", [task for task in READERS if task != "ReCoRD"])
def test_counting_words_does_not_answer(worlds, task: str):
    """A classifier over words and pairs of words is at most four standard errors above chance."""
    (texts, labels), (asked, truth) = (items(task, worlds[task][s]) for s in ("train", "val"))
    count = CountVectorizer(ngram_range=(1, 2) if task != "CB" else (1, 1))
    model = LogisticRegression(max_iter=300).fit(count.fit_transform(texts), labels)
    score = float(np.mean(model.predict(count.transform(asked)) == np.array(truth)))
    classes = len(set(labels))
    assert score < 1 / classes + 4 * np.sqrt(1 / classes * (1 - 1 / classes) / len(truth))


@pytest.mark.parametrize("task", [task for task in READERS if task != "ReCoRD"])
def test_no_answer_is_commoner_than_chance(worlds, task: str):
    _, labels = items(task, worlds[task]["val"])
    shares = np.unique(labels, return_counts=True)[1] / len(labels)
    assert shares.max() < 1 / len(shares) + 0.06


@pytest.mark.parametrize("task", READERS)
def test_splits_share_no_row_and_tests_have_no_labels(worlds, task: str):
    splits = worlds[task]
    seen = [{make._content(row) for row in rows} for rows in splits.values()]
    assert [len(s) for s in seen] == list(SIZES.values())
    assert not (seen[0] & seen[1] | seen[0] & seen[2] | seen[1] & seen[2])
    assert '"label"' not in json.dumps(splits["test"])
    assert '"answers": [{"start"' not in json.dumps(splits["test"])


def test_a_seed_gives_the_same_files_and_another_seed_others(tmp_path: Path):
    one, same, other = (
        make.make_world(seed, str(tmp_path / name), texts=50, train_rows=20)
        for seed, name in ((5, "a"), (5, "b"), (6, "c"))
    )
    files = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file())
    assert len(files) == 3 + 3 * len(miniatures.TASKS)
    for file in files:
        assert (one / file).read_bytes() == (same / file).read_bytes()
        assert (one / file).read_bytes() != (other / file).read_bytes()
    with pytest.raises(ConfigError, match="there and not empty"):
        make.make_world(5, str(one))


def test_the_corpus_has_no_held_out_text_in_quantity_and_no_task_format():
    corpus, unseen = set(language.corpus(5000, 4)), list(language.corpus(300, 5))
    long = [text for text in unseen if len(text.split()) > 20]
    assert not corpus & set(long)
    assert not any(":" in text for text in corpus)  # the tasks' inputs name their parts with it


def test_too_many_rows_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no .* different rows of WSC"):
        make.make_rows("WSC", 0, {"train": 100_000})


def test_prepare_superglue_takes_the_rows(tmp_path: Path):
    from prompt_tuning.tasks.prepare import prepare_superglue

    world = make.make_world(3, str(tmp_path / "world"), texts=10, train_rows=4)
    prepared = prepare_superglue(world / "superglue", tmp_path / "tfds")
    rows = {p.task: p.rows for p in prepared}
    assert {task: found["train"] for task, found in rows.items()} == {
        **dict.fromkeys(("boolq", "cb", "copa", "record", "rte", "wic", "wsc", "wsc.fixed"), 4),
        "multirc": 24,
    }


@pytest.mark.parametrize("size", ["200k", "1m", "3m", "10m"])
@pytest.mark.parametrize("phase", ["pretrain", "lm_adapt"])
def test_models_have_the_size_that_they_name(size: str, phase: str):
    where = ["MODEL_DIR = 'out'", "INITIAL_CHECKPOINT_PATH = 'runs/1m/checkpoint_2000'"]
    run = gin_reader.load([f"world_{size}.gin", f"{phase}.gin"], where, [str(WORLD)]).run
    named = {"200k": 2e5, "1m": 1e6, "3m": 3e6, "10m": 1e7}[size]
    total = sum(shape.size for shape in t5.param_shapes(run.model).values())
    assert 0.9 < total / named < 1.1
    assert f"{total:,} parameters" in (WORLD / f"world_{size}.gin").read_text()
    assert run.corpus.objective != "task"
