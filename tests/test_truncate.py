"""Of an input that is too long its end is cut, as in T5, or the end of its longest field."""

import json

import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import load_data

import prompt_tuning as pt
from prompt_tuning.config import ConfigError, DataConfig, Experiment, FileTask
from prompt_tuning.serving.predictor import Predictor
from prompt_tuning.session import overview
from prompt_tuning.tasks import glue, qa, superglue
from prompt_tuning.tasks.file_examples import fill_template, parse_template
from prompt_tuning.tasks.spec import FIELDS, to_examples
from prompt_tuning.tasks.task_rows import load_eval_rows, load_rows
from prompt_tuning.vocabularies.truncate import Input, encode_input, find_losses, join_fields
from prompt_tuning.vocabularies.vocabulary import ByteVocabulary, load_vocabulary
from prompt_tuning.world.assets import TINY_CONFIG

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
BYTES = ByteVocabulary()


def make_input(*pairs: tuple[str, str]) -> Input:
    return join_fields((f"{name}: ", text, name) for name, text in pairs)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4), st.integers(1, 60))
def test_the_longest_fields_lose_their_ends(pairs, length):
    text = join_fields((literal, field, str(n)) for n, (literal, field) in enumerate(pairs))
    literals, fields = ([text.encode() for text in texts] for texts in zip(*pairs, strict=True))
    assert [text.encode()[f.start : f.end] for f in text.fields] == fields
    if len(text.encode()) < length:
        for how in ("end", "longest_field"):
            assert encode_input(BYTES, text, length, how) == [*BYTES.encode(text), 1]
        return
    assert encode_input(BYTES, text, length, "end") == [*BYTES.encode(text)[: length - 1], 1]
    if sum(map(len, literals)) > length - 1:
        with pytest.raises(ConfigError, match="its other words alone are too many"):
            encode_input(BYTES, text, length, "longest_field")
        return
    ids = encode_input(BYTES, text, length, "longest_field")
    assert len(ids) == length
    losses = {int(loss.field): loss for loss in find_losses(BYTES, text, length, "longest_field")}
    kept = [losses[n].kept if n in losses else len(field) for n, field in enumerate(fields)]
    expected = b"".join(a + f[:k] for a, f, k in zip(literals, fields, kept, strict=True))
    assert bytes(i - 3 for i in ids[:-1]) == expected
    assert {losses[n].whole for n in losses} <= set(map(len, fields))
    # What has lost a token is as long as the longest that is left, or one token shorter.
    assert all(max(kept) - losses[n].kept <= 1 for n in losses)


def test_the_passage_is_cut_and_the_question_stays(shared_dir):
    vocabulary = load_vocabulary(str(shared_dir / "data" / "t5_vocab" / "sentencepiece.model"))
    passage = "It is a caf\u00e9, they say.  Is it? " * 100
    text = make_input(("passage", passage), ("question", "is it \ufb01ne"))
    ids = encode_input(vocabulary, text, 64, "longest_field")
    assert len(ids) == 64
    assert vocabulary.decode(ids).endswith("question: is it fine")
    assert ids[:40] == vocabulary.encode(text)[:40]
    whole = len(vocabulary.encode(" is it fine"))
    assert ("question", 0, whole) in find_losses(vocabulary, text, 64, "end")
    assert [loss.field for loss in find_losses(vocabulary, text, 64, "longest_field")] == [
        "passage"
    ]
    short = encode_input(vocabulary, make_input(("passage", "a b")), 64, "longest_field")
    assert short == [*vocabulary.encode("passage: a b"), 1]


def test_texts_whose_fields_are_not_known():
    assert encode_input(BYTES, "abc", 4, "longest_field") == [*BYTES.encode("abc"), 1]
    with pytest.raises(ConfigError, match=r"TRUNCATE = 'longest_field'.*INPUT_TEMPLATE"):
        encode_input(BYTES, "abcd", 4, "longest_field")
    assert find_losses(BYTES, "abcd", 4, "end") == ()


# Where the fields of a task are


def of_names(spec, **others):
    texts = {name: f" {name} \u00e9, 'x' " for name in spec.columns or spec.features}
    return {**texts, "idx": 0, "label": 1, **others}


SPECS = [s for s in (*superglue.SUPER_GLUE, *glue.TASKS.values()) if s.features]
NESTED = {"paragraph": 0, "question": 0, "answer": 0}
RAW = {
    superglue.MULTIRC.name: of_names(superglue.MULTIRC, idx=NESTED, paragraph="<b>a</b><br>b"),
    superglue.RECORD.name: {
        "idx": {"passage": 0, "query": 0},
        **{"passage": "A b.\n@highlight\nC.", "query": "X @placeholder.", "answers": ["Y"]},
        "entities": ["Y", "Z"],
    },
    qa.SQUAD.name: {
        **{"id": "0", "question": "(why?)", "context": " so.", "answers": {"text": ["so"]}},
    },
}
TEXTS = {
    superglue.MULTIRC.name: {"paragraph": "a b"},
    superglue.RECORD.name: {"query": "X @placeholder.", "entities": "Y, Z", "passage": "A b. C."},
    qa.SQUAD.name: {"question": "( why ? )", "context": "so . "},
}


@pytest.mark.parametrize("task_word", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_spans_of_a_task_are_its_fields(task_word):
    for spec in [*SPECS, superglue.RECORD, qa.SQUAD]:
        raw = RAW.get(spec.name, of_names(spec))
        dataset = tf.data.Dataset.from_tensors(raw)
        (example,) = to_examples(dataset, spec, task_word=task_word, with_fields=True)
        columns = zip(spec.features, spec.columns or spec.features, strict=True)
        expected = {name: raw[column] for name, column in columns} | TEXTS.get(spec.name, {})
        inputs = example["inputs"].numpy()
        spans = example["input_spans"].numpy().reshape(-1, 2)
        names = [name.decode() for name in example["input_fields"].numpy()]
        texts = [inputs[start:end].decode() for start, end in spans]
        assert dict(zip(names, texts, strict=True)) == expected
        word = [spec.word] if task_word and spec.word else []
        parts = [f"{name}: {text}" for name, text in expected.items()]
        assert inputs.decode() == " ".join([*word, *parts])
        (example,) = to_examples(dataset, spec, task_word=task_word)
        assert not set(FIELDS) & set(example)


# Own files: the same in training, evaluation, `infer` and the predictor


@pytest.fixture
def own(tmp_path) -> DataConfig:
    rows = [{"p": "loved the soup. " * n, "q": "so?", "label": "up"} for n in (1, 4, 5)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(
        mixture_or_task_name="own",
        task_feature_lengths={"inputs": 40, "targets": 8},
        vocabulary="bytes",
        truncate="longest_field",
        files=FileTask(train_file=str(path), eval_file=str(path), input_template="p: {p} q: {q}"),
    )


def test_rows_and_the_predictor_are_cut_alike(own):
    (loaded,) = load_eval_rows(own)
    train = load_rows(
        "own", "train", own.task_feature_lengths, vocabulary=BYTES, truncate=own.truncate
    )
    texts = pt.read_inputs(own.files.train_file, own.files)
    predictor = Predictor.from_checkpoint(
        "tiny", TINY_CONFIG, "bytes", {}, max_input_length=40, truncate="longest_field"
    )
    ids, cut = predictor.tokenize(texts)
    assert cut == [1, 2]
    for rows in (loaded.rows, train):
        assert [tokens.tolist() for tokens in rows.inputs] == ids
        assert rows.input_texts == texts
        assert rows.truncated_inputs == 2
    assert {BYTES.decode(tokens)[-7:] for tokens in ids} == {" q: so?"}
    parts = parse_template(own.files.input_template)
    fields = {"p": "loved the soup. " * 4, "q": "so?"}
    assert BYTES.encode(fill_template(parts, fields.__getitem__)[:32]) == ids[1][:32]


def test_the_table_names_the_fields_that_are_lost(own):
    experiment = Experiment(
        model_dir="out",
        initial_checkpoint_path="tiny",
        model=TINY_CONFIG,
        data=DataConfig(**{**vars(own), "truncate": "end"}),
    )
    data = load_data(experiment)
    text = overview.describe_data(data, own.task_feature_lengths, "validation", "end")
    assert (
        "note: of the 2 inputs of train that are longer than 40 tokens 2 lose all of 'q', 2 "
        "lose the end of 'p'. TRUNCATE = 'longest_field' cuts the longest field instead"
    ) in text
    text = overview.describe_data(data, own.task_feature_lengths, "validation", "longest_field")
    assert "longer than 40 tokens 2 lose the end of 'p'" in text
    assert "TRUNCATE" not in text
