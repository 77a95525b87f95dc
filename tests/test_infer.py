"""Rows of files and tasks get the answers of the predictor, and these land where they should."""

import dataclasses
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_models import ONE_LAYER as CONFIG
from tiny_models import as_prompt, random_prompt

from prompt_tuning.checkpoints import identity, manifest, t5x
from prompt_tuning.config import ConfigError, DataConfig, Decoding, EvalConfig, FileTask, InferRun
from prompt_tuning.model.t5 import init_params
from prompt_tuning.prompts import prompt_file
from prompt_tuning.serving.infer import run_infer
from prompt_tuning.serving.predictor import Predictor
from prompt_tuning.vocabularies.vocabulary import ByteVocabulary
from prompt_tuning.world.assets import TINY_CONFIG

TEXTS = ["a first text", "", "zwei: äöü", "d"]
LABELS = ("yes", "no")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, a prompt folder that knows its label words, and a bare .npy."""
    folder = tmp_path_factory.mktemp("model")
    backbone = jax.jit(init_params, static_argnums=0)(CONFIG, jax.random.key(0))
    t5x.write_t5x(folder / "checkpoint_5", backbone, 5)
    metadata = prompt_file.PromptMetadata(
        label_words=LABELS,
        backbone=identity.backbone_identity(backbone),
        vocabulary=ByteVocabulary().sha256,
    )
    prompt_file.save_prompt(folder / "known", as_prompt(random_prompt(5, CONFIG)), metadata)
    np.save(folder / "bare.npy", np.asarray(random_prompt(3, CONFIG, seed=2)))
    stranger = dataclasses.replace(metadata, backbone="0" * 64)
    prompt_file.save_prompt(folder / "stranger", as_prompt(random_prompt(5, CONFIG)), stranger)
    return folder


@pytest.fixture(scope="module")
def predictor(folder):
    prompts = {"known": folder / "known", "bare": folder / "bare.npy"}
    limits = {"max_input_length": 32, "max_target_length": 6, "batch_size": 8}
    checkpoint = str(folder / "checkpoint_5")
    return Predictor.from_checkpoint(checkpoint, CONFIG, "bytes", prompts, **limits)


def make_run(folder, *, names=(), evaluation=None, **fields) -> InferRun:
    return InferRun(
        **{
            "checkpoint_path": str(folder / "checkpoint_5"),
            "infer_output_dir": "",
            "prompt_file": str(folder / "known"),
            "model": CONFIG,
            "data": DataConfig(
                mixture_or_task_name=names,
                mixture_or_task_module="user_tasks" if names else None,
                task_feature_lengths={"inputs": 32, "targets": 6},
                vocabulary="bytes",
                batch_size=8,
            ),
            "eval": EvalConfig(**(evaluation or {})),
            **fields,
        }
    )


def read(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write_rows(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# Files


def test_a_file_of_texts(folder, predictor, tmp_path, capsys):
    source, output = tmp_path / "texts.txt", str(tmp_path / "answers.jsonl")
    source.write_text("\n".join(TEXTS), encoding="utf-8")
    returned = run_infer(make_run(folder), input=str(source), output=output)
    answers = read(output)
    assert answers == returned
    assert [answer["inputs"] for answer in answers] == TEXTS
    assert [answer["prediction"] for answer in answers] == predictor.generate(TEXTS, "known")
    assert {answer["prompt"] for answer in answers} == {str(folder / "known")}
    scores = [g.score for g in predictor.generate_rows(predictor.tokenize(TEXTS)[0], "known")]
    np.testing.assert_allclose([answer["score"] for answer in answers], scores, rtol=1e-5)
    assert capsys.readouterr().out == f"4 answers: {output}\n"


def test_every_json_line_names_its_prompt(folder, predictor, tmp_path):
    known, bare = str(folder / "known"), str(folder / "bare.npy")
    rows = [
        {"inputs": TEXTS[0], "id": 1},
        {"inputs": TEXTS[1], "prompt": bare, "id": 2},
        {"inputs": TEXTS[2], "prompt": None, "id": 3},
        {"inputs": TEXTS[3], "prompt": bare, "id": 4},
    ]
    output = tmp_path / "answers.jsonl"
    run_infer(make_run(folder), input=write_rows(tmp_path / "r.jsonl", rows), output=str(output))
    answers = read(output)
    assert [a["id"] for a in answers] == [1, 2, 3, 4]
    assert [a["prompt"] for a in answers] == [known, bare, None, bare]
    names = ["known", "bare", None, "bare"]
    assert [a["prediction"] for a in answers] == predictor.generate(TEXTS, names)


def test_standard_input_and_output(folder, predictor, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(TEXTS).encode())))
    run = make_run(folder, evaluation={"num_decodes": 2, "batch_size": 4}, prompt_file="")
    run_infer(run, input="-", output="-")
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = predictor.generate(TEXTS, None, num_decodes=2)
    assert [a["prediction"] for a in answers] == expected
    assert [a["prompt"] for a in answers] == [None] * 4


def test_inputs_that_the_vocabulary_cannot_write(tmp_path, capsys):
    lengths = {"inputs": 32, "targets": 6}
    data = DataConfig(mixture_or_task_name=(), task_feature_lengths=lengths, vocabulary="tiny")
    run = InferRun(
        checkpoint_path="tiny",
        infer_output_dir="",
        model=TINY_CONFIG,
        data=data,
        eval=EvalConfig(method="rank"),  # without words: it stops before anything is answered
    )
    rows = [{"inputs": text} for text in ("\u6c64", "\u997a", "soup")]
    for count, message in ((2, "2 different texts, become the same"), (3, "needs label words")):
        file = write_rows(tmp_path / "rows.jsonl", rows[:count])
        with pytest.raises(ConfigError, match=message):
            run_infer(run, input=file, output=str(tmp_path / "answers"))
    note = (
        "rows: inputs: 2 of 3 have characters that the vocabulary does not know: '\u6c64' in 1 rows"
    )
    assert note in capsys.readouterr().err
    files = FileTask(input_template="{p} {q}")
    data = dataclasses.replace(data, files=files, task_feature_lengths={"inputs": 8, "targets": 6})
    file = write_rows(tmp_path / "rows.jsonl", [{"p": "soup " * 9, "q": "soup"}])
    with pytest.raises(ConfigError, match="needs label words"):
        run_infer(dataclasses.replace(run, data=data), input=file, output=str(tmp_path / "answers"))
    lost = "1 of 1 inputs are longer than 8 tokens (TASK_FEATURE_LENGTHS) and were cut: 1 lose all"
    assert lost in capsys.readouterr().err


def test_answers_without_a_prompt_say_so(folder, tmp_path, capsys):
    output = str(tmp_path / "answers.jsonl")
    rows = write_rows(tmp_path / "rows.jsonl", [{"inputs": TEXTS[0]}])
    run_infer(make_run(folder, prompt_file=""), input=rows, output=output)
    assert capsys.readouterr().out == f"1 answers, without a prompt: {output}\n"


def test_rows_that_no_memory_holds(folder, tmp_path):
    run = make_run(folder, evaluation={"batch_size": 2**40})
    rows = write_rows(tmp_path / "rows.jsonl", [{"inputs": "a"}])
    with pytest.raises(ConfigError, match="EVAL_BATCH_SIZE = 1099511627776"):
        run_infer(run, input=rows, output=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_is_held_against_its_manifest_where_that_is_asked_for(folder, tmp_path):
    place = tmp_path / "checkpoint_5"
    shutil.copytree(folder / "checkpoint_5", place)
    run = make_run(folder, checkpoint_path=str(place), verify_checkpoint=True)
    rows, output = write_rows(tmp_path / "rows.jsonl", [{"inputs": "a"}]), str(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"`t5x verify .*checkpoint_5 --write`"):
        run_infer(run, input=rows, output=output)
    manifest.record(place)
    assert len(run_infer(run, input=rows, output=output)) == 1
    chunk = place / "target.decoder.logits_dense.kernel" / "0.0"
    bits = bytearray(chunk.read_bytes())
    bits[4] ^= 1  # the time in gzip's head: the numbers are the same
    chunk.write_bytes(bits)
    with pytest.raises(ConfigError, match=r"kernel/0\.0"):
        run_infer(run, input=rows, output=output)
    run_infer(dataclasses.replace(run, verify_checkpoint=False), input=rows, output=output)


def test_a_file_into_the_output_folder(folder, tmp_path):
    run = make_run(folder, infer_output_dir=str(tmp_path / "out"))
    rows = write_rows(tmp_path / "rows.jsonl", [{"inputs": "a"}])
    run_infer(run, input=rows, config_text="A = 1\n")
    files = {p.name: p.read_text(encoding="utf-8") for p in (tmp_path / "out").iterdir()}
    assert sorted(files) == ["config.gin", "rows-predict.jsonl-00000-of-00001"]
    assert files["config.gin"] == "A = 1\n"


def test_long_inputs_are_cut_and_said_so(folder, tmp_path, capsys):
    rows = [{"inputs": "x" * n} for n in (31, 32, 40)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    answers = run_infer(make_run(folder), input=source, output=str(tmp_path / "out"))
    assert len({answer["prediction"] for answer in answers}) == 1
    assert "2 of 3 inputs" in capsys.readouterr().err


# Ranking


@pytest.mark.parametrize("method", ["rank", "both"])
def test_ranking(folder, predictor, tmp_path, method):
    """By CLASS_LABELS where they are given, else by the words of each row's prompt."""
    source = write_rows(tmp_path / "r.jsonl", [{"inputs": text} for text in TEXTS])
    for labels in ((), ("no", "maybe", "never")):
        run = make_run(folder, evaluation={"method": method}, class_labels=labels)
        answers = run_infer(run, input=source, output=str(tmp_path / "answers"))
        labels = labels or LABELS
        scores = predictor.score(TEXTS, labels, "known")
        for answer, row in zip(answers, scores, strict=True):
            assert list(answer["label_scores"]) == list(labels)
            np.testing.assert_allclose(list(answer["label_scores"].values()), row, rtol=1e-5)
        ranked, generated = (
            predictor.rank(TEXTS, labels, "known"),
            predictor.generate(TEXTS, "known"),
        )
        expected = ranked if method == "rank" else generated
        assert [answer["prediction"] for answer in answers] == expected
        if method == "rank":
            np.testing.assert_allclose([a["score"] for a in answers], scores.max(1), rtol=1e-5)


def test_ranking_by_the_mean_over_a_words_tokens(folder, predictor, tmp_path):
    """As evaluation does it: longer words are not at a disadvantage."""
    source = write_rows(tmp_path / "r.jsonl", [{"inputs": text} for text in TEXTS])
    labels = ("no", "yes no maybe no yes")
    run = make_run(folder, evaluation={"method": "rank", "rank_score": "mean"}, class_labels=labels)
    answers = run_infer(run, input=source, output=str(tmp_path / "answers"))
    lengths = [len(predictor.vocabulary.encode(label)) + 1 for label in labels]
    assert len(set(lengths)) == 2
    expected = predictor.score(TEXTS, labels, "known") / lengths
    for answer, row in zip(answers, expected, strict=True):
        np.testing.assert_allclose(list(answer["label_scores"].values()), row, rtol=1e-5)
        assert answer["prediction"] == labels[row.argmax()]


def test_ranking_without_words(folder, tmp_path):
    rows = [{"inputs": "a"}, {"inputs": "b", "prompt": str(folder / "bare.npy")}]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    run = make_run(folder, evaluation={"method": "rank"})
    with pytest.raises(ConfigError, match=r"bare\.npy"):
        run_infer(run, input=source, output=str(tmp_path / "answers"))


# Tasks


def test_a_task_into_the_output_folder(folder, predictor, tmp_path):
    run = make_run(
        folder,
        names="two_as",
        evaluation={"num_examples": 5},
        infer_output_dir=str(tmp_path / "out"),
    )
    run_infer(run, config_text="A = 1\n")
    answers = read(tmp_path / "out" / "two_as-predict.jsonl-00000-of-00001")
    texts = [answer["inputs"]["inputs_pretokenized"] for answer in answers]
    assert len(texts) == 5
    assert {len(text) for text in texts} == {6}
    assert {a["inputs"]["targets_pretokenized"] for a in answers} <= {"yes", "no"}
    assert [answer["prediction"] for answer in answers] == predictor.generate(texts, "known")
    assert (tmp_path / "out" / "config.gin").read_text() == "A = 1\n"


def test_a_mixture_into_one_file(folder, tmp_path):
    run = make_run(folder, names="both_as", evaluation={"num_examples": 2})
    run_infer(run, output=str(tmp_path / "answers"))
    answers = read(tmp_path / "answers")
    assert [a["task"] for a in answers] == ["two_as", "two_as", "two_as_again", "two_as_again"]
    assert answers[0]["prediction"] == answers[2]["prediction"]


# What cannot be done


def test_a_failed_run_leaves_the_last_answers(folder, tmp_path):
    output = tmp_path / "answers.jsonl"
    output.write_text("the last ones")
    good = write_rows(tmp_path / "good.jsonl", [{"inputs": "a"}])
    run = make_run(folder, prompt_file=str(folder / "stranger"))
    with pytest.raises(ConfigError, match="another backbone"):
        run_infer(run, input=good, output=str(output))
    assert output.read_text() == "the last ones"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["answers.jsonl", "good.jsonl"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"inputs": "b", "prompt": "nowhere"}, r"rows.jsonl:2: .*nowhere"),
        ({"input": "b"}, r"rows.jsonl:2: "),
    ],
)
def test_a_bad_line_is_named_before_the_model_is_read(folder, tmp_path, row, message):
    source = write_rows(tmp_path / "rows.jsonl", [{"inputs": "a"}, row])
    run = make_run(folder, checkpoint_path="no checkpoint")
    with pytest.raises(ConfigError, match=message):
        run_infer(run, input=source, output=str(tmp_path / "answers"))


def test_nothing_to_answer_or_nowhere_to_write(folder, tmp_path):
    with pytest.raises(ConfigError, match="--input=FILE"):
        run_infer(make_run(folder), output="-")
    source = write_rows(tmp_path / "rows.jsonl", [{"inputs": "a"}])
    with pytest.raises(ConfigError, match="--output=FILE"):
        run_infer(make_run(folder), input=source)


# The command


def test_the_command_answers_lines_without_tensorflow(folder, predictor, tmp_path):
    sizes = {
        "NUM_ENCODER_LAYERS": 1, "NUM_DECODER_LAYERS": 1, "NUM_HEADS": 4, "HEAD_DIM": 8,
        "EMBED_DIM": 32, "MLP_DIM": 64, "NUM_EMBEDDINGS": 384, "VOCABULARY": "bytes",
        "TASK_FEATURE_LENGTHS": {"inputs": 32, "targets": 6},
        "CHECKPOINT_PATH": str(folder / "checkpoint_5"), "PROMPT_FILE": str(folder / "known"),
    }  # fmt: skip
    gin = tmp_path / "model.gin"
    gin.write_text("".join(f"{name} = {value!r}\n" for name, value in sizes.items()))
    flags = [f"--gin_file={gin}", "--gin_file=runs/infer.gin", "--input=-", "--output=-"]
    code = (
        "import sys; from prompt_tuning import cli; code = cli.main(sys.argv[1:]);"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'tensorflow', 'seqio'}));"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "infer", *flags],
        input="\n".join(TEXTS),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    *answers, modules = done.stdout.splitlines()
    assert modules == "[]"
    said = [json.loads(answer)["prediction"] for answer in answers]
    assert said == predictor.generate(TEXTS, "known")


def test_all_samples_are_handed_on_and_do_not_depend_on_the_batches(folder, predictor, tmp_path):
    sampled = Decoding(method="sample", topk=50, seed=3)
    expected = predictor.generate_all(TEXTS, "known", num_decodes=3, decoding=sampled)
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    options = {"num_decodes": 3, "decoding": sampled, "batch_size": 2}
    run = make_run(folder, evaluation=options, return_all_decodes=True)
    answers = run_infer(run, input=str(tmp_path / "texts.txt"), output=str(tmp_path / "out.jsonl"))
    for answer, decodes in zip(answers, expected, strict=True):
        assert [one["prediction"] for one in answer["decodes"]] == [one.text for one in decodes]
        scores = [one["score"] for one in answer["decodes"]]
        np.testing.assert_allclose(scores, [one.score for one in decodes], rtol=1e-4)
        assert scores == sorted(scores, reverse=True)
        assert (answer["prediction"], answer["score"]) == (decodes[0].text, scores[0])
    best = predictor.generate(TEXTS, "known", num_decodes=3, decoding=sampled)
    assert best == [decodes[0].text for decodes in expected]
    with pytest.raises(ConfigError, match="RETURN_ALL_DECODES"):
        make_run(folder, evaluation={"method": "rank"}, return_all_decodes=True)
