"""Prompts with a member for each task of a mixture, from the rows of a batch to saved prompts."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import seqio
from tiny_models import ONE_LAYER as CONFIG
from tiny_models import as_model, forward, load_data, random_batch, random_params, write_backbone

from prompt_tuning import load_prompt
from prompt_tuning.batches import batching, groups
from prompt_tuning.checkpoints.identity import backbone_identity
from prompt_tuning.config import (
    ConfigError,
    DataConfig,
    EvalConfig,
    EvalRun,
    Experiment,
    PromptConfig,
    TrainConfig,
)
from prompt_tuning.evaluation import matrix, prompts
from prompt_tuning.evaluation.records import read_records
from prompt_tuning.model import sharding
from prompt_tuning.model.prompt import Prompt
from prompt_tuning.planning import program
from prompt_tuning.prompts.prompt_file import list_prompts
from prompt_tuning.session import setup
from prompt_tuning.session.session import Backbone
from prompt_tuning.tasks import registry
from prompt_tuning.training import loop
from prompt_tuning.training.tasks import Tasks
from prompt_tuning.upstream import inputs

MODEL = as_model(CONFIG)
START = 7  # the step of the backbone
LABELS = ("yes", "no")
MEMBERS = ("short_and_long_as", "two_as")
FOUR = set(batching.Batch.__annotations__)


# The member of each row ---------------------------------------------------------------------------


def make_rows(task, token, lengths):
    """Rows that consist of one token."""
    inputs = [np.full(length, token, np.int32) for length in lengths]
    targets = [np.asarray([2, 1], np.int32)] * len(inputs)
    texts = [""] * len(inputs)
    return batching.Rows(task, inputs, targets, texts, texts, [{} for _ in inputs], 0, 0)


def test_every_row_of_a_batch_names_its_member():
    """In every group, the rows that are padding too; a run without members has no more arrays."""
    tokens = {5: 2, 6: 0, 7: 1}  # of a task's rows -> the number of its member
    rows = [make_rows(f"task_{token}", token, range(1, 40)) for token in tokens]
    cutting = groups.Cutting(inputs=64, targets=2, fewest=4, most=4, data_parts=8)
    where = {"seed": 3, "batch_size": 24}
    seen = set()
    for step in range(5):
        cut = batching.train_groups(
            rows, [1.0, 2.0, 1.0], cutting, step=step, members=[*tokens.values()], **where
        )
        assert [len(group["which"]) for group in cut] == [8, 8, 8, 8]  # 6 rows and 2 of padding
        for group in cut:
            first = group["encoder_input_tokens"][:, 0].tolist()
            assert group["which"].dtype == np.int32
            assert group["which"].tolist() == [tokens[token] for token in first]
            seen |= set(first)
        plain = batching.train_groups(rows, [1.0, 2.0, 1.0], cutting, step=step, **where)
        assert all(set(group) == FOUR for group in plain)
        for group, same in zip(plain, cut, strict=True):
            for name in FOUR:
                np.testing.assert_array_equal(group[name], same[name])
    assert seen == set(tokens)


# The tasks that have a member ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_backbone(tmp_path_factory.mktemp("backbone"), CONFIG, START)


@pytest.fixture(scope="module")
def experiment(checkpoint):
    def make(folder, name="all_as", steps=2, **prompt):
        return Experiment(
            model_dir=str(folder),
            initial_checkpoint_path=checkpoint,
            model=CONFIG,
            data=DataConfig(
                mixture_or_task_name=name,
                mixture_or_task_module="user_tasks",
                task_feature_lengths={"inputs": 72, "targets": 5},
                vocabulary="bytes",
                batch_size=8,
            ),
            prompt=PromptConfig(class_labels=LABELS, **{"length": 4, "method": "mpt", **prompt}),
            train=TrainConfig(train_steps_relative=steps, length_groups=2, random_seed=3),
            eval=EvalConfig(period=2, method="rank", num_examples=8, baselines=False),
        )

    return make


def test_members_are_the_tasks_that_are_trained(experiment):
    assert setup.find_members(experiment("x")) == MEMBERS
    assert setup.find_members(experiment("x", "two_as")) == ("two_as",)
    assert setup.find_members(experiment("x", method="residual")) == ()


def test_a_task_without_a_member_is_an_error_before_rows_are_read(experiment, tmp_path):
    def refuse(split, shuffle_files=False, seed=None):
        raise AssertionError("it is read")

    two_as = seqio.TaskRegistry.get("two_as")
    seqio.TaskRegistry.add(
        "never_read",
        source=seqio.FunctionDataSource(refuse, splits=["train", "validation"]),
        preprocessors=[],
        output_features=two_as.output_features,
        metric_fns=two_as.metric_fns,
    )
    seqio.MixtureRegistry.add("one_scored", [("never_read", 1.0), ("two_as", 0.0)])
    with pytest.raises(ConfigError) as error:
        loop.train(experiment(tmp_path, "one_scored"), Tasks)
    text = str(error.value)
    assert text.startswith("MIXTURE_OR_TASK_NAME = 'one_scored': PROMPT_METHOD = 'mpt'")
    assert "(never_read), and none for two_as" in text
    assert "a rate above 0" in text


def test_tasks_that_are_scored_by_anothers_prompt():
    for name, trained in {
        "super_glue_wsc_v102_simple_eval": "super_glue_wsc_v102_simple_train",
        "taskless_super_glue_wsc_v102_simple_eval": "taskless_super_glue_wsc_v102_simple_train",
        "glue_mnli_matched_v002": "glue_mnli_v002",
        "glue_mnli_mismatched_v200_examples": "glue_mnli_v200_examples",
        "glue_mrpc_from_qqp_v002": "glue_qqp_v002",
        "glue_mnli_v002": "glue_mnli_v002",
        "two_as": "two_as",
    }.items():
        assert registry.trained_task(name) == trained
    registry.ensure_registered()
    tuned = prompts.NamedPrompt("p", None, 0, "glue_mnli_v002")
    assert prompts.tuned_tasks(tuned) == {
        f"glue_{name}_v002" for name in ("mnli", "mnli_matched", "mnli_mismatched")
    }


def test_full_members_are_their_prompts_with_noise_too():
    """Each row of a mixed batch against the same row with its member as a plain prompt."""
    members = jax.random.normal(jax.random.key(1), (3, 4, CONFIG.embed_dim))
    batch, which = random_batch(), np.asarray([2, 0, 1, 0])
    shape = (*batch["encoder_input_tokens"].shape, CONFIG.embed_dim)
    for noise in (None, jax.random.normal(jax.random.key(2), shape)):
        params = random_params(CONFIG)
        mixed = np.asarray(forward(MODEL, params, Prompt(members), batch, which=which, noise=noise))
        full = np.full((3, 5), 4, np.int32)
        if noise is None:  # members that could be of other lengths
            other = forward(MODEL, params, Prompt(members, lengths=full), batch, which=which)
            np.testing.assert_allclose(other, mixed, atol=1e-4)
        for row, member in enumerate(which):
            alone = np.asarray(forward(MODEL, params, Prompt(members[member]), batch, noise=noise))
            valid = np.asarray(batch["decoder_target_tokens"][row] > 0)
            np.testing.assert_allclose(mixed[row][valid], alone[row][valid], atol=1e-4)


def test_upstream_t5x_refuses_members_and_loads_one(experiment, trained, checkpoint):
    _, folder = trained
    with pytest.raises(ConfigError, match=r"PROMPT_METHOD = 'mpt'.*--engine=embedded") as error:
        inputs.starting_prompt(experiment("x"))
    assert "\n" not in str(error.value)
    run = eval_run(experiment, checkpoint, folder / "out", folder / "prompts/best/two_as")
    rows = inputs.starting_prompt(run).params["prompt"]
    np.testing.assert_array_equal(rows, load_prompt(folder / "prompts/best/two_as")[0])


def test_the_planned_step_has_the_members(experiment):
    mesh = sharding.make_mesh(2)
    lowered = program.lower_step(experiment("x"), mesh)
    state, _, batch = lowered.args_info[0]
    assert batch["which"].shape == (8,)
    assert {leaf.split("/")[1] for leaf in state.trainable} == {"shared", *MEMBERS}


# A whole run --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(experiment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    return loop.train(experiment(folder, steps=4), Tasks), folder


def eval_run(experiment, checkpoint, output, *files):
    run = experiment("x")
    return EvalRun(
        checkpoint_path=checkpoint,
        eval_output_dir=str(output),
        prompt_file=tuple(map(str, files)),
        pairs="own",
        class_labels=LABELS,
        model=CONFIG,
        data=run.data,
        eval=run.eval,
    )


def test_each_member_is_saved_as_a_prompt_of_its_own(trained):
    result, folder = trained
    assert result.prompt.shape == (2, 4, 32)
    last = folder / "prompts" / f"step_{START + 4:06d}"
    assert [path.name for path in list_prompts(last)] == ["all-tasks", *MEMBERS]
    for number, task in enumerate(MEMBERS):
        rows, metadata = load_prompt(last / task)
        np.testing.assert_array_equal(rows, result.prompt[number])
        assert (metadata.task, metadata.method, metadata.step) == (task, "mpt", START + 4)
        assert metadata.label_words == LABELS
        (score,) = (
            r["value"]
            for r in read_records(folder / "metrics.jsonl")
            if (r["step"], r["task"], r["split"]) == (START + 4, task, "validation")
        )
        assert (metadata.score, metadata.score_name) == (score, f"mean of {task}")
        config = json.loads((last / task / "adapter_config.json").read_text())
        assert config["num_virtual_tokens"] == 4
    shared, metadata = load_prompt(last / "all-tasks")
    assert (metadata.task, metadata.score) == ("all_as", None)
    assert shared.shape == (4, 32)
    assert np.abs(result.prompt - np.asarray(shared)).min(axis=(1, 2)).max() > 0  # both have moved


def test_each_task_is_scored_with_its_own_member(trained, experiment, checkpoint, tmp_path):
    """All rows and their scores are those of `t5x eval` of the saved prompts."""
    _, folder = trained
    best = folder / "prompts" / "best"
    files = prompts.find_prompts(str(best))
    assert [path.rsplit("/", 1)[1] for path in files] == ["all-tasks", *MEMBERS]
    matrix.run_eval(eval_run(experiment, checkpoint, tmp_path, *files[1:]))
    _, metadata = load_prompt(best / "two_as")
    rows = {}
    for task in MEMBERS:
        name = f"{task}-{metadata.step:06d}.jsonl"
        rows[task] = (folder / "inference_eval" / name).read_bytes()
        name = f"{task}-{task}-{metadata.step:06d}.jsonl"
        assert (tmp_path / "inference_eval" / name).read_bytes() == rows[task]
    assert not list((tmp_path / "inference_eval").glob("two_as-short*"))  # pairs of their own


def test_a_damaged_member_is_restored_when_a_run_is_resumed(trained, experiment, tmp_path):
    _, folder = trained
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    best = copy / "prompts" / "best"
    whole = {path: path.read_bytes() for path in best.glob("*/*")}
    assert len(whole) == 9
    (best / "two_as" / "adapter_model.safetensors").write_bytes(b"")
    shutil.rmtree(best / "all-tasks")
    loop.train(experiment(copy, steps=4), Tasks)
    assert {path: path.read_bytes() for path in best.glob("*/*")} == whole


@pytest.fixture
def begin_with(trained, experiment, tmp_path):
    """The first parameters of a run on a new task that begins with the shared rows of another."""
    shared = trained[1] / "prompts" / "best" / "all-tasks"
    backbone = Backbone(random_params(CONFIG), START, backbone_identity(random_params(CONFIG)))

    def begin(**prompt):
        run = experiment(tmp_path, "two_as_again", init="file", file=str(shared), **prompt)
        return setup.first_params(run, backbone, load_data(run))[0], load_prompt(shared)[0]

    return begin


@pytest.mark.parametrize(
    ("method", "settings", "length", "leaf"),
    [
        ("prompt_tuning", {}, 4, "prompt"),
        ("mpt", {}, 4, "prompt/shared"),
        ("multitask", {"form": "concat", "task_length": 3}, 7, "prompt/shared"),
    ],
)
def test_a_run_on_a_new_task_begins_with_the_shared_rows(
    begin_with, method, settings, length, leaf
):
    params, rows = begin_with(method=method, settings=settings, length=length)
    np.testing.assert_array_equal(params[leaf], rows)


def test_shared_rows_of_another_length_are_an_error(begin_with):
    with pytest.raises(ConfigError, match=r"it has 4 rows\. Expected 5 for PROMPT_METHOD = 'mpt'"):
        begin_with(length=5)


@pytest.mark.slow
def test_a_mesh_shards_the_members_of_rows_as_the_rows(experiment, tmp_path, trained):
    """Eight devices: groups are padded to them. The run is that of one device, but for rounding."""
    straight, _ = trained
    assert len(jax.devices()) == 8
    run = dataclasses.replace(experiment(tmp_path / "run", steps=4), num_model_partitions=2)
    np.testing.assert_allclose(loop.train(run, Tasks).prompt, straight.prompt, rtol=1e-3, atol=1e-3)
