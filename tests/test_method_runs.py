"""Every method in a training step; behind `slow`, in whole runs, to its saved and served prompt."""

import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file
from test_methods import CASES, TASKS, VARIANTS, make
from tiny_models import ONE_LAYER, random_batch, random_params

from prompt_tuning import cli
from prompt_tuning.api import model_config
from prompt_tuning.checkpoints import t5x
from prompt_tuning.config import (
    DataConfig,
    EvalConfig,
    Experiment,
    OptimizerConfig,
    PromptConfig,
    TrainConfig,
)
from prompt_tuning.methods.method import Frozen, Method
from prompt_tuning.methods.table import find_method
from prompt_tuning.model import sharding
from prompt_tuning.model.loss import forward, loss_fn
from prompt_tuning.model.prompt import Prompt
from prompt_tuning.model.t5 import T5
from prompt_tuning.prompts import prompt_file
from prompt_tuning.serving.predictor import Predictor
from prompt_tuning.training import loop
from prompt_tuning.training import step as steps
from prompt_tuning.training.tasks import Tasks
from prompt_tuning.world.generator import demo_rows

DROPPING = dataclasses.replace(ONE_LAYER, dropout_rate=0.1)
START = 3  # the step of the backbone
KEY_OF_FOLD = 2**31 - 1  # what is folded into the key of a step for the method


def methods(*fast, more=()):
    """These cases, and all others only with --slow."""
    cases = [*CASES, *(case for case in (*fast, *more) if case not in CASES)]
    cases = [
        pytest.param(*c, marks=() if c in fast else pytest.mark.slow, id=f"{c}") for c in cases
    ]
    return pytest.mark.parametrize(("name", "values"), cases)


def begin(name, values, config=ONE_LAYER, optimizer=None, place=jnp.asarray):
    """A state, the frozen backbone and the recipe; `place` puts the method's arrays somewhere."""
    _, params, _ = make(name, values, model=config)
    recipe = steps.make_recipe(
        T5(config),
        PromptConfig(method=name, settings=values),
        OptimizerConfig(),
        TrainConfig(random_seed=5),
        start_step=START,
    )
    recipe = recipe._replace(optimizer=optimizer or recipe.optimizer)
    placed = {leaf: place(np.asarray(value)) for leaf, value in params.items()}
    state = jax.jit(lambda params: steps.init_state(params, recipe.optimizer, START))(placed)
    return state, random_params(config), recipe


def batch_for(recipe, seed=0, rows=4):
    """A random batch; each row names the member of its task, if there are members."""
    batch = random_batch(rows=rows, seed=seed)
    if recipe.method.members:
        which = np.random.default_rng(seed).integers(0, len(TASKS), rows)
        batch["which"] = jnp.asarray(which, jnp.int32)
    return batch


def to_host(tree):
    return jax.tree.map(np.array, tree)


def to_device(tree):
    return jax.tree.map(jnp.array, tree)


def assert_same_bits(one, other):
    one, other = (jax.tree_util.tree_leaves_with_path(tree) for tree in (one, other))
    assert [path for path, _ in one] == [path for path, _ in other]
    for (path, a), (_, b) in zip(one, other, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def keep_gradients():
    """An optimiser whose state after an update is the gradient. It moves nothing."""

    def zeros(tree):
        return jax.tree.map(jnp.zeros_like, tree)

    return optax.GradientTransformation(zeros, lambda grads, state, params: (zeros(grads), grads))


# With what is fixed, of keys and values with dropout, of what a T5 computes.
@methods(
    ("low_rank", {"rank": 3}),
    ("prefix_tuning", {"dropout": 0.5}),
    ("shared_prompt", {}),
    more=[("p_tuning", {"encoder": "lstm", "hidden": 3, "dropout": 0.5})],
)
def test_the_gradient_is_that_of_a_loss_that_folds(name, values):
    """The prompt is folded once a step, and the sum pulled back once; here inside each loss."""
    state, frozen, recipe = begin(name, values, DROPPING, keep_gradients())
    state, programs = to_host(state), steps.compile_step(recipe)
    key_of_step = jax.random.fold_in(jax.random.key(5), START)
    fixed = recipe.method.fixed

    def loss(params, frozen, group, key_of_dropout):
        key = jax.random.fold_in(key_of_step, KEY_OF_FOLD)
        prompt = recipe.method.fold(recipe.settings, params, Frozen(DROPPING, frozen), key)
        which = group.get("which")
        logits = forward(recipe.model, frozen, prompt, group, which, dropout_key=key_of_dropout)
        return loss_fn(logits, group, z_loss=recipe.train.z_loss)[0]

    gradient = jax.jit(jax.grad(loss))
    # Groups of one size are compiled once; test_step.py has groups of different widths.
    batches = [batch_for(recipe, seed) for seed in range(3)]
    for groups in (batches[:1], batches):
        keys = [jax.random.fold_in(key_of_step, number) for number in range(len(groups))]
        keys = keys if len(groups) > 1 else [key_of_step]
        each = [gradient(state.trainable, frozen, *pair) for pair in zip(groups, keys, strict=True)]
        expected = {leaf: sum(one[leaf] for one in each) for leaf in each[0] if leaf not in fixed}
        norm = optax.tree.norm(expected)

        after, metrics = steps.train_step(programs, to_device(state), frozen, groups)
        again, _ = steps.train_step(programs, to_device(state), frozen, groups)
        assert_same_bits(after, again)  # the same units are dropped out
        assert_same_bits(after.trainable, state.trainable)
        assert not any(after.opt_state[leaf].any() for leaf in fixed if leaf in after.opt_state)
        np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-6)
        errors = {k: np.linalg.norm(after.opt_state[k] - value) for k, value in expected.items()}
        assert np.linalg.norm(list(errors.values())) <= 1e-6 * norm
        for leaf, error in errors.items():
            assert error <= 1e-5 * np.linalg.norm(expected[leaf]), leaf


@functools.cache
def ten_steps(case):
    """The state before and after ten steps, and after five and five, through arrays of the host."""
    name, values = CASES[case]
    state, frozen, recipe = begin(name, values, DROPPING)
    before, backbone = to_host(state), to_host(frozen)
    programs = steps.compile_step(recipe)

    def go_on(state, numbers):
        state = to_device(state)
        for number in numbers:
            groups = [batch_for(recipe, number)]
            state, _ = steps.train_step(programs, state, frozen, groups)
        return to_host(state)

    after = go_on(before, range(10))
    assert_same_bits(frozen, backbone)
    paused = go_on(go_on(before, range(5)), range(5, 10))
    return types.SimpleNamespace(before=before, after=after, paused=paused, recipe=recipe)


def cases():
    first = [variants[0] for variants in VARIANTS.values()]
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(n, marks=() if c[1] in first else pytest.mark.slow, id=f"{c}")
            for n, c in enumerate(CASES)
        ],
    )


@cases()
def test_steps_move_what_is_trained_and_nothing_else(case):
    run = ten_steps(case)
    assert run.after.step == START + 10
    assert run.after.trainable.keys() == run.before.trainable.keys()
    for leaf, value in run.after.trainable.items():
        before = run.before.trainable[leaf]
        if leaf in run.recipe.method.fixed:
            assert value.tobytes() == before.tobytes(), leaf
        else:
            assert np.abs(value - before).max() > 1e-3, leaf


@cases()
def test_five_and_five_steps_are_ten(case):
    run = ten_steps(case)
    assert_same_bits(run.paused, run.after)


@cases()
def test_only_what_is_trained_has_slots(case):
    run = ten_steps(case)
    trained = {k: v for k, v in run.after.trainable.items() if k not in run.recipe.method.fixed}
    slots = {}
    for path, value in jax.tree_util.tree_leaves_with_path(run.after.opt_state):
        leaf = getattr(path[-1], "key", None)
        if leaf is not None and value.size > 1:
            slots.setdefault(leaf, []).append(value.size)
        else:
            assert value.size == 1  # counts, and what Adafactor keeps in place of factors
    assert slots == {leaf: [value.size] for leaf, value in trained.items() if value.size > 1}


# Keys, values and rows of memory; test_sharding.py has rows before the input.
@methods(("shared_prompt", {}))
def test_a_mesh_is_one_device(name, values):
    """(4, 2): rows over four, the backbone's matrices over two, the method on each device whole."""
    mesh = sharding.make_mesh(2)
    assert tuple(mesh.shape.values()) == (4, 2)
    ends = []
    for where in (None, mesh):
        place = functools.partial(sharding.replicate, mesh=mesh) if where else jnp.asarray
        state, frozen, recipe = begin(name, values, place=place)
        batch = batch_for(recipe, rows=8)
        if where:
            frozen = jax.device_put(frozen, sharding.param_shardings(frozen, mesh))
            batch = sharding.shard_batch(to_host(batch), mesh)
        programs = steps.compile_step(recipe, state if where else None)
        losses = []
        for _ in range(2):
            state, metrics = steps.train_step(programs, state, frozen, [batch])
            losses.append([float(metrics[name]) for name in ("loss", "gradient_norm")])
        devices = {len(value.sharding.device_set) for value in jax.tree.leaves(state)}
        assert devices == {8 if where else 1}
        ends.append((losses, to_host(programs.fold_for_use(state, frozen))))
    (losses, prompt), (same_losses, same_prompt) = ends
    np.testing.assert_allclose(same_losses, losses, rtol=1e-5)
    for field, same in zip(*map(jax.tree.leaves, (prompt, same_prompt)), strict=True):
        atol = 1e-5 * np.abs(field).max(initial=0)
        np.testing.assert_allclose(same, field, rtol=0, atol=atol)


# Members ----------------------------------------------------------------------------------------

with_members = pytest.mark.parametrize(
    ("name", "values"),
    [
        pytest.param(*case, marks=[] if case[1] == {} else pytest.mark.slow, id=f"{case}")
        for case in CASES
        if find_method(case[0]).members
    ],
)


@with_members
def test_a_mixed_batch_is_the_sum_of_each_tasks_own(name, values):
    """Each member alone, as a prompt without members, on the rows of its task."""
    state, frozen, recipe = begin(name, values, optimizer=keep_gradients())
    state = to_host(state)
    moved = np.random.default_rng(0)
    params = {
        leaf: value + moved.normal(size=value.shape).astype(np.float32) / 10
        for leaf, value in state.trainable.items()
    }
    state = state._replace(trainable=params)
    batch = batch_for(recipe, rows=12)
    assert len({*batch["which"].tolist()}) == 3

    def loss(params, number, part):
        rows = recipe.method.fold(recipe.settings, params, Frozen(ONE_LAYER, frozen), None).rows
        logits = forward(recipe.model, frozen, Prompt(rows[number]), part)
        return loss_fn(logits, part, z_loss=recipe.train.z_loss)[0]

    gradient, expected = jax.jit(jax.grad(loss), static_argnums=1), []
    for number in range(3):
        own = np.asarray(batch["which"]) == number
        part = {
            key: value * own.astype(value.dtype)[:, None]
            for key, value in batch.items()
            if key != "which"
        }
        expected.append(gradient(params, number, part))
    after, _ = steps.train_step(steps.compile_step(recipe), to_device(state), frozen, [batch])
    for leaf, found in after.opt_state.items():
        whole = sum(np.asarray(part[leaf], np.float64) for part in expected)
        assert np.linalg.norm(found - whole) <= 1e-6 * np.linalg.norm(whole), leaf


@with_members
def test_a_task_that_a_batch_lacks_stays_and_changes_no_other(name, values):
    """Adafactor clips by array: the update of one task is the same beside others or alone."""
    ends = []
    for which in ([0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]):
        state, frozen, recipe = begin(name, values)
        before = to_host(state.trainable)
        batch = {key: jnp.concatenate([x] * (len(which) // 4)) for key, x in random_batch().items()}
        batch["which"] = jnp.asarray(which, jnp.int32)
        state, _ = steps.train_step(steps.compile_step(recipe), state, frozen, [batch])
        ends.append(to_host(state.trainable))
    for leaf, value in before.items():
        task = leaf.split("/")[1]
        if task == TASKS[0]:
            np.testing.assert_allclose(ends[0][leaf], ends[1][leaf], rtol=1e-5, atol=1e-6)
        if task in TASKS[1:]:  # weight decay alone
            decayed = value * (1 - OptimizerConfig().weight_decay)
            np.testing.assert_allclose(ends[0][leaf], decayed, rtol=1e-6)


# A leaf with a learning rate of its own ---------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class NoSettings:
    pass


def init_sum(settings, start):
    zeros = jnp.zeros((start.length, start.model.embed_dim))
    return {f"prompt/{leaf}": zeros for leaf in ("whole", "tenth", "double")}


def fold_sum(settings, params, frozen, key):
    return Prompt(rows=params["prompt/whole"] + params["prompt/tenth"] + params["prompt/double"])


SUM = Method(
    NoSettings, init_sum, fold_sum, starts=(), rates={"prompt/tenth": 0.1, "prompt/double": 2.0}
)


@pytest.mark.parametrize("schedule", ["constant", "rsqrt"])
@pytest.mark.parametrize("optimizer", ["adafactor", "adamw"])
def test_a_leaf_moves_at_its_own_rate(optimizer, schedule):
    """All leaves have the same gradient, and begin at zero."""
    name = f"{__name__}.SUM"
    assert find_method(name) is SUM
    rate = 0.25 * (1.0 if schedule == "constant" else 1_100_000**0.5)
    recipe = steps.make_recipe(
        T5(ONE_LAYER),
        PromptConfig(method=name),
        OptimizerConfig(name=optimizer, schedule=schedule, learning_rate=rate, warmup_steps=4),
        TrainConfig(),
        start_step=1_100_000,
    )
    _, params, _ = make(name, {})
    state = to_device(to_host(steps.init_state(params, recipe.optimizer, 0)))  # leaves of their own
    programs = steps.compile_step(recipe)
    for done in (1, 2):
        state, _ = steps.train_step(programs, state, random_params(ONE_LAYER), [random_batch()])
        moved = {leaf: np.asarray(value) for leaf, value in state.trainable.items()}
        if optimizer == "adafactor" and done == 1:  # every update has RMS = learning rate
            size = np.sqrt((moved["prompt/whole"] ** 2).mean())
            first = 0.25 / 4 if schedule == "constant" else 0.25
            np.testing.assert_allclose(size, first, rtol=1e-5)
        for leaf, factor in SUM.rates.items():
            expected = factor * moved["prompt/whole"]
            np.testing.assert_allclose(moved[leaf], expected, rtol=1e-5, atol=1e-7)


# Whole runs -------------------------------------------------------------------------------------

every_case = pytest.mark.parametrize(("name", "values"), CASES, ids=str)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("backbone") / f"checkpoint_{START}")
    t5x.write_t5x(path, random_params(DROPPING), START)
    return path


def files_of(folder):
    """All that a run leaves, by name, but times, curves and names of folders; its state by sums."""
    patterns = ("prompts/**/*", "metrics.jsonl", "inference_eval/*.jsonl")
    files = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    end = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(files)}
    for name in [name for name in end if name.endswith(prompt_file.METADATA)]:
        described = json.loads(end[name])
        for digest in ("config_hash", "sha256"):  # the stopped run was asked for fewer steps
            described.pop(digest)
        end[name] = described
    states = sorted((folder / "checkpoints").glob("*/meta/metadata"))
    return end, {path.parts[-3]: json.loads(path.read_text())["arrays"] for path in states}


@pytest.mark.slow
@every_case
def test_a_run_that_goes_on_is_one_that_was_not_stopped(name, values, checkpoint, tmp_path):
    """Bit for bit, stopped half-way, with dropout and length groups."""
    has_members = find_method(name).members

    def run(folder, steps):
        data = DataConfig(
            mixture_or_task_name="all_as" if has_members else "short_and_long_as",
            mixture_or_task_module="user_tasks",
            task_feature_lengths={"inputs": 72, "targets": 5},
            vocabulary="bytes",
            batch_size=8,
        )
        experiment = Experiment(
            model_dir=str(tmp_path / folder),
            initial_checkpoint_path=checkpoint,
            model=DROPPING,
            data=data,
            prompt=PromptConfig(length=4, class_labels=("yes", "no"), method=name, settings=values),
            train=TrainConfig(train_steps_relative=steps, length_groups=2),
            eval=EvalConfig(period=3, method="rank", num_examples=8, baselines=False),
            num_model_partitions=2,
        )
        return loop.train(experiment, Tasks).prompt

    straight = run("straight", 6)
    half = run("stopped", 3)
    resumed = run("stopped", 6)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (half, straight)), strict=True))
    assert_same_bits(resumed, straight)
    (files, states), (same_files, same_states) = (
        files_of(tmp_path / folder) for folder in ("straight", "stopped")
    )
    assert same_files == files
    assert same_states == states
    assert len(states) > 0


# Settings, learning rate: what gin/methods names for the demo. None: the one of the file.
LEARNED = [
    ("prompt_tuning", {}, None),
    ("p_tuning", {}, None),
    ("p_tuning", {"encoder": "lstm", "hidden": 32}, 0.003),
    ("residual", {}, None),
    ("superpos", {}, None),
    ("low_rank", {}, 0.6),
    ("low_rank", {"form": "dpt", "rank": 10}, 0.03),
    ("low_rank", {"form": "lopt2", "rank": 5}, 0.1),
    ("prefix_tuning", {}, None),
    ("prefix_tuning", {"hidden": 16, "dropout": 0.1}, 0.03),
    ("p_tuning_v2", {}, None),
    ("shared_prompt", {}, None),
    ("multitask", {}, None),
    ("multitask", {"form": "concat"}, None),
    ("multitask", {"form": "project"}, 0.02),
    ("mpt", {}, 0.1),
]
STEPS = 300
TASK = "tiny_mood"
MIXTURE, MEMBERS = "tiny_three", ("tiny_gloom", TASK, "tiny_topic")


def test_every_method_is_run():
    assert {name for name, _, _ in LEARNED} == set(VARIANTS)


def command(*arguments, **settings):
    """Runs t5x, with these macros."""
    flags = [f"--gin.{macro}={value!r}" for macro, value in settings.items()]
    assert cli.main([*arguments, *flags]) == 0


@pytest.fixture(scope="module", params=LEARNED, ids=str)
def learned(request, tmp_path_factory):
    """The MODEL_DIR of a short run of the demo; of a mixture, if each task has a member."""
    name, values, rate = request.param
    folder = tmp_path_factory.mktemp(name) / "run"
    settings = {"MODEL_DIR": str(folder), "TRAIN_STEPS_RELATIVE": STEPS, "EVAL_PERIOD": STEPS}
    settings |= {"PROMPT_SETTINGS": values} if values else {}
    settings |= {"LEARNING_RATE": rate} if rate else {}
    settings |= {"EVAL_BASELINES": False, "EVALUATOR_NUM_EXAMPLES": 100}
    if find_method(name).members:
        settings |= {"MIXTURE_OR_TASK_NAME": MIXTURE, "MIXTURE_OR_TASK_MODULE": "member_tasks"}
        # A task has a third of the rows.
        settings |= {"TRAIN_STEPS_RELATIVE": 2 * STEPS, "EVAL_PERIOD": 2 * STEPS}
    command("train", "--gin_file=demo.gin", f"--gin_file=methods/{name}.gin", **settings)
    return folder


def read_rows(folder, stem=TASK):
    (file,) = (folder / "inference_eval").glob(f"{stem}-[0-9]*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def read_prompt(folder):
    (name, rows), *more = load_file(folder / "adapter_model.safetensors").items()
    assert (name, more) == ("prompt_embeddings", [])
    return rows


def best_prompt(folder):
    """The best prompt of a run, or its member for TASK."""
    best = folder / "prompts" / "best"
    return best / TASK if (best / TASK).exists() else best


def skip_without_rows(folder):
    if not (best_prompt(folder) / "adapter_model.safetensors").exists():
        pytest.skip("a prompt that is not rows which see the input: PEFT has none")


@pytest.mark.slow
def test_the_demos_task_is_learned(learned):
    best = json.loads((best_prompt(learned) / "prompt_tuning.json").read_text())
    assert best["score"] >= 90
    assert len(read_rows(learned)) == 100


@pytest.mark.slow
def test_all_tasks_of_a_mixture_are_learned(learned):
    """By their own members: "tiny_gloom" has the rows of "tiny_mood", and the opposite answers."""
    best = learned / "prompts" / "best"
    if best_prompt(learned) == best:
        pytest.skip("a prompt without members")
    folders = {path.name: path for path in prompt_file.list_prompts(best)}
    assert folders.keys() == {"all-tasks", *MEMBERS}
    for task in MEMBERS:
        described = json.loads((folders[task] / "prompt_tuning.json").read_text())
        assert described["task"] == task
        assert described["score"] >= 85, task
        assert len(read_rows(learned, task)) == 100


@pytest.mark.slow
def test_the_folder_is_one_that_peft_reads(learned):
    skip_without_rows(learned)
    best = best_prompt(learned)
    config = json.loads((best / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"]) == ("PROMPT_TUNING", "SEQ_2_SEQ_LM")
    assert config["num_virtual_tokens"] == 20
    rows = read_prompt(best)
    assert rows.shape == (20, model_config("tiny").embed_dim)
    assert rows.dtype == np.float32


@pytest.mark.slow
def test_a_prompt_that_is_saved_again_is_the_same_files(learned, tmp_path):
    best = best_prompt(learned)
    stored = prompt_file.read_prompt(best)
    prompt_file.save_prompt(tmp_path / "again", stored.prompt, stored.metadata)
    one, other = (
        {path.name: path.read_bytes() for path in folder.iterdir()}
        for folder in (best, tmp_path / "again")
    )
    assert len(one) in (2, 3)
    assert one == other


@pytest.mark.slow
def test_the_saved_prompt_scores_as_the_run_did(learned, tmp_path):
    """Outputs, their scores and those of every label, to the bit; also with the run's settings."""
    command(
        "eval",
        f"--gin_file={learned / 'config.gin'}",
        "--gin_file=runs/eval.gin",
        PROMPT_FILE=str(best_prompt(learned)),
        EVAL_OUTPUT_DIR=str(tmp_path),
    )
    rows = read_rows(learned)
    assert read_rows(tmp_path) == rows
    assert {"output", "score", "label_scores"} <= set(rows[0])


@pytest.mark.slow
def test_the_prompt_is_served_beside_another(learned, tmp_path):
    rng = np.random.default_rng(0)
    config = model_config("tiny")
    np.save(tmp_path / "other.npy", rng.normal(size=(7, config.embed_dim)).astype(np.float32))
    prompts = {"own": best_prompt(learned), "other": tmp_path / "other.npy"}
    predictor = Predictor.from_checkpoint(
        "tiny", config, "tiny", prompts, max_input_length=64, max_target_length=8, batch_size=8
    )
    rows = demo_rows(TASK, "validation")[:8]
    texts, targets = ([row[key] for row in rows] for key in ("inputs", "targets"))
    labels = sorted(set(targets))
    mixed = ["own", "other", None, "own", "own", None, "other", "own"]
    own = [place for place, name in enumerate(mixed) if name == "own"]
    alone = predictor.generate(texts, "own")
    together = predictor.generate(texts, mixed)
    assert [together[place] for place in own] == [alone[place] for place in own]
    assert sum(answer == target for answer, target in zip(alone, targets, strict=True)) >= 6
    alone, together = (predictor.score(texts, labels, names) for names in ("own", mixed))
    np.testing.assert_allclose(together[own], alone[own], rtol=1e-5, atol=1e-5)
    ranked = predictor.rank(texts, labels, mixed)
    assert [ranked[place] for place in own] == [labels[alone[place].argmax()] for place in own]


@pytest.mark.slow
def test_the_prompt_is_inspected_and_converted(learned, tmp_path):
    skip_without_rows(learned)
    best = best_prompt(learned)
    values = tmp_path / "inspected.json"
    command("inspect-prompt", str(best), "--checkpoint=tiny", f"--json={values}")
    norms = np.linalg.norm(read_prompt(best), axis=1)
    (inspected,) = json.loads(values.read_text())["prompts"]
    np.testing.assert_allclose([row["norm"] for row in inspected["rows"]], norms, rtol=1e-4)
    for source, form, output in (
        (best, "npy", "rows.npy"),
        ("rows.npy", "peft", "peft"),
        ("peft", "ours", "ours"),
    ):
        command(
            "convert-prompt",
            f"--input={tmp_path / source}",
            f"--output={tmp_path / output}",
            f"--format={form}",
        )
    for rows in (np.load(tmp_path / "rows.npy"), read_prompt(tmp_path / "ours")):
        assert rows.tobytes() == read_prompt(best).tobytes()
