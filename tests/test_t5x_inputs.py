"""What upstream T5X is started with; none of it needs T5X."""

import dataclasses
import re
from types import SimpleNamespace

import numpy as np
import pytest
import seqio
from tiny_models import CONFIG, as_prompt, load_data, random_params, random_prompt

from prompt_tuning.batches import batching
from prompt_tuning.checkpoints import load
from prompt_tuning.checkpoints.identity import backbone_identity
from prompt_tuning.checkpoints.t5x import write_t5x
from prompt_tuning.config import (
    ConfigError,
    DataConfig,
    EvalRun,
    Experiment,
    PromptConfig,
    TrainConfig,
    config_hash,
)
from prompt_tuning.model.prompt import Prompt
from prompt_tuning.prompts.prompt_file import PromptMetadata, save_prompt
from prompt_tuning.session import setup
from prompt_tuning.session.session import open_session
from prompt_tuning.tasks import task_rows
from prompt_tuning.upstream import inputs

STEP = 70
DATA = DataConfig(
    mixture_or_task_name="tiny_mood",
    task_feature_lengths={"inputs": 24, "targets": 8},
    vocabulary="bytes",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("backbone") / f"checkpoint_{STEP}"
    write_t5x(path, random_params(), STEP)
    return str(path)


@pytest.fixture
def experiment(checkpoint):
    return Experiment(
        model_dir="run",
        initial_checkpoint_path=checkpoint,
        model=CONFIG,
        data=DATA,
        prompt=PromptConfig(length=6),
        train=TrainConfig(train_steps_relative=20, random_seed=3),
    )


def eval_run(checkpoint, **changes):
    return EvalRun(
        checkpoint_path=checkpoint, eval_output_dir="out", model=CONFIG, data=DATA, **changes
    )


def test_paths_become_absolute_and_addresses_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert inputs.absolute_path("runs/x") == str(tmp_path / "runs/x")
    assert inputs.absolute_path("gs://bucket/x") == "gs://bucket/x"


def test_first_given():
    assert inputs.first_given(None, 3) == 3
    assert inputs.first_given(0, 3) == 0


def test_a_checkpoint_of_the_model_is_found(experiment, checkpoint):
    assert inputs.find_checkpoint(experiment) == checkpoint


def test_a_prompt_in_the_checkpoint_does_not_count(tmp_path):
    path = tmp_path / "checkpoint_1"
    write_t5x(path, {**random_params(), inputs.PROMPT: random_prompt(3)}, 1)
    assert inputs.find_checkpoint(eval_run(str(path))) == str(path)
    np.testing.assert_array_equal(
        inputs.starting_prompt(eval_run(str(path))).params["prompt"], np.zeros((3, 32))
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_encoder_layers": 1}, r"encoder/layers_1/.*\(32, 32\)"),
        ({"num_decoder_layers": 3}, r"decoder/layers_2/.*\(32, 32\)"),
        ({"mlp_dim": 65}, r"wi_0/kernel.*\(32, 64\).*\(32, 65\)"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(experiment, change, message):
    """T5X itself would fill in random values, and drop what it does not know."""
    other = dataclasses.replace(CONFIG, **change)
    with pytest.raises(ConfigError, match=message):
        inputs.find_checkpoint(dataclasses.replace(experiment, model=other))


def test_no_checkpoint_path():
    with pytest.raises(ConfigError, match="CHECKPOINT_PATH"):
        inputs.find_checkpoint(eval_run(""))


def test_steps_count_from_the_backbones(experiment):
    assert inputs.start_step(experiment) == STEP
    assert inputs.last_step(experiment) == STEP + 20
    absolute = dataclasses.replace(experiment, train=TrainConfig(train_steps=STEP))
    with pytest.raises(ConfigError, match="TRAIN_STEPS = 70"):
        inputs.last_step(absolute)


@pytest.mark.parametrize("done", [pytest.param(0, marks=pytest.mark.slow), 7])
def test_t5x_trains_on_the_rows_of_the_embedded_engine(experiment, tmp_path, done):
    """From the step that it resumes at; each of two hosts gets its half of a batch."""
    experiment = dataclasses.replace(experiment, model_dir=str(tmp_path))
    (tmp_path / f"checkpoint_{STEP + done}").mkdir()
    lengths = dict(DATA.task_feature_lengths)
    config = SimpleNamespace(
        mixture_or_task_name=inputs.register_task(DATA),
        split="train",
        batch_size=4,
        task_feature_lengths=lengths,
        shuffle=True,
        pack=False,
        use_cached=False,
    )
    hosts = [
        inputs.training_batches(config, host, 2, None, experiment=experiment).as_numpy_iterator()
        for host in range(2)
    ]
    rows, rates = task_rows.load_training_rows("tiny_mood", "train", lengths)
    for step in (done, done + 1):
        expected = batching.train_batch(
            rows, rates, seed=3, step=step, batch_size=4, lengths=lengths
        )
        halves = [next(host) for host in hosts]
        for name, values in expected.items():
            width = values.shape[1]
            both = np.concatenate([half[name] for half in halves])
            np.testing.assert_array_equal(both[:, :width], values)
            assert not both[:, width:].any()
            assert both.shape[1] == lengths["inputs" if "encoder" in name else "targets"]


def test_tasks_are_registered_with_the_vocabulary_of_the_run():
    assert inputs.register_task(DATA) == "tiny_mood"
    with pytest.raises(ConfigError, match="Did you mean tiny_mood"):
        inputs.register_task(dataclasses.replace(DATA, mixture_or_task_name="tiny_mod"))
    several = dataclasses.replace(DATA, mixture_or_task_name=("tiny_mood", "tiny_topic"))
    with pytest.raises(ConfigError):
        inputs.register_task(several)


@pytest.mark.parametrize(
    "prompt",
    [
        PromptConfig(length=6),  # class labels
        PromptConfig(length=6, init="random_uniform"),
        PromptConfig(length=6, init="sampled_vocab", population=300),
        PromptConfig(length=6, text="say yes"),
        PromptConfig(length=6, init="sampled_vocab", population=300, method="residual"),
        PromptConfig(length=6, method="p_tuning", settings={"hidden": 5}),
    ],
    ids=["labels", "uniform", "vocabulary", "text", "residual", "p_tuning"],
)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_the_first_prompt_is_the_embedded_engines(experiment, prompt, dtype):
    model = dataclasses.replace(CONFIG, dtype=dtype)
    experiment = dataclasses.replace(experiment, prompt=prompt, model=model)
    with open_session(experiment) as session:
        backbone = session.load_backbone()
    expected, _ = setup.first_params(experiment, backbone, load_data(experiment, train=False))
    start = inputs.starting_prompt(experiment)
    assert start.length == 6
    assert start.params.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(start.params[name], value)


def test_model_tuning_has_no_prompt(experiment):
    train = TrainConfig(train_steps_relative=20, trainable="model")
    start = inputs.starting_prompt(dataclasses.replace(experiment, train=train))
    assert (start.length, start.params["prompt"].shape) == (0, (0, 32))


FOLDS = {
    "reads_the_backbone": lambda settings, params, frozen, key: Prompt(
        params["prompt"] + frozen.params["token_embedder/embedding"][0]
    ),
    "has_memory": lambda settings, params, frozen, key: Prompt(
        params["prompt"], memory=params["prompt"]
    ),
}


@pytest.mark.parametrize("name", FOLDS)
def test_a_method_that_t5x_cannot_run_is_refused(experiment, monkeypatch, tmp_path, name):
    (tmp_path / f"{name}.py").write_text(
        "from test_t5x_inputs import FOLDS\n"
        "from prompt_tuning.methods.prompt_tuning import METHOD\n"
        f"METHOD = METHOD._replace(fold=FOLDS[{name!r}])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = PromptConfig(length=6, method=f"{name}.METHOD")
    expected = "returns memory" if name == "has_memory" else "its .*--engine=embedded"
    with pytest.raises(ConfigError, match=rf"{name}.METHOD'.*{expected}"):
        inputs.starting_prompt(dataclasses.replace(experiment, prompt=config))


def test_parameters_of_a_method_in_a_checkpoint_need_the_folded_prompt(tmp_path):
    path, leaf = tmp_path / "checkpoint_1", inputs.PROMPT + "/rows"
    write_t5x(path, {**random_params(), leaf: random_prompt(3)}, 1)
    with pytest.raises(ConfigError, match=r"parameters of a prompt method .*Set PROMPT_FILE"):
        inputs.starting_prompt(eval_run(str(path)))
    save_prompt(tmp_path / "p", as_prompt(random_prompt(3)), PromptMetadata())
    start = inputs.starting_prompt(eval_run(str(path), prompt_file=str(tmp_path / "p")))
    np.testing.assert_array_equal(start.params["prompt"], random_prompt(3))
    # As a backbone it loads without its prompt, in both engines.
    params, _ = load.read_backbone(path, CONFIG)
    assert params.keys() == random_params().keys()


def test_a_prompt_from_a_file_has_to_fit(experiment, checkpoint, tmp_path):
    prompt = random_prompt(6)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    save_prompt(
        ours, as_prompt(prompt), PromptMetadata(backbone=backbone_identity(random_params()))
    )
    save_prompt(
        theirs, as_prompt(prompt), PromptMetadata(backbone=backbone_identity(random_params(seed=9)))
    )
    for path, length in ((ours, 6), (theirs, 6), (ours, 7)):
        config = PromptConfig(length=length, file=str(path))
        run = dataclasses.replace(experiment, prompt=config)
        if (path, length) == (ours, 6):
            np.testing.assert_array_equal(inputs.starting_prompt(run).params["prompt"], prompt)
            continue
        with pytest.raises(ConfigError, match=r"another backbone|PROMPT_LENGTH = 6"):
            inputs.starting_prompt(run)
    # Evaluation takes the length from the file.
    scored = eval_run(checkpoint, prompt_file=str(ours))
    np.testing.assert_array_equal(inputs.starting_prompt(scored).params["prompt"], prompt)
    with pytest.raises(ConfigError, match="another backbone"):
        inputs.starting_prompt(eval_run(checkpoint, prompt_file=str(theirs)))
    with pytest.raises(ConfigError):
        inputs.starting_prompt(eval_run(checkpoint, prompt_file=(str(ours), str(theirs))))


def test_only_a_prompt_file_takes_the_checkpoints_place(checkpoint):
    assert inputs.choose_new(eval_run(checkpoint)) == ()
    ((pattern, replacement),) = inputs.choose_new(eval_run(checkpoint, prompt_file="p"))
    assert replacement is None
    assert re.fullmatch(pattern, f"target/{inputs.PROMPT}")
    assert not re.fullmatch(pattern, "target/encoder/layers_0/mlp/wo/kernel")


def test_an_evaluation_is_recorded_at_the_prompts_step(checkpoint, tmp_path):
    """T5X hands over the backbone's step: two prompts in one folder would share their files."""
    run = eval_run(checkpoint, prompt_file=str(tmp_path / "prompt"))
    save_prompt(tmp_path / "prompt", as_prompt(random_prompt(6)), PromptMetadata(step=STEP + 20))
    inputs.register_task(run.data)
    (tmp_path / "out").mkdir()
    evaluator = inputs.make_evaluator(run)(
        mixture_or_task_name="tiny_mood",
        feature_converter=seqio.EncDecFeatureConverter(pack=False),
        eval_split="validation",
        num_examples=2,
        logger_cls=[seqio.JSONLogger],
        log_dir=str(tmp_path / "out"),
    )
    metrics, _ = evaluator.evaluate(
        compute_metrics=True, step=STEP, predict_fn=lambda rows: [(0, [1]), (1, [1])]
    )
    metrics.result()
    evaluator.close()
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"tiny_mood-metrics.jsonl", f"tiny_mood-{STEP + 20:06d}.jsonl"}
    assert inputs.make_evaluator(eval_run(checkpoint)) is seqio.Evaluator


def test_a_prompt_folder_says_where_it_comes_from(experiment):
    metadata = inputs.describe_prompt(
        experiment, backbone="abc", init=inputs.starting_prompt(experiment).init, step=STEP + 1
    )
    assert (metadata.task, metadata.backbone, metadata.step) == ("tiny_mood", "abc", STEP + 1)
    assert metadata.label_words
    assert metadata.init.startswith("class labels 'up', 'down'")
    assert metadata.config_hash == config_hash(experiment)
    elsewhere = dataclasses.replace(experiment, model_dir="elsewhere", num_model_partitions=2)
    assert metadata.config_hash == config_hash(elsewhere)
    assert metadata.config_hash != config_hash(
        dataclasses.replace(experiment, prompt=PromptConfig())
    )
    assert len(metadata.config_hash) == len(metadata.vocabulary) == 64
