"""The pre-training run, whole: it learns, resumes to the same bits, and leaves T5X checkpoints."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import several_processes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from prompt_tuning.checkpoints import t5x as t5x_checkpoint
from prompt_tuning.checkpoints import t5x_states
from prompt_tuning.config import (
    ConfigError,
    CorpusConfig,
    DataConfig,
    EvalConfig,
    Experiment,
    ModelConfig,
    OptimizerConfig,
    PromptConfig,
    TrainConfig,
    to_dict,
)
from prompt_tuning.evaluation.records import read_records
from prompt_tuning.model import t5
from prompt_tuning.pretraining import corpus, run
from prompt_tuning.runtime import signals
from prompt_tuning.training import optim, step
from prompt_tuning.training.loop import train
from prompt_tuning.training.run import TrainResult
from prompt_tuning.world import generator

MODEL = ModelConfig(
    num_encoder_layers=1,
    num_decoder_layers=1,
    num_heads=2,
    head_dim=8,
    embed_dim=16,
    mlp_dim=32,
    num_embeddings=512,
    dropout_rate=0.1,  # its noise has to be resumed as well
)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("corpus") / "reviews.txt"
    path.write_text("\n".join(review.text for review in generator.reviews(400, seed=5)))
    return str(path)


def experiment(model_dir: Path, text: str, steps: int = 6, **changes) -> Experiment:
    base = Experiment(
        model_dir=str(model_dir),
        initial_checkpoint_path=None,
        model=MODEL,
        data=DataConfig(
            mixture_or_task_name=(),
            task_feature_lengths={"inputs": 32},
            vocabulary="tiny",
            batch_size=8,
        ),
        corpus=CorpusConfig(objective="span_corruption", files=text, documents="line"),
        prompt=PromptConfig(length=0),
        optimizer=OptimizerConfig(
            learning_rate=1.0,
            schedule="rsqrt",
            warmup_steps=100,
            weight_decay=0.0,
            multiply_by_parameter_scale=True,
        ),
        train=TrainConfig(trainable="model", train_steps=steps, checkpoint_period=3),
        eval=EvalConfig(period=3, num_examples=16),
    )
    return dataclasses.replace(base, **changes)


pretrain = functools.partial(train, objective=run.Pretraining)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, text) -> TrainResult:
    return pretrain(experiment(tmp_path_factory.mktemp("straight"), text))


def arrays(folder: Path) -> dict[str, np.ndarray]:
    shapes = t5.param_shapes(MODEL)
    params, _ = t5x_checkpoint.read_t5x(folder, shapes)
    like = t5x_states.get_slots(
        optim.make_optimizer(experiment(folder, "").optimizer, optim.MODEL_RULES).init(params)
    )
    found = t5x_checkpoint.read_slots(folder, like)
    return {name: np.asarray(value) for name, value in {**params, **found}.items()}


def records(model_dir: Path) -> list[dict]:
    return read_records(model_dir / "metrics.jsonl")


def test_a_run_from_random_weights_learns(straight: TrainResult):
    points = [r["value"] for r in records(straight.model_dir) if r["name"].startswith("cross_")]
    unseen = [r for r in records(straight.model_dir) if r["name"] == "cross_entropy/held_out"]
    assert [r["step"] for r in unseen] == [0, 3, 6]
    assert unseen[-1]["value"] < unseen[0]["value"] - 0.5
    assert straight.held_out_loss == unseen[-1]["value"]
    assert np.isfinite(points).all()
    assert (straight.model_dir / "curves.png").stat().st_size > 1000


def test_tensorboard_shows_how_long_steps_took(straight):
    drawn = EventAccumulator(str(straight.model_dir / "train")).Reload()
    assert len(drawn.Scalars("timing/seconds")) == len(drawn.Scalars("loss")) > 0
    assert all(0.0 <= s.value <= 1.0 for s in drawn.Scalars("timing/waiting_for_rows"))
    names = {r["name"] for r in records(straight.model_dir)}
    assert "loss" in names
    assert not [name for name in names if "timing" in name], "a resumed run repeats its records"


@pytest.mark.slow  # test_loop.py has the same loop with a prompt
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, text, straight):
    pretrain(experiment(tmp_path, text, steps=3))
    done = pretrain(experiment(tmp_path, text, steps=6))
    assert done.step == 6
    expected = arrays(straight.checkpoint)
    for name, value in arrays(done.checkpoint).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    again = {(r["step"], r["name"]): r["value"] for r in records(tmp_path)}
    assert again == {(r["step"], r["name"]): r["value"] for r in records(straight.model_dir)}


@pytest.mark.slow
def test_a_loss_that_is_not_finite_names_step_and_documents(tmp_path, text, straight):
    params, _ = t5x_checkpoint.read_t5x(straight.checkpoint, t5.param_shapes(MODEL))
    name = "decoder/logits_dense/kernel"
    params[name] = params[name].at[0, 5].set(np.inf)
    t5x_checkpoint.write_t5x(tmp_path / "checkpoint_6", params, 6)
    diverges = experiment(
        tmp_path / "run",
        text,
        initial_checkpoint_path=str(tmp_path / "checkpoint_6"),
        train=TrainConfig(trainable="model", train_steps_relative=3, microbatches=1),
        eval=EvalConfig(period=1, num_examples=16),
    )
    said = r"step 7 \(.*loss nan.*--debug-nans.*from 0: \d+"
    with pytest.raises(FloatingPointError, match=said) as caught:
        pretrain(diverges)
    assert "Nothing is saved yet." in str(caught.value)
    rows = str(caught.value).split("from 0: ")[1].split(". ")[0].split("; ")
    found = corpus.load_corpus(diverges, tmp_path).train
    assert rows == [", ".join(map(str, row)) for row in found.sources(0, 8)]
    epoch = found.epoch(0)
    for place in range(4):  # the text of the documents that are named is that of the chunk
        starts, tokens = epoch.documents.starts, epoch.documents.tokens
        named = np.concatenate([tokens[starts[d] : starts[d + 1]] for d in epoch.sources(place)])
        assert set(epoch._tokens(int(epoch._order[place]))) <= set(named)


@pytest.mark.slow
def test_a_damaged_checkpoint_costs_one_period(tmp_path, text, straight, capsys):
    shutil.copytree(straight.model_dir, tmp_path / "run")
    (tmp_path / "run" / "checkpoint_6" / "target.token_embedder.embedding" / "0.0").unlink()
    done = pretrain(experiment(tmp_path / "run", text))
    said = capsys.readouterr().out
    assert "cannot be read" in said
    assert "continuing at step 3" in said
    expected = arrays(straight.checkpoint)
    for name, value in arrays(done.checkpoint).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


@pytest.mark.slow
def test_a_signal_saves_the_step_that_it_came_in(tmp_path, text, straight):
    """And what follows is what would have followed."""

    def send_soon():
        while not any(r["name"] == "loss" and r["step"] > 3 for r in records(tmp_path)):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    changes = {"eval": EvalConfig(period=1000, num_examples=16)}
    changes["train"] = TrainConfig(trainable="model", train_steps=3, checkpoint_period=1)
    pretrain(experiment(tmp_path, text, **changes))  # compiled, and something to wait for
    many = dataclasses.replace(changes["train"], train_steps=100_000, checkpoint_period=50_000)
    changes["eval"] = EvalConfig(period=20, num_examples=16)
    with signals.handled("t5x"):
        threading.Thread(target=send_soon).start()
        with pytest.raises(signals.Stopped):
            pretrain(experiment(tmp_path, text, **(changes | {"train": many})))
    step = int(t5x_states.find_checkpoints(tmp_path)[-1].name.removeprefix("checkpoint_"))
    assert step > 3
    more = dataclasses.replace(many, train_steps=step + 1)
    assert pretrain(experiment(tmp_path, text, **(changes | {"train": more}))).step == step + 1


@pytest.mark.slow
def test_only_so_many_checkpoints_are_kept(tmp_path, text):
    keep_one = TrainConfig(
        trainable="model", train_steps=2, checkpoint_period=1, keep_checkpoints=1
    )
    pretrain(experiment(tmp_path, text, train=keep_one))
    assert [p.name for p in t5x_states.find_checkpoints(tmp_path)] == ["checkpoint_2"]


@pytest.mark.slow
def test_lm_adaptation_goes_on_from_the_checkpoint(tmp_path, text, straight):
    """Step, weights and moments; the first update is that of a run that never stopped."""
    adapted = experiment(
        tmp_path,
        text,
        initial_checkpoint_path=str(straight.checkpoint),
        corpus=CorpusConfig(
            objective="prefix_lm", files=text, documents="line", merge_documents=False, pack=True
        ),
        train=TrainConfig(trainable="model", train_steps_relative=2, restore_optimizer=True),
    )
    done = pretrain(adapted)
    assert done.step == 8
    assert json.loads((done.checkpoint / t5x_states.RUN_FILE).read_text())["start"] == 6
    assert not np.array_equal(
        arrays(done.checkpoint)["encoder/encoder_norm/scale/v"],
        arrays(straight.checkpoint)["encoder/encoder_norm/scale/v"],
    )


@pytest.mark.slow
def test_restored_moments_update_like_a_run_that_never_stopped():
    """The optimiser alone: three steps, or two and, through T5X's names, one more."""
    config = experiment(Path(), "").optimizer
    shapes = {"encoder/wide/kernel": (128, 130), "decoder/square/kernel": (128, 128)}
    shapes |= {"decoder/small/kernel": (4, 6), "decoder/norm/scale": (8,)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}

    def update(optimizer, state, count):
        gradients = {name: x * 0.1 + count for name, x in state.trainable.items()}
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable)
        moved = {name: x + updates[name] for name, x in state.trainable.items()}
        return state._replace(step=state.step + 1, trainable=moved, opt_state=opt_state)

    optimizer = optim.make_optimizer(config, optim.MODEL_RULES)
    state = step.init_state(params, optimizer, 0)
    for count in range(2):
        state = update(optimizer, state, count)
    whole = update(optimizer, state, 2)

    kept = t5x_states.get_slots(state.opt_state)
    assert kept["encoder/wide/kernel/v_row"].shape == (128,)
    assert kept["encoder/wide/kernel/v_col"].shape == (130,)
    assert kept["decoder/small/kernel/v"].shape == (4, 6)
    optimizer = optim.make_optimizer(config, optim.MODEL_RULES, start_step=2)
    fresh = step.init_state(state.trainable, optimizer, 2)
    opt_state = t5x_states.set_slots(fresh.opt_state, kept, count=0)
    resumed = update(optimizer, fresh._replace(opt_state=opt_state), 2)
    for name, value in whole.trainable.items():
        np.testing.assert_array_equal(value, resumed.trainable[name], err_msg=name)


def test_the_learning_rate_is_t5s():
    config = OptimizerConfig(learning_rate=1.0, schedule="rsqrt", warmup_steps=10_000)
    rate = optim.learning_rate(config, 0)
    assert callable(rate)
    np.testing.assert_allclose([rate(0), rate(9_999), rate(40_000)], [0.01, 0.01, 0.005], rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"prompt": PromptConfig(length=3)}, "PROMPT_LENGTH = 0"),
        ({"optimizer": OptimizerConfig(name="adamw")}, "OPTIMIZER = 'adafactor'"),
        (
            {"train": TrainConfig(trainable="model", train_steps=1, restore_optimizer=True)},
            "RESTORE_OPTIMIZER = False",
        ),
        (
            {"train": TrainConfig(trainable="model", train_steps=1, microbatches=3)},
            "MICROBATCHES = 3 does not cut",
        ),
        (
            {"train": TrainConfig(trainable="model", train_steps=1, prompt_average=0.5)},
            r"PROMPT_AVERAGE = 0\.5.*TRAINABLE = 'model'",
        ),
        (
            {"train": TrainConfig(trainable="model", train_steps=1, input_noise=0.5)},
            r"INPUT_NOISE = 0\.5.*OBJECTIVE = 'span_corruption'",
        ),
        ({"model": dataclasses.replace(MODEL, num_embeddings=500)}, "512 .*500"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, text, changes, expected):
    with pytest.raises(ConfigError, match=expected):
        pretrain(experiment(tmp_path, text, **changes))


def test_another_corpus_in_the_same_folder_is_refused(tmp_path, text, straight):
    shutil.copytree(straight.model_dir, tmp_path / "run")
    other = tmp_path / "reviews.txt"
    other.write_text(Path(text).read_text() + "\nlovely soup.")
    with pytest.raises(ConfigError):
        pretrain(experiment(tmp_path / "run", str(other)))
    before = Path(text).read_text()
    try:
        Path(text).write_text(before + "\nlovely soup.")
        with pytest.raises(ConfigError, match="corpus"):
            pretrain(experiment(tmp_path / "run", text))
    finally:
        Path(text).write_text(before)


def test_a_run_of_a_version_with_fewer_settings_goes_on(tmp_path, text, straight):
    shutil.copytree(straight.model_dir, tmp_path / "run")
    for path in (tmp_path / "run").glob(f"checkpoint_*/{t5x_states.RUN_FILE}"):
        meta = json.loads(path.read_text())
        assert meta["experiment"]["data"].pop("sentinel_targets") is False
        assert meta["experiment"]["corpus"].pop("noise_density") == 0.15
        path.write_text(json.dumps(meta))
    pretrain(experiment(tmp_path / "run", text))
    corpus = CorpusConfig(
        objective="span_corruption", files=text, documents="line", noise_density=0.2
    )
    with pytest.raises(ConfigError, match=r"noise_density.*0\.15.*0\.2"):
        pretrain(experiment(tmp_path / "run", text, corpus=corpus))


@pytest.mark.slow
def test_a_checkpoint_without_moments_is_named(tmp_path, text):
    params = t5.init_params(MODEL, jax.random.key(0))
    t5x_checkpoint.write_t5x(tmp_path / "checkpoint_5", params, 5)
    adapted = experiment(
        tmp_path / "run",
        text,
        initial_checkpoint_path=str(tmp_path / "checkpoint_5"),
        train=TrainConfig(trainable="model", train_steps_relative=1, restore_optimizer=True),
    )
    with pytest.raises(ConfigError, match="RESTORE_OPTIMIZER = False"):
        pretrain(adapted)


@pytest.mark.slow
def test_eight_devices_give_the_same_run(tmp_path, text, straight):
    done = pretrain(experiment(tmp_path, text, steps=3, num_model_partitions=4))
    expected = arrays(straight.model_dir / "checkpoint_3")
    for name, value in arrays(done.checkpoint).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.weekly
@pytest.mark.parametrize("hosts", [(4, 4), (2, 6)], ids=["equal", "unequal"])
def test_two_processes_are_one_and_go_on_alone(tmp_path, text, hosts):
    """A model whose matrices lie across processes is trained, saved, restored, and goes on."""
    corpus = {"TEXT_FILES": text, "DOCUMENTS": "line", "VOCABULARY": "tiny"}
    sizes = {name.upper(): value for name, value in to_dict(MODEL).items()}
    macros = {
        **sizes,
        **corpus,
        "NUM_HEADS": 8,  # a head for each device
        "TASK_FEATURE_LENGTHS": {"inputs": 32},
        "BATCH_SIZE": 8,
        "NUM_MODEL_PARTITIONS": 8,
        "EVAL_PERIOD": 2,
        "CHECKPOINT_PERIOD": 2,
        "EVALUATOR_NUM_EXAMPLES": 16,
    }
    lines = "".join(f"{name} = {value!r}\n" for name, value in macros.items())
    (tmp_path / "small.gin").write_text(lines)

    def train(model_dir, steps, devices):
        arguments = [
            "--gin_file=runs/pretrain.gin",
            "--gin_file=small.gin",
            f"--gin.MODEL_DIR={model_dir!r}",
            f"--gin.TRAIN_STEPS={steps}",
        ]
        folders = [tmp_path] * len(devices)
        said = several_processes.finish(several_processes.start(folders, arguments, devices))
        return tmp_path / model_dir / f"checkpoint_{steps}", said

    def read(folder):
        shapes = t5.param_shapes(dataclasses.replace(MODEL, num_heads=8))
        return t5x_checkpoint.read_t5x(folder, shapes)[0]

    (two, _), (one, _) = (train(name, 4, d) for name, d in (("two", hosts), ("one", (8,))))
    train("resumed", 2, hosts)
    resumed, said = train("resumed", 4, hosts)
    assert "continuing at step 2" in said[0]
    assert "cross entropy" in said[0]
    assert "cross entropy" not in said[1]
    expected = read(one)
    for name, value in read(two).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-3, atol=1e-4, err_msg=name)
    for name, value in read(resumed).items():
        np.testing.assert_array_equal(value, read(two)[name], err_msg=name)
    lines = [len(records(tmp_path / name)) for name in ("one", "two", "resumed")]
    assert lines[0] == lines[1] == lines[2] > 0


@pytest.mark.t5x
def test_upstream_t5x_reads_the_checkpoint_and_goes_on(straight):
    """Its Adafactor takes the moments as they are, and makes the next update that ours makes."""
    pytest.importorskip("t5x.checkpoints", reason="upstream T5X is not installed")
    from flax.traverse_util import flatten_dict
    from t5x import adafactor, checkpoints

    saved = checkpoints.load_t5x_checkpoint(str(straight.checkpoint), lazy_parameters=False)
    assert saved["state"]["step"] == 6
    params = jax.tree.map(jax.numpy.asarray, saved["target"])
    theirs = adafactor.Adafactor(learning_rate=0.01, decay_rate=0.8, step_offset=0).create(params)
    wanted = flatten_dict(theirs.state_dict()["state"]["param_states"], sep="/")
    moments = flatten_dict(saved["state"]["param_states"], sep="/")
    assert {n: np.shape(v) for n, v in wanted.items()} == {n: v.shape for n, v in moments.items()}
    gradients = jax.tree.map(lambda x: 0.01 * x + 0.001, params)
    moved = theirs.restore_state(saved).apply_gradient(gradients, learning_rate=0.01)

    config = OptimizerConfig(learning_rate=0.01, weight_decay=0.0, multiply_by_parameter_scale=True)
    ours = optim.make_optimizer(config, optim.MODEL_RULES, start_step=6)
    flat = flatten_dict(params, sep="/")
    arrays_of = {name: jax.numpy.asarray(value) for name, value in moments.items()}
    state = t5x_states.set_slots(ours.init(flat), arrays_of, count=0)
    updates, _ = ours.update(flatten_dict(gradients, sep="/"), state, flat)
    for name, value in flatten_dict(moved.target, sep="/").items():
        np.testing.assert_allclose(flat[name] + updates[name], value, atol=1e-6, err_msg=name)
