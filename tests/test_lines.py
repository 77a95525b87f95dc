"""Files of texts and of JSON lines are read as they are meant, or the line is named."""

import io
import json
import os
import stat
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prompt_tuning.config import ConfigError, FileTask
from prompt_tuning.serving.lines import Line, replace_file, write_line
from prompt_tuning.serving.lines import read_lines as read_lines_of
from prompt_tuning.tasks.file_examples import fill_inputs
from prompt_tuning.tasks.file_reader import parse_rows, read_source


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def read_lines(path: str, *, prompt: str | None) -> list[Line]:
    return read_lines_of(read_source(path, ["text"], FileTask()), prompt=prompt)


def test_lines_of_text(tmp_path):
    path = write(tmp_path / "rows", "\ufefffirst\r\nzwei \u2028 drei\n\n{last}")
    lines = read_lines(path, prompt="p")
    # Only \n ends a line; an empty line is a row, so that answers stand in their row's line.
    assert [line.text for line in lines] == ["first", "zwei \u2028 drei", "", "{last}"]
    assert {line.prompt for line in lines} == {"p"}
    assert lines[3].where == f"{path}:4"


def test_json_lines(tmp_path):
    rows = [
        '{"inputs": "a", "id": 7}',
        "",
        '{"prompt": "folder", "inputs": "b\u2028"}',
        '{"inputs": "", "prompt": null}',
        '{"inputs": "c", "prompt": ""}',
    ]
    path = write(tmp_path / "rows.jsonl", "\n".join(rows) + "\n")
    lines = read_lines(path, prompt="p")
    assert [(line.text, line.prompt, line.rest) for line in lines] == [
        ("a", "p", {"id": 7}),
        ("b\u2028", "folder", {}),
        ("", None, {}),
        ("c", None, {}),
    ]
    assert lines[1].where == f"{path}:3"


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("rows", '{"inputs": "a"}', ["a"]),
        ("rows", '\n{"inputs": "a"}', ["a"]),
        ("rows.txt", '{"inputs": "a"}', ['{"inputs": "a"}']),
        ("rows.TXT", "{a}\nb", ["{a}", "b"]),
        ("rows", "a\rb\r", ["a", "b"]),
        ("rows", '[{"inputs": "a"},\n{"inputs": "b"}]', ["a", "b"]),
        ("rows", "[a]\nb", ["[a]", "b"]),
    ],
)
def test_what_kind_of_lines_a_file_holds(tmp_path, name, content, texts):
    lines = read_lines(write(tmp_path / name, content), prompt=None)
    assert [line.text for line in lines] == texts


GOOD = '{"inputs": "a"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + '{"inputs": "b"', "rows.jsonl:2: not valid JSON"),
        (
            GOOD + "\nplain",
            "rows.jsonl:3: not valid JSON",
        ),
        (GOOD + "[" * 100_000, "rows.jsonl:2: not valid JSON"),
        (GOOD + r'{"inputs": "\ud800"}', "rows.jsonl:2: not valid JSON .*surrogates"),
        (GOOD + '["a"]', "rows.jsonl:2: expected an object"),
        (GOOD + '{"inputs": "b", "inputs": "c"}', "rows.jsonl:2: 'inputs' is there twice"),
        (GOOD + '{"inputs": "b", "text": "c"}', 'rows.jsonl:2: found "inputs" and "text"'),
        (GOOD + '{"input": "b"}', r"rows.jsonl:2: .*\"inputs\".* \['input'\]"),
        (GOOD + '{"inputs": 3}', 'rows.jsonl:2: .*"inputs".*int'),
        (GOOD + '{"inputs": "b", "prompt": 3}', 'rows.jsonl:2: "prompt" is 3'),
        (GOOD.encode() + b'{"inputs": "\xff"}', "rows.jsonl:2: not UTF-8"),
        ("", "rows.jsonl"),
        ("\n \n", "rows.jsonl"),
    ],
)
def test_a_bad_line_is_named(tmp_path, content, message):
    with pytest.raises(ConfigError, match=message):
        read_lines(write(tmp_path / "rows.jsonl", content), prompt=None)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no file .*/nothing"):
        read_lines(str(tmp_path / "nothing"), prompt=None)
    with pytest.raises(ConfigError, match="Is a directory"):
        read_lines(str(tmp_path), prompt=None)


def test_a_table_whose_names_differ_in_case_is_no_text(tmp_path):
    path = write(tmp_path / "rows", 'Review,id\n"good, soup",1\n')
    source = read_source(path, ["review"], FileTask())
    assert source.form == "csv"
    with pytest.raises(ConfigError, match=r"no field 'review'.*Did you mean 'Review'"):
        fill_inputs(parse_rows(source, FileTask()), FileTask(input_template="{review}"))


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("ä\nb".encode())))
    assert [line.text for line in read_lines("-", prompt=None)] == ["ä", "b"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"inputs": "a"}\n{')))
    with pytest.raises(ConfigError, match="standard input:2"):
        read_lines("-", prompt=None)


@settings(deadline=None, max_examples=50)
@given(
    records=st.lists(st.fixed_dictionaries({"inputs": st.text(), "id": st.integers()}), min_size=1)
)
def test_what_is_written_is_read_again(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("lines") / "rows.jsonl"
    with replace_file(path) as file:
        for record in records:
            write_line(file, record)
    lines = read_lines(str(path), prompt=None)
    assert [{"inputs": line.text, **line.rest} for line in lines] == records


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "answers.jsonl"
    with replace_file(path) as file:
        write_line(file, {"inputs": "ä"})
        assert not path.exists()
    assert path.read_text(encoding="utf-8") == '{"inputs": "ä"}\n'
    with pytest.raises(TypeError, match="JSON serializable"), replace_file(path) as file:
        file.write("half"), write_line(file, {"inputs": object()})
    assert [p.name for p in path.parent.iterdir()] == ["answers.jsonl"]
    assert json.loads(path.read_text(encoding="utf-8")) == {"inputs": "ä"}


def test_links_and_devices_stay_what_they_are(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    with replace_file(link) as file:
        file.write("new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    with replace_file("/dev/null") as file:
        file.write("nothing")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize("path", ["", "gs://bucket/answers.jsonl", "/dev/null/answers.jsonl"])
def test_a_place_that_cannot_be_written_to(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError), replace_file(path):
        raise AssertionError("the work must not begin")
    assert list(tmp_path.iterdir()) == []


def test_standard_output(capsys):
    with replace_file("-") as file:
        write_line(file, {"inputs": "ä"})
    assert capsys.readouterr().out == '{"inputs": "ä"}\n'
