"""Whole runs on a random backbone: what they leave, and that they continue bit for bit."""

import dataclasses
import json
import shutil
import threading

import jax
import numpy as np
import pytest
import seqio
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import ONE_LAYER as CONFIG
from tiny_models import random_params, write_backbone

from prompt_tuning import load_prompt
from prompt_tuning.batches import batching
from prompt_tuning.checkpoints import t5x
from prompt_tuning.checkpoints.conversion import convert
from prompt_tuning.config import (
    ConfigError,
    DataConfig,
    EvalConfig,
    EvalRun,
    Experiment,
    ModelConfig,
    OptimizerConfig,
    PromptConfig,
    TrainConfig,
)
from prompt_tuning.decoding import decode
from prompt_tuning.evaluation import matrix, ranking
from prompt_tuning.evaluation.evaluate import mean_score
from prompt_tuning.evaluation.records import read_records
from prompt_tuning.model import t5
from prompt_tuning.model.prompt import Prompt
from prompt_tuning.session import checks, session
from prompt_tuning.tasks.eval_task import make_eval_task
from prompt_tuning.tasks.task_rows import EvalRows
from prompt_tuning.training import loop, model_dir
from prompt_tuning.training import step as steps
from prompt_tuning.training.tasks import Tasks

MODEL = t5.T5(CONFIG)
START = 7  # the step of the backbone


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_backbone(tmp_path_factory.mktemp("backbone"), CONFIG, START)


@pytest.fixture(scope="module")
def experiment(checkpoint):
    def make(model_dir, steps=12, **changes):
        settings = {
            "model": ModelConfig(**{**CONFIG.__dict__, "dropout_rate": 0.1}),
            "data": DataConfig(
                mixture_or_task_name="two_as",
                mixture_or_task_module="user_tasks",
                task_feature_lengths={"inputs": 16, "targets": 5},
                vocabulary="bytes",
                batch_size=8,
            ),
            "prompt": PromptConfig(length=4, class_labels=("yes", "no")),
            "train": TrainConfig(train_steps_relative=steps),
            "eval": EvalConfig(period=4, method="both"),
        }
        return Experiment(
            model_dir=str(model_dir), initial_checkpoint_path=checkpoint, **{**settings, **changes}
        )

    return make


@pytest.fixture(scope="module")
def straight(experiment, tmp_path_factory):
    """A run of 12 steps without a break, and its folder."""
    folder = tmp_path_factory.mktemp("straight")
    return loop.train(experiment(folder), Tasks, config_text="# settings\n"), folder


def records(folder, **wanted):
    lines = read_records(folder / "metrics.jsonl")
    return [r for r in lines if all(r.get(k) == v for k, v in wanted.items())]


def test_a_run_leaves_what_t5x_users_look_for(straight):
    result, folder = straight
    assert result.step == START + 12
    assert (folder / "config.gin").read_text() == "# settings\n"
    assert "encoder/layers_0/attention/query/kernel" in (folder / "model-info.txt").read_text()
    assert (folder / "curves.png").stat().st_size > 10_000
    drawn = EventAccumulator(str(folder / "train")).Reload()
    assert {"loss", "timing/steps_per_second", "timing/waiting_for_rows"} <= set(
        drawn.Tags()["scalars"]
    )
    assert len(drawn.Scalars("timing/seconds")) == len(drawn.Scalars("loss")) > 0
    assert not [r for r in records(folder) if "timing" in r["name"]], "a resumed run repeats them"
    assert list((folder / "inference_eval" / "two_as").glob("events*"))
    assert not list(folder.glob("checkpoint_*")), "the backbone is never written again"
    assert sum(p.stat().st_size for p in (folder / "checkpoints").rglob("*")) < 1_000_000
    lines = (folder / "inference_eval" / f"two_as-{START + 12:06d}.jsonl").read_text().splitlines()
    assert len(lines) == 20
    row = json.loads(lines[0])
    assert {"input", "target", "output", "prediction", "score"} <= set(row)
    assert row["input"]["targets_pretokenized"] == row["target"]
    assert set(row["label_scores"]) == {"yes", "no"}
    metrics = (folder / "inference_eval" / "two_as-metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == [START + n for n in (4, 8, 12)]


@pytest.mark.parametrize("noise", [0.0, pytest.param(0.1, marks=pytest.mark.slow)])
def test_the_average_is_scored_and_saved_and_continues_bit_for_bit(experiment, tmp_path, noise):
    """Against the prompts of a run without it, which takes the same steps, where there is noise."""

    def run(folder, steps, average):
        train = TrainConfig(train_steps_relative=steps, prompt_average=average, input_noise=noise)
        scores = EvalConfig(period=1, method="rank", num_examples=8, baselines=False)
        result = loop.train(experiment(tmp_path / folder, train=train, eval=scores), Tasks)
        places = [tmp_path / folder / f"prompts/step_{START + n + 1:06d}" for n in range(steps)]
        return [np.asarray(load_prompt(place)[0]) for place in places], result.prompt

    saved, last = run("average", 3, 0.5)
    if noise:  # test_step.py has the numbers without it
        plain, _ = run("plain", 3, 0.0)
        np.testing.assert_allclose(saved[0], plain[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(saved[1], (plain[0] + 2 * plain[1]) / 3, rtol=1e-5, atol=1e-6)
        expected = (plain[0] + 2 * plain[1] + 4 * plain[2]) / 7
        np.testing.assert_allclose(saved[2], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(last, saved[2])
    run("stopped", 2, 0.5)
    resumed, _ = run("stopped", 3, 0.5)
    assert [x.tobytes() for x in resumed] == [x.tobytes() for x in saved]


def test_records_name_step_task_split_and_baselines(straight):
    _, folder = straight
    for method in ("generate", "rank"):
        name = f"accuracy/{method}"
        scored = records(folder, split="validation", name=name)
        assert [(r["step"], r.get("prompt")) for r in scored] == [
            (START, "majority"),
            (START, "none"),
            (START + 4, None),
            (START + 8, None),
            (START + 12, None),
        ]
    majority = records(folder, prompt="majority", name="accuracy/generate")[0]["value"]
    from user_tasks import rows

    answers = [a.decode() for a in rows("validation").as_numpy_iterator() for a in [a["targets"]]]
    assert majority == pytest.approx(100 * answers.count("no") / len(answers))
    train = records(folder, split="train", name="loss")
    assert train[-1]["step"] == START + 12
    assert records(folder, split="train", name="token_accuracy")


def test_prompts_are_saved_at_every_evaluation_with_what_is_known_of_them(straight, experiment):
    result, folder = straight
    assert sorted(p.name for p in (folder / "prompts").iterdir()) == [
        "best",
        *(f"step_{START + n:06d}" for n in (4, 8, 12)),
    ]
    prompt, metadata = load_prompt(folder / "prompts" / f"step_{START + 12:06d}")
    np.testing.assert_array_equal(prompt, result.prompt)
    assert prompt.shape == (4, 32)
    assert metadata.task == "two_as"
    assert metadata.label_words == ("yes", "no")
    assert metadata.step == START + 12
    assert len(metadata.backbone) >= 32
    assert "class labels" in metadata.init
    best, best_metadata = load_prompt(folder / "prompts" / "best")
    assert best_metadata.step == result.best_step
    again, _ = load_prompt(folder / "prompts" / f"step_{result.best_step:06d}")
    np.testing.assert_array_equal(best, again)


@pytest.mark.parametrize("first", [pytest.param(4, marks=pytest.mark.slow), 6])
def test_a_run_that_was_stopped_ends_with_the_same_bits(straight, experiment, tmp_path, first):
    result, folder = straight
    loop.train(experiment(tmp_path, steps=first), Tasks)
    resumed = loop.train(experiment(tmp_path), Tasks)
    np.testing.assert_array_equal(resumed.prompt, result.prompt)

    def losses(path):
        return {r["step"]: r["value"] for r in records(path, split="train", name="loss")}

    shared = losses(folder).keys() & losses(tmp_path).keys()
    assert START + 12 in shared
    assert {s: losses(folder)[s] for s in shared} == {s: losses(tmp_path)[s] for s in shared}


def test_rows_of_the_next_step_are_made_while_one_is_computed(experiment, tmp_path, monkeypatch):
    """By another thread: a step waits here until they are."""
    made, waited = [threading.Event() for _ in range(4)], []
    train_groups, run_step = batching.train_groups, steps.train_step

    def train_groups_and_say(*args, step, **settings):
        groups = train_groups(*args, step=step, **settings)
        made[step].set()
        return groups

    def wait_and_run_step(*args):
        waited.append(made[min(len(waited) + 1, 3)].wait(60))
        return run_step(*args)

    monkeypatch.setattr(batching, "train_groups", train_groups_and_say)
    monkeypatch.setattr(steps, "train_step", wait_and_run_step)
    loop.train(experiment(tmp_path, steps=4, eval=EvalConfig(period=4, baselines=False)), Tasks)
    assert waited == [True] * 4


@pytest.mark.slow  # test_conversion.py has the weights' bits
def test_a_huggingface_folder_gives_the_same_bits(straight, experiment, checkpoint, tmp_path):
    convert(checkpoint, str(tmp_path / "hf"))
    other = dataclasses.replace(
        experiment(tmp_path / "run"), initial_checkpoint_path=str(tmp_path / "hf")
    )
    np.testing.assert_array_equal(loop.train(other, Tasks).prompt, straight[0].prompt)
    assert not list(session.describe_start(other, START))  # it kept the step


def test_a_huggingface_folder_without_a_step_says_where_the_optimizer_begins(
    experiment, checkpoint, tmp_path
):
    convert(checkpoint, str(tmp_path / "hf"), step=0)
    plain = experiment(tmp_path)
    folder = dataclasses.replace(plain, initial_checkpoint_path=str(tmp_path / "hf"))
    assert "--gin.OPTIMIZER_START_STEP=1100000" in next(session.describe_start(folder, 0))
    chosen = dataclasses.replace(folder, optimizer=OptimizerConfig(start_step=1_100_000))
    assert "Adafactor starts at 1100000" in next(session.describe_start(chosen, 0))
    assert not list(session.describe_start(plain, 0))


@pytest.mark.slow
def test_records_written_after_the_last_saved_state_are_not_doubled(experiment, tmp_path):
    loop.train(experiment(tmp_path, steps=4), Tasks)
    before = records(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:  # a kill in the middle of an evaluation
        line = {"step": START + 8, "task": "two_as", "split": "validation", "name": "x", "value": 1}
        file.write(json.dumps(line) + '\n{"step": 15, "ta')
    loop.train(experiment(tmp_path, steps=8), Tasks)
    assert not records(tmp_path, name="x")
    assert records(tmp_path)[: len(before)] == before
    assert len(records(tmp_path, step=START + 8, name="accuracy/rank")) == 1


def test_a_finished_run_prints_its_result_again(straight, experiment, capsys):
    result, folder = straight
    before = (folder / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    again = loop.train(experiment(folder), Tasks)
    assert again.summary == result.summary
    said = capsys.readouterr().out
    assert "majority class" in said
    assert f"nothing is left to train: the run is at its last step, {START + 12}" in said
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_damaged_records_cost_themselves(straight, experiment, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(straight[1], folder)
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"\0" * 40 + b"\n" + b"".join(lines[1:]) + b'{"step": 15, "ta')
    (folder / f"inference_eval/two_as-{START + 12:06d}.jsonl").write_text('{"outpu')
    shutil.rmtree(folder / "train")
    (folder / "config.gin").write_text("# set")
    again = loop.train(experiment(folder), Tasks, config_text="# settings\n")
    assert again.best_step == straight[0].best_step
    assert path.read_bytes() == b"".join(lines[1:])
    assert (folder / "config.gin").read_text() == "# settings\n"


@pytest.mark.slow
def test_config_gin_is_that_of_the_last_start(experiment, tmp_path):
    loop.train(experiment(tmp_path, steps=2), Tasks, config_text="# first\n")
    loop.train(experiment(tmp_path, steps=4), Tasks, config_text="# more steps\n")
    assert (tmp_path / "config.gin").read_text() == "# more steps\n"


@pytest.mark.slow
def test_a_backbone_that_was_replaced_is_refused(experiment, tmp_path):
    path = tmp_path / f"checkpoint_{START}"
    t5x.write_t5x(path, random_params(CONFIG), START)
    run = dataclasses.replace(
        experiment(tmp_path / "run", steps=2), initial_checkpoint_path=str(path)
    )
    loop.train(run, Tasks)
    t5x.write_t5x(path, random_params(CONFIG, seed=5), START)
    longer = dataclasses.replace(run, train=TrainConfig(train_steps_relative=4))
    with pytest.raises(ConfigError, match=r"backbone.*MODEL_DIR"):
        loop.train(longer, Tasks)


@pytest.mark.slow
def test_baselines_of_a_run_killed_before_its_first_state_stand_once(experiment, tmp_path):
    loop.train(experiment(tmp_path, steps=2), Tasks)
    shutil.rmtree(tmp_path / "checkpoints")
    loop.train(experiment(tmp_path, steps=2), Tasks)
    for prompt in ("majority", "none"):
        assert len(records(tmp_path, prompt=prompt, name="accuracy/rank")) == 1
    assert len(records(tmp_path, split="train", name="loss", step=START + 2)) == 1


@pytest.mark.slow
def test_training_records_do_not_depend_on_when_a_run_was_stopped(experiment, tmp_path):
    """The mean of a record never reaches over a saved state."""
    for folder, first in (("straight", 30), ("stopped", 15)):
        train = TrainConfig(train_steps_relative=30, checkpoint_period=15)
        run = experiment(tmp_path / folder, train=train, eval=EvalConfig(period=30, method="rank"))
        short = TrainConfig(train_steps_relative=first, checkpoint_period=15)
        if first < 30:
            loop.train(dataclasses.replace(run, train=short), Tasks)
        loop.train(run, Tasks)
    straight, stopped = (
        records(tmp_path / folder, split="train", name="loss") for folder in ("straight", "stopped")
    )
    assert straight == stopped
    assert [r["step"] - START for r in straight] == [*range(3, 16, 3), *range(18, 31, 3)]


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, "last good prompt, of step 7, is in"),
        pytest.param(  # in two groups, on a mesh whose parts they divide by
            {"microbatches": 2, "parts": 2}, "last good prompt, of step 7", marks=pytest.mark.slow
        ),
        pytest.param({"trainable": "model"}, "last good state, of step 7", marks=pytest.mark.slow),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run_before_anything_is_saved(
    experiment, tmp_path, changes, kept
):
    changes = {"parts": 1, **changes}
    parts, length = changes.pop("parts"), 0 if "trainable" in changes else 4
    params = random_params(CONFIG)
    params["decoder/logits_dense/kernel"] = (
        params["decoder/logits_dense/kernel"].at[0, 5].set(np.inf)
    )
    t5x.write_t5x(tmp_path / f"checkpoint_{START}", params, START)
    run = dataclasses.replace(
        experiment(
            tmp_path / "run",
            eval=EvalConfig(period=1, method="rank", baselines=False),
            train=TrainConfig(train_steps_relative=3, **changes),
            prompt=PromptConfig(length=length, class_labels=("yes", "no")),
        ),
        initial_checkpoint_path=str(tmp_path / f"checkpoint_{START}"),
        num_model_partitions=parts,
    )
    with pytest.raises(FloatingPointError, match=r"step 8 .*two_as train .*WARMUP") as caught:
        loop.train(run, Tasks)
    assert kept in str(caught.value)
    found = [p.name for p in (tmp_path / "run" / "prompts").glob("*")]
    assert found == (["last_good"] if length else [])
    assert [p.name for p in (tmp_path / "run" / "checkpoints").glob("[0-9]*")] == [str(START)]


def test_a_ranking_that_is_not_finite_is_no_divergence(experiment, tmp_path):
    """Of the backbone, before any step: no step is named, no row of a batch, no learning rate."""
    params = random_params(CONFIG) | {
        "decoder/decoder_norm/scale": np.full(CONFIG.embed_dim, np.nan)
    }
    t5x.write_t5x(tmp_path / f"checkpoint_{START}", params, START)
    run = dataclasses.replace(
        experiment(tmp_path / "run", eval=EvalConfig(period=4, method="rank")),
        initial_checkpoint_path=str(tmp_path / f"checkpoint_{START}"),
    )
    with pytest.raises(ranking.NotRankableError, match="not finite") as caught:
        loop.train(run, Tasks)
    assert "in step" not in str(caught.value)
    assert "LEARNING_RATE" not in str(caught.value)


@pytest.mark.slow
def test_beams_and_number_of_rows_are_those_of_the_settings(experiment, tmp_path):
    config = EvalConfig(period=4, num_decodes=3, num_examples=5)
    result = loop.train(experiment(tmp_path, steps=4, eval=config), Tasks)
    file = tmp_path / "inference_eval" / f"two_as-{START + 4:06d}.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 5
    tokens = np.zeros((5, 8), np.int32)
    for row, record in zip(tokens, rows, strict=True):
        ids = [byte + 3 for byte in record["input"]["inputs_pretokenized"].encode()] + [1]
        row[: len(ids)] = ids
    prompt, tokens = jax.numpy.asarray(result.prompt), jax.numpy.asarray(tokens)
    _, scores = decode.generate(
        MODEL, random_params(CONFIG), Prompt(prompt), tokens, length=5, num_decodes=3
    )
    np.testing.assert_allclose([record["score"] for record in rows], scores, rtol=1e-4)


def test_the_score_of_a_prompt_is_the_mean_of_its_tasks_means():
    scored = [
        {"f1/generate": 20.0, "accuracy/generate": 40.0, "f1/rank": 99.0},
        {"accuracy/generate": 90.0, "accuracy/rank": 1.0},
    ]
    assert mean_score(scored, EvalConfig(method="both")) == 60.0
    assert mean_score(scored, EvalConfig(method="rank")) == 50.0
    scored[1]["accuracy/generate"] = float("nan")
    assert mean_score(scored, EvalConfig()) == -np.inf


def test_rows_without_labels_cannot_be_scored():
    texts = ["a", "b"]
    rows = batching.Rows("t", [], [], texts, ["<unk>", "<unk>"], [{}, {}], 0, 0)
    task = seqio.get_mixture_or_task("two_as")
    with pytest.raises(ConfigError, match="no labels"):
        make_eval_task(EvalRows(task, rows, ("yes", "no")), EvalConfig())


def test_ranking_without_label_words_is_refused_before_anything_is_scored(experiment, tmp_path):
    with pytest.raises(ConfigError, match="two_as"):
        loop.train(experiment(tmp_path, prompt=PromptConfig(length=4)), Tasks)


def test_another_experiment_is_refused(straight, experiment):
    _, folder = straight
    other = experiment(folder, prompt=PromptConfig(length=5, class_labels=("yes", "no")))
    with pytest.raises(ConfigError, match=r"prompt\.length.*4.*5"):
        loop.train(other, Tasks)
    # What may differ: how long, how often.
    loop.train(experiment(folder, eval=EvalConfig(period=6, method="both")), Tasks)


def test_a_run_of_which_only_damaged_states_are_left_does_not_begin_anew(experiment, tmp_path):
    (tmp_path / "checkpoints" / "damaged_12").mkdir(parents=True)
    with pytest.raises(ConfigError, match="damaged_12"):
        model_dir.refuse_other_experiment(None, experiment(tmp_path), tmp_path)
    (tmp_path / "checkpoints" / "9").mkdir()
    model_dir.refuse_other_experiment(None, experiment(tmp_path), tmp_path)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_prompt_and_another_one_another(
    straight, experiment, tmp_path
):
    result, _ = straight
    again = loop.train(experiment(tmp_path / "same"), Tasks)
    np.testing.assert_array_equal(again.prompt, result.prompt)
    train = TrainConfig(train_steps_relative=4, random_seed=1)
    other = loop.train(experiment(tmp_path / "other", train=train), Tasks)
    first, _ = load_prompt(tmp_path / "same" / "prompts" / f"step_{START + 4:06d}")
    assert np.abs(other.prompt - first).max() > 0.1


@pytest.mark.slow
def test_early_stopping_ends_the_run_and_says_how_to_go_on(experiment, tmp_path, capsys):
    stop = EvalConfig(period=2, method="rank", early_stopping_evals=1)
    result = loop.train(experiment(tmp_path, steps=40, eval=stop), Tasks)
    assert result.step < START + 40
    said = f"stopped early: 1 evaluations without a better score than at step {result.best_step}"
    assert said in capsys.readouterr().out
    assert loop.train(experiment(tmp_path, steps=60, eval=stop), Tasks).step == result.step
    assert said in capsys.readouterr().out
    go_on = dataclasses.replace(stop, early_stopping_evals=None)
    assert loop.train(experiment(tmp_path, steps=40, eval=go_on), Tasks).step == START + 40


@pytest.mark.slow
def test_model_tuning_changes_the_model_and_writes_t5x_checkpoints(experiment, tmp_path):
    tuned = experiment(
        tmp_path,
        steps=4,
        prompt=PromptConfig(length=0, class_labels=("yes", "no")),
        train=TrainConfig(train_steps_relative=4, trainable="model"),
    )
    tuned = dataclasses.replace(tuned, eval=EvalConfig(period=1, method="rank"))
    result = loop.train(tuned, Tasks)
    kept = {f"checkpoint_{result.best_step}", f"checkpoint_{START + 4}"}
    assert {path.name for path in tmp_path.glob("checkpoint_*")} == kept  # the best and the last
    params, step = t5x.read_t5x(str(tmp_path / f"checkpoint_{START + 4}"), random_params(CONFIG))
    assert step == START + 4
    before = random_params(CONFIG)
    assert all((np.asarray(params[k]) != np.asarray(before[k])).any() for k in before)
    assert not (tmp_path / "prompts").exists()


@pytest.mark.slow
def test_a_mixture_is_trained_on_and_its_tasks_are_scored_apart(experiment, tmp_path):
    data = DataConfig(
        mixture_or_task_name="both_as",
        mixture_or_task_module="user_tasks",
        task_feature_lengths={"inputs": 16, "targets": 5},
        vocabulary="bytes",
        batch_size=8,
    )
    loop.train(experiment(tmp_path, steps=4, data=data), Tasks)
    tasks = {r["task"] for r in records(tmp_path, split="validation")}
    assert tasks == {"two_as", "two_as_again"}


def test_prompts_and_tasks_are_scored_as_a_matrix(straight, experiment, tmp_path):
    _, folder = straight
    source = experiment(tmp_path)
    data = dataclasses.replace(source.data, mixture_or_task_name=("two_as", "two_as_again"))
    files = tuple(str(folder / "prompts" / f"step_{START + n:06d}") for n in (4, 12))
    run = EvalRun(
        checkpoint_path=source.initial_checkpoint_path,
        eval_output_dir=str(tmp_path),
        prompt_file=files,
        class_labels=("yes", "no"),
        model=source.model,
        data=data,
        eval=source.eval,
    )
    scored = matrix.run_eval(run).metrics
    assert list(scored) == [matrix.NO_PROMPT, *files]
    found = json.loads((tmp_path / "matrix.json").read_text())["prompts"][files[1]]["two_as"]
    assert found["metrics"] == scored[files[1]]["two_as"]
    assert found["analysis"]["agreement"]["same"] <= found["analysis"]["rows"] == 20
    assert (tmp_path / "matrix.png").stat().st_size > 5_000
    assert all(list(row) == ["two_as", "two_as_again"] for row in scored.values())
    for name in ("accuracy/generate", "accuracy/rank"):
        expected = records(folder, step=START + 12, name=name)[0]["value"]
        assert scored[files[1]]["two_as"][name] == expected
        bare = records(folder, prompt="none", name=name)[0]["value"]
        assert scored[matrix.NO_PROMPT]["two_as"][name] == bare
    # Every prompt has its own file of rows.
    names = {p.name for p in (tmp_path / "inference_eval").glob("two_as-*[0-9].jsonl")}
    assert names == {f"two_as-step_{START + n:06d}-{START + n:06d}.jsonl" for n in (4, 12)}


def test_an_evaluation_refuses_a_run_s_folder_and_a_metric_that_is_not_there(straight, experiment):
    _, folder = straight
    source = experiment(folder)
    before = (folder / "metrics.jsonl").read_bytes()
    run = EvalRun(
        checkpoint_path=source.initial_checkpoint_path,
        eval_output_dir=str(folder),
        model=source.model,
        data=source.data,
    )
    with pytest.raises(ConfigError, match="MODEL_DIR"):
        matrix.run_eval(run)
    assert (folder / "metrics.jsonl").read_bytes() == before
    elsewhere = {"eval_output_dir": str(folder / "scores"), "eval": EvalConfig(metric="f1")}
    with pytest.raises(ConfigError, match=r"TASK_METRIC = 'f1'.*accuracy"):
        matrix.run_eval(dataclasses.replace(run, **elsewhere))


@pytest.mark.slow  # test_meshes.py runs others
def test_a_run_on_a_mesh_continues_on_one_device(straight, experiment, tmp_path):
    """Eight devices, then eight otherwise divided: the numbers agree to rounding.

    More meshes, and a state's bits, are in test_meshes.py.
    """
    result, folder = straight
    first = dataclasses.replace(experiment(tmp_path, steps=4), num_model_partitions=4)
    loop.train(first, Tasks)
    resumed = loop.train(dataclasses.replace(experiment(tmp_path), num_model_partitions=2), Tasks)
    assert len(jax.devices()) == 8
    largest = np.abs(result.prompt).max()
    np.testing.assert_allclose(resumed.prompt, result.prompt, rtol=0, atol=1e-5 * largest)
    for one, other in zip(
        records(tmp_path, name="loss"), records(folder, name="loss"), strict=True
    ):
        assert one["step"] == other["step"]
        assert one["value"] == pytest.approx(other["value"], rel=1e-5)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (TrainConfig(train_steps=5), "TRAIN_STEPS_RELATIVE = 5"),
        (TrainConfig(train_steps=7), "already at step 7"),
        (TrainConfig(), "TRAIN_STEPS_RELATIVE = None"),
    ],
)
def test_step_counts_that_mean_nothing_are_errors(train, message):
    with pytest.raises(ConfigError, match=message):
        checks.last_step(train, START)


def test_absolute_and_relative_steps():
    assert checks.last_step(TrainConfig(train_steps=9), START) == 9
    assert checks.last_step(TrainConfig(train_steps_relative=9), START) == 16


def test_a_folder_that_cannot_be_made(experiment, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"MODEL_DIR .*file"):
        loop.train(experiment(tmp_path / "file"), Tasks)


def test_a_bucket_is_no_folder_to_write_to(experiment):
    with pytest.raises(ConfigError, match=r"MODEL_DIR .*gs://bucket/x"):
        loop.train(experiment("gs://bucket/x"), Tasks)


def test_a_vocabulary_that_is_too_large(experiment, tmp_path):
    small = ModelConfig(**{**CONFIG.__dict__, "num_embeddings": 128})
    with pytest.raises(ConfigError, match="128"):
        loop.train(experiment(tmp_path, model=small), Tasks)
