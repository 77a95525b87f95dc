"""The user's own files: nothing is lost or changed, and what is wrong is said exactly."""

import csv
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prompt_tuning.config import ConfigError, FileTask
from prompt_tuning.tasks.file_examples import (
    EVAL,
    TRAIN,
    fill_template,
    hold_out,
    load_split,
    make_examples,
    parse_template,
)
from prompt_tuning.tasks.file_reader import Row, read_rows
from prompt_tuning.tasks.metrics import macro_f1, score_texts

TASK = FileTask(label_words=("bad", "good"))
# No halves of surrogate pairs, which are no text; everything else, line breaks and quotes included.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NAMES = st.lists(
    TEXT.filter(lambda name: name == name.strip() and name), min_size=1, max_size=4, unique=True
)


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def refusal(call, *arguments, **options):
    with pytest.raises(ConfigError) as error:
        call(*arguments, **options)
    return str(error.value)


# Properties


@settings(max_examples=60, deadline=None)
@given(st.data(), NAMES, st.sampled_from([",", ";", "|"]), st.sampled_from(["\n", "\r\n"]))
def test_every_cell_of_a_csv_comes_back(tmp_path_factory, data, names, delimiter, end):
    cells = st.lists(TEXT, min_size=len(names), max_size=len(names))
    table = data.draw(st.lists(cells, min_size=1, max_size=5))
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([names, *table])
    path = write(tmp_path_factory.mktemp("csv"), "table.csv", file.getvalue())
    rows = read_rows(path, FileTask(delimiter=delimiter, quote_char='"'))
    assert [list(row.fields) for row in rows] == [names] * len(table)
    assert [list(row.fields.values()) for row in rows] == table
    lines = [int(row.where.removeprefix(f"{path}:")) for row in rows]
    assert lines == sorted(set(lines))
    assert lines[0] >= 2


JSON = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(TEXT, JSON, max_size=4), min_size=1, max_size=5), st.booleans())
def test_every_value_of_json_comes_back(tmp_path_factory, objects, as_list):
    lines = (json.dumps(o, ensure_ascii=False) for o in objects)
    text = json.dumps(objects) if as_list else "\n".join(lines)
    path = write(tmp_path_factory.mktemp("json"), "rows.json", text)
    assert [row.fields for row in read_rows(path, TASK)] == objects


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(TEXT, st.integers(0, 2)), min_size=2, max_size=40),
    st.floats(0.05, 0.95),
    st.randoms(),
)
def test_the_held_out_rows_follow_from_the_texts_alone(pairs, share, random):
    rows = [Row(f"f:{i}", {"text": t, "label": n}) for i, (t, n) in enumerate(pairs)]
    config = FileTask(label_words=("a", "b", "c"))
    examples = make_examples(rows, config, labelled=True)
    assert [e.inputs for e in examples] == [text for text, _ in pairs]
    assert [e.targets for e in examples] == ["abc"[n] for _, n in pairs]
    held_out = hold_out(examples, share)
    kept = {e.inputs for i, e in enumerate(examples) if i not in held_out}
    texts = {examples[i].inputs for i in held_out}
    assert not kept & texts  # no text is on both sides
    assert abs(len(texts) - share * len(kept | texts)) <= 0.5 + 1e-6
    shuffled = random.sample(examples, len(examples))
    assert {shuffled[i].inputs for i in hold_out(shuffled, share)} == texts


@settings(max_examples=60, deadline=None)
@given(TEXT, st.dictionaries(NAMES.map(lambda names: names[0]), TEXT, min_size=1, max_size=3))
def test_a_template_gives_the_texts_between_its_own(literal, fields):
    usable = {n: v for n, v in fields.items() if not set(n) & set("{}!:[].")} or {"x": ""}
    escaped = literal.replace("{", "{{").replace("}", "}}")
    template = escaped + escaped.join(f"{{{name}}}" for name in usable)
    expected = literal + literal.join(usable.values())
    assert fill_template(parse_template(template), usable.__getitem__) == expected


def test_every_answer_has_its_share_of_what_is_held_out():
    rows = [Row("f", {"text": f"text {i}", "label": int(i % 10 == 0)}) for i in range(200)]
    examples = make_examples(rows, TASK, labelled=True)
    answers = [examples[i].targets for i in hold_out(examples, 0.1)]
    assert (answers.count("bad"), answers.count("good")) == (18, 2)


# Files as people have them


def test_a_spreadsheets_csv(tmp_path):
    text = '\ufeff, text ,label\r\n0,"two\r\nlines, ""quoted""",1\r\n\r\n1, spaces ,0\r\n'
    rows = read_rows(write(tmp_path, "t.csv", text), TASK)
    assert [row.where.rsplit(":", 1)[1] for row in rows] == ["2", "5"]
    assert rows[0].fields == {"": "0", "text": 'two\r\nlines, "quoted"', "label": "1"}
    assert rows[1].fields["text"] == " spaces "


def test_a_quote_in_a_tsv_joins_no_rows(tmp_path):
    lines = ["text\tlabel", '"so" he said\t1', '"\t0', '"open\t1', 'end"\t0']
    lines += ['"a\tb"\t1', '"say ""a"""\t0', '"text\t1"', ""]
    expected = ['"so" he said', '"', '"open', 'end"', "a\tb", 'say "a"', '"text']
    for end in ("\n", "\r\n", "\r"):
        path = write(tmp_path, "t.tsv", end.join(lines))
        rows = read_rows(path, TASK)
        assert [row.fields["text"] for row in rows] == expected
        assert rows[-1] == Row(f"{path}:8", {"text": '"text', "label": '1"'}, header=True)


def test_quotes_of_a_tsv_go_over_lines_where_that_is_asked_for(tmp_path):
    path = write(tmp_path, "t.tsv", 'text\tlabel\n"one\ntwo"\t1\n')
    assert "t.tsv:2: found 1 fields" in (text := refusal(read_rows, path, TASK))
    assert "set QUOTE_CHAR = '\"'" in text
    (row,) = read_rows(path, FileTask(quote_char='"'))
    assert row.fields["text"] == "one\ntwo"


def test_a_quote_in_a_csv_that_joins_rows_is_refused(tmp_path, capsys):
    swallowed = ['"so it was,1', *["what,0"] * 3, 'end",1']
    for lines in (swallowed, ['"so, so,1', *swallowed[1:]], swallowed[:1] + swallowed[-1:]):
        path = write(tmp_path, "t.csv", "\n".join(["text,label", "fine,0", *lines]))
        assert f"t.csv:3: a field that begins with a quote goes on to line {len(lines) + 2}" in (
            refusal(read_rows, path, TASK)
        )
    path = write(tmp_path, "t.csv", "\n".join(["text,label", '"so,1', "what,0", 'end",1', ""]))
    assert [row.fields["label"] for row in read_rows(path, FileTask(quote_char=""))] == list("101")
    capsys.readouterr()
    (row,) = read_rows(path, FileTask(quote_char='"'))
    assert row.fields == {"text": "so,1\nwhat,0\nend", "label": "1"}
    assert f"note: {path}:2: " in capsys.readouterr().err
    path = write(tmp_path, "one.csv", 'text\n"so\nwhat"\nfine\n')  # a single column
    assert "one.csv:2" in refusal(read_rows, path, TASK)


def test_paragraphs_in_quotes_are_text(tmp_path, capsys):
    text = "First, this.\n\nThen that, that, that, that.\nThe end"
    path = write(tmp_path, "t.csv", f'id,text,label\n1,"{text}",1\n2,b,0\n')
    assert [row.fields["text"] for row in read_rows(path, TASK)] == [text, "b"]
    assert capsys.readouterr().err == ""


def test_excels_line_names_the_delimiter(tmp_path):
    for text in ("sep=;\r\ntext;label\r\na,b;1\r\n", '\ufeff"sep=;"\ntext;label\na,b;1\n'):
        path = write(tmp_path, "t.csv", text)
        expected = [Row(f"{path}:3", {"text": "a,b", "label": "1"}, header=True)]
        assert read_rows(path, TASK) == read_rows(path, FileTask(delimiter=";")) == expected
    assert "t.csv:1: the file says that ';'" in refusal(read_rows, path, FileTask(delimiter="|"))


def test_lines_that_end_in_cr(tmp_path):
    for name, text in (("t.csv", "text,label\ra,1\rb,0\r"), ("t.tsv", "text\tlabel\ra\t1\rb\t0")):
        rows = read_rows(write(tmp_path, name, text), TASK)
        assert [row.fields["text"] for row in rows] == ["a", "b"]
    path = write(tmp_path, "t.jsonl", '{"text": "a"}\r{"text": "b"}\r')
    assert [row.where for row in read_rows(path, TASK)] == [f"{path}:1", f"{path}:2"]


def test_the_inputs_on_which_rows_were_lost(shared_dir):
    for name, delimiter in (("01-stray-quotes.tsv", "\t"), ("08-sep-line.csv", ";")):
        path = shared_dir / "cases" / name
        lines = path.read_text().splitlines()
        lines = lines[lines[0].startswith("sep=") + 1 :]
        rows = read_rows(str(path), TASK)
        assert [delimiter.join(row.fields.values()) for row in rows] == lines


def test_huge_fields_are_read_and_the_limit_of_the_program_stays(tmp_path):
    limit = csv.field_size_limit()
    path = write(tmp_path, "t.csv", f"text,label\n{'x' * 200_000},1\n")
    assert len(read_rows(path, TASK)[0].fields["text"]) == 200_000
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("words", "labels"),
    [
        (("bad", "good"), ["0", "1", "bad", "good", " good ", "1.0"]),
        ({0: "bad", 1: "good"}, ["0", "1", "0", "1", "1", "1.0"]),
        ({"0": "bad", "1": "good"}, [0, 1, 0, 1.0, True - 0, "1"]),
        ({False: "bad", True: "good"}, ["False", "TRUE", False, True, "true", True]),
        ({"neg": "bad", "pos": "good"}, ["neg", "pos", "neg", "pos", "pos", "pos "]),
        ({"1": "bad", "4": "good", "5": "good"}, ["1", 4, 1, 5, "5", "4.0"]),
    ],
)
def test_labels_as_csv_and_json_write_them(words, labels):
    rows = [Row("f", {"text": "t", "label": label}) for label in labels]
    found = make_examples(rows, FileTask(label_words=words), labelled=True)
    assert [e.targets for e in found] == ["bad", "good", "bad", "good", "good", "good"]


def test_letters_with_accents_are_the_same_however_they_are_written():
    one, two = "caf\u00e9", "cafe\u0301"
    for words in ((one, "tea"), (two, "tea"), {one: one, "t": "tea"}, {two: two, "t": "tea"}):
        config = FileTask(label_words=words, input_template=f"{{{one}}}", target_field=two)
        rows = [Row("f", {two: label, "x": "y"}) for label in (one, two)]
        assert "which is the answer" in refusal(make_examples, rows, config, labelled=True)
        config = FileTask(label_words=words, input_template=f"{{{one}s}}", target_field=two)
        rows = [Row("f", {f"{two}s": two, one: label}) for label in (one, two)]
        for example in make_examples(rows, config, labelled=True):
            assert example[:2] == (two, one)  # a text stays as it is


def test_columns_that_differ_in_nothing_else_are_twice_there(tmp_path):
    path = write(tmp_path, "t.csv", "caf\u00e9,cafe\u0301\na,b\n")
    assert "names 'caf\u00e9' twice" in refusal(read_rows, path, TASK)


def test_words_that_are_numbers_are_no_places():
    config = FileTask(label_words=("1", "2", "3"))
    (one,) = make_examples([Row("f", {"text": "t", "label": 1})], config, labelled=True)
    assert one.targets == "1"
    rows = [Row("f:2", {"text": "t", "label": 0})]
    assert "labels that LABEL_WORDS does not name: '0'" in refusal(
        make_examples, rows, config, labelled=True
    )


def test_free_text_stays_as_it_is():
    config = FileTask(input_template="{{q}} {q}?", target_field="a")
    (one,) = make_examples([Row("f", {"q": "{who}", "a": " I.\nYou. "})], config, labelled=True)
    assert one[:2] == ("{q} {who}?", " I.\nYou. ")


def test_numbers_and_booleans_in_a_template_are_written_as_in_json():
    config = FileTask(input_template="{n} {x} {b}")
    rows = [Row("f", {"n": 3, "x": 0.5, "b": True})]
    assert make_examples(rows, config, labelled=False)[0][:2] == ("3 0.5 true", None)


def test_splits(tmp_path):
    train = write(tmp_path, "a.csv", "text,label\n" + "".join(f"t{i},{i % 2}\n" for i in range(20)))
    config = FileTask(train_file=train, label_words=("bad", "good"), eval_share=0.2)
    both = load_split(config, TRAIN), load_split(config, EVAL)
    assert [len(split) for split in both] == [16, 4]
    assert {e.inputs for split in both for e in split} == {f"t{i}" for i in range(20)}
    other = FileTask(
        train_file=train,
        eval_file=write(tmp_path, "b.jsonl", '{"text": "new"}\n'),
        label_words=("bad", "good"),
    )
    assert len(load_split(other, TRAIN)) == 20
    assert load_split(other, EVAL)[0].targets is None


# Mistakes


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "", "t.csv is empty"),
        ("t.jsonl", " \n", "t.jsonl is empty"),
        ("t.csv", "text,label\n", "t.csv has no rows but its header"),
        ("t.json", "[]", "t.json has no rows."),
        ("t.csv", "text,label\nfine,1\na,b,c\n", "t.csv:3: found 3 fields where the header has 2"),
        ("t.csv", "text,label\nfine,1\nshort\n", "t.csv:3: found 1 fields"),
        ("t.csv", "text;label\nso, so;1\n", "separates its columns, set DELIMITER = ';'"),
        ("t.csv", 'text,label\na,1\n"open,1\nb,1\n', "t.csv:3: a quote opens here and is never"),
        ("t.csv", 'text,label\n"a"b,1\n', "t.csv:2: malformed quoting"),
        ("t.csv", "text,text,label\na,b,1\n", "t.csv:1: the header names 'text' twice"),
        ("t.csv", "text,label\nfine,1\ncaf\u00e9,1\n".encode("latin-1"), "t.csv:3: not UTF-8"),
        ("t.csv", "text,label\na,1\n".encode("utf-16"), "is UTF-16"),
        ("t.jsonl", '{"text": "a", "label": 1}\n{"text": }\n', "t.jsonl:2: not valid JSON"),
        ("t.jsonl", '{"text": "a", "label": 1}\n["a", 1]\n', "t.jsonl:2: expected an object"),
        ("t.jsonl", '{"text": "a", "text": "b"}\n', "t.jsonl:1: 'text' is there twice"),
        ("t.jsonl", '{"text": "\\ud800", "label": 1}\n', "t.jsonl:1: not valid JSON"),
        ("t.json", '{"a": 1,\n"b": 2}\n', "or a list of them"),
        ("t.xlsx", b"PK", "expected a file that ends in .csv"),
    ],
)
def test_malformed_files(tmp_path, name, content, message):
    assert message in refusal(read_rows, write(tmp_path, name, content), TASK)


def test_a_missing_file_names_the_nearest(tmp_path):
    write(tmp_path, "reviews.csv", "text\n")
    assert "Did you mean" in refusal(read_rows, str(tmp_path / "review.csv"), TASK)
    assert "has reviews.csv" in refusal(read_rows, str(tmp_path / "other.jsonl"), TASK)


def row(**fields):
    return [Row("f.csv:2", fields)]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (row(Text="a", label="1"), {}, "f.csv:2: there is no field 'text', which INPUT_TEMPLATE"),
        (row(Text="a", label="1"), {}, "Did you mean 'Text'?"),
        (row(**{"text;label": "a;1"}), {}, "set DELIMITER = ';'"),
        ([Row("f.csv:2", {"so": "a"}, True)], {}, "(The first line of a table names its columns.)"),
        (row(text="a", lable="1"), {}, "which TARGET_FIELD names; there are 'text', 'lable'"),
        (row(text=None, label="1"), {}, "the field 'text' holds 'null'"),
        (row(text=None, label="1"), {}, 'Nothing at all is "".'),
        (row(text=["a"], label="1"), {}, "INPUT_TEMPLATE needs text. What is inside cannot be"),
        (row(text={"a": "b"}, label="1"), {"input_template": "{text.a}"}, "What is inside 'text'"),
        (row(text=float("nan"), label="1"), {}, "the field 'text' holds 'NaN'"),
        (row(text="a", label=""), {}, "f.csv:2: the field 'label' (TARGET_FIELD) is empty"),
        (row(text="a", label=None), {}, "is empty"),
        (row(text="a", label="goo"), {}, "'goo' (1 rows). It names 'bad', 'good', '0', '1'. Did"),
        (row(text="a", label=2), {}, "does not name: '2'"),
        (row(text="a", label=[1]), {}, "TARGET_FIELD needs text"),
        (row(text="a", label="1"), {"input_template": "{text"}, "INPUT_TEMPLATE = '{text': "),
        (row(text="a", label="1"), {"input_template": "text"}, "names no field"),
        (row(text="a", label="1"), {"input_template": "{} {text}"}, "{} names no field"),
        (row(text="a", label="1"), {"input_template": "{text!r}"}, "asks for a format"),
        (row(text="a", label="1"), {"input_template": "{text} {label}"}, "which is the answer"),
    ],
)
def test_mistakes_in_rows_and_settings(rows, options, message):
    config = FileTask(**{"label_words": ("bad", "good"), **options})
    assert message in refusal(make_examples, rows, config, labelled=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_share": 1.0}, "EVAL_SHARE = 1.0: out of range"),
        ({"label_words": ("one",)}, "at least two words"),
        ({"label_words": {0: "same", 1: "same"}}, "at least two words"),
        ({"label_words": ("same", "same", "other")}, "names a word twice"),
        ({"label_words": {1: "a", "1": "b"}}, "names a label twice"),
        ({"label_words": ("a", "")}, "none of them empty"),
        ({"delimiter": ", "}, "DELIMITER must be one character"),
        ({"target_field": ""}, "TARGET_FIELD is empty"),
    ],
)
def test_impossible_settings(options, message):
    assert message in refusal(FileTask, **options)


def test_a_share_that_leaves_nothing(tmp_path):
    path = write(tmp_path, "t.csv", "text,label\na,1\nb,0\n")
    config = FileTask(train_file=path, label_words=("bad", "good"), eval_share=0.1)
    assert "leaves nothing to score" in refusal(load_split, config, TRAIN)


# Metrics


def test_metrics_of_classes_and_of_free_text():
    from sklearn.metrics import f1_score

    targets, predictions = [0, 1, 2, 2], [0, 2, 2, -1]
    expected = 100 * f1_score(targets, predictions, labels=[0, 1, 2], average="macro")
    assert macro_f1(targets, predictions) == {"macro_f1": pytest.approx(expected)}
    found = score_texts(["a b c", "", "\ufb01n"], ["a c d", "", "fin"])
    assert found == {"exact_match": pytest.approx(200 / 3), "f1": pytest.approx(800 / 9)}


def test_macro_f1_leaves_out_classes_that_no_row_has():
    assert macro_f1([0, 1, 0], [0, 1, 0]) == {"macro_f1": 100.0}  # classes 2, 3, ... of 77
    expected = pytest.approx(100 * (2 / 3 + 0) / 2)  # a class that is only predicted is wrong
    assert macro_f1([0, 0], [0, 2]) == {"macro_f1": expected}


def test_numbers_have_correlations():
    targets = ["0", "1.5", "3", "5"]
    assert score_texts(targets, ["0", "2", "3", "5"]) == {
        "exact_match": 75.0,
        "pearson_corrcoef": pytest.approx(99.3304, abs=1e-3),
        "spearman_corrcoef": pytest.approx(100.0),
    }
    for constant in (["2"] * 4, ["two"] * 4):
        found = score_texts(targets, constant)
        assert found["pearson_corrcoef"] == found["spearman_corrcoef"] == 0.0
    # An answer that is no number counts as the mean of the targets, 2.375.
    filled = score_texts(targets, ["0", "?", "3", "5"])
    assert filled["spearman_corrcoef"] == pytest.approx(100.0)
    assert filled["pearson_corrcoef"] == pytest.approx(97.8907, abs=1e-3)
    assert set(score_texts([*targets, "five"], [*targets, "5"])) == {"exact_match", "f1"}
