"""The plugin inside upstream T5X: T5X's numbers, the embedded engine's prompts, all three modes."""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict
from tiny_models import CONFIG, MODEL, random_batch, random_params, random_prompt

from prompt_tuning import load_prompt
from prompt_tuning.checkpoints.t5x import read_param, read_shapes, read_step, write_t5x
from prompt_tuning.config import (
    DataConfig,
    Experiment,
    OptimizerConfig,
    PromptConfig,
    TrainConfig,
    to_dict,
)
from prompt_tuning.config.gin_files import gin_folder
from prompt_tuning.decoding import decode
from prompt_tuning.model import loss
from prompt_tuning.model.prompt import Prompt
from prompt_tuning.tasks.vocabulary import load_seqio_vocabulary
from prompt_tuning.training import step

try:
    import t5x.main  # noqa: F401  # with all that it needs: airio, jestimator, ...
except ImportError as error:
    missing = f"upstream T5X cannot be imported ({error}); docs/t5x.md says how to install it"
    pytestmark = [pytest.mark.t5x, pytest.mark.skip(reason=missing)]
else:
    from t5x import models, partitioning, train_state, trainer
    from t5x.examples.t5 import network

    from prompt_tuning.upstream import inputs, plugin

    pytestmark = pytest.mark.t5x

PROMPT = "encoder/prompt/prompt/prompt"
SCOPE = "encoder/prompt/prompt/"
START = 1000  # of the backbone; the steps of a run are counted on from it
HERE = Path(__file__).parent


def network_config():
    return network.T5Config(
        vocab_size=CONFIG.num_embeddings,
        emb_dim=CONFIG.embed_dim,
        num_heads=CONFIG.num_heads,
        num_encoder_layers=CONFIG.num_encoder_layers,
        num_decoder_layers=CONFIG.num_decoder_layers,
        head_dim=CONFIG.head_dim,
        mlp_dim=CONFIG.mlp_dim,
        mlp_activations=("gelu", "linear"),
        dropout_rate=0.0,
    )


def transformer(prompt):
    """T5X's network with a prompt of the paper's method, or with a `StartingPrompt`."""
    if not isinstance(prompt, inputs.StartingPrompt):
        rows = np.asarray(prompt, np.float32)
        fold = inputs.make_fold(PromptConfig(), CONFIG)
        prompt = inputs.StartingPrompt({"prompt": rows}, len(rows), fold)
    return plugin.PromptedTransformer(config=network_config(), start=prompt)


def run_t5x(module, params, batch, **kwargs):
    """The logits of a T5X network for flat parameters."""
    tokens = [batch[f"{name}_tokens"] for name in INPUTS]
    tree = unflatten_dict(dict(params), sep="/")
    apply = jax.jit(functools.partial(module.apply, enable_dropout=False))
    return apply({"params": tree}, *tokens, **kwargs)


INPUTS = ("encoder_input", "decoder_input", "decoder_target")


def gaps(actual, expected):
    """The largest difference, as a share of the largest value expected."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    return np.abs(actual - expected).max() / np.abs(expected).max()


# The module ---------------------------------------------------------------------------------------


def test_adds_one_parameter_to_t5x_network():
    batch = random_batch()
    tokens = [batch[f"{name}_tokens"] for name in INPUTS]

    def init(module):
        shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *tokens))
        return {
            name: shape.shape for name, shape in flatten_dict(shapes["params"], sep="/").items()
        }, flatten_dict(unfreeze(shapes["params_axes"]), sep="/")

    plain, plain_axes = init(network.Transformer(config=network_config()))
    prompted, axes = init(transformer(np.zeros((5, 32))))
    assert prompted == {**plain, PROMPT: (5, 32)}
    assert axes[f"{PROMPT}_axes"].names == (None, None)
    assert axes.keys() == {*plain_axes, f"{PROMPT}_axes"}
    assert init(transformer(np.zeros((0, 32))))[0] == plain


def test_a_prompt_of_embedded_tokens_is_those_tokens():
    params, batch = random_params(), random_batch()
    ids = np.array([7, 300, 5])
    front = jnp.tile(ids, (len(batch["encoder_input_tokens"]), 1))
    tokens = jnp.concatenate([front, batch["encoder_input_tokens"]], axis=1)
    prompt = params["token_embedder/embedding"][ids]
    expected = run_t5x(
        network.Transformer(config=network_config()),
        params,
        {**batch, "encoder_input_tokens": tokens},
    )
    actual = run_t5x(transformer(prompt), {**params, PROMPT: prompt}, batch)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("length", [0, 6])
def test_logits_are_the_embedded_engines(length):
    params, batch, prompt = random_params(), random_batch(), random_prompt(length)
    given = {**params, PROMPT: prompt} if length else params
    actual = run_t5x(transformer(prompt), given, batch)
    expected = loss.forward(MODEL, params, Prompt(prompt), batch)
    real = batch["decoder_target_tokens"] > 0
    assert gaps(actual[real], expected[real]) < 1e-5


def test_logits_are_the_originals(shared_dir):
    golden = np.load(shared_dir / "goldens/t5x/golden.npz")
    expected = np.load(shared_dir / "goldens/t5x/prompt_reference.npz")
    params = dict(np.load(shared_dir / "goldens/t5x/params.npz"))
    batch = {name.removeprefix("in/"): golden[name] for name in golden if name.startswith("in/")}
    actual = run_t5x(transformer(expected["prompt"]), {**params, PROMPT: expected["prompt"]}, batch)
    real = batch["decoder_target_tokens"] > 0
    assert gaps(actual[real], expected["logits"][real]) < 1e-5


def test_packed_rows_are_refused():
    batch, prompt = random_batch(), random_prompt(2)
    params = {**random_params(), PROMPT: prompt}
    segments = jnp.ones_like(batch["encoder_input_tokens"])
    with pytest.raises(ValueError, match="packed"):
        run_t5x(transformer(prompt), params, batch, encoder_segment_ids=segments)


@pytest.mark.parametrize("num_decodes", [1, 3])
def test_decoded_tokens_are_the_embedded_engines(num_decodes):
    params, batch, prompt = random_params(seed=3), random_batch(rows=16), random_prompt(4)
    model = make_model(prompt, num_decodes=num_decodes)
    tree = unflatten_dict({**params, PROMPT: prompt}, sep="/")
    actual = jax.jit(model.predict_batch)(tree, batch)
    expected, _ = jax.jit(
        lambda tokens: decode.generate(
            MODEL, params, Prompt(prompt), tokens, length=actual.shape[1], num_decodes=num_decodes
        )
    )(batch["encoder_input_tokens"])
    np.testing.assert_array_equal(actual, expected)


# The optimiser ------------------------------------------------------------------------------------


PLAIN = PromptConfig(length=4)


def make_experiment(tmp_path: Path, prompt: PromptConfig = PLAIN, **optimizer) -> Experiment:
    """20 steps of a prompt of 4 rows, on a checkpoint in `tmp_path`."""
    checkpoint = tmp_path / f"checkpoint_{START}"
    if not checkpoint.exists():
        write_t5x(checkpoint, random_params(), START)
    return Experiment(
        model_dir=str(tmp_path / "run"),
        initial_checkpoint_path=str(checkpoint),
        model=CONFIG,
        data=DataConfig(
            mixture_or_task_name="tiny_mood",
            task_feature_lengths={"inputs": 12, "targets": 6},
            vocabulary="bytes",
        ),
        prompt=prompt,
        optimizer=OptimizerConfig(**optimizer),
        train=TrainConfig(train_steps_relative=20),
    )


def make_model(prompt, optimizer_def=None, num_decodes=1):
    vocabulary = load_seqio_vocabulary("bytes")
    return models.EncoderDecoderModel(
        module=transformer(prompt),
        input_vocabulary=vocabulary,
        output_vocabulary=vocabulary,
        optimizer_def=optimizer_def,
        z_loss=1e-4,
        decode_fn=plugin.choose_decoder(num_decodes),
        default_decoder_params=models.DecoderParams(num_decodes=num_decodes),
    )


METHODS = {
    "prompt_tuning": {},
    "residual": {"hidden": 7},
    "p_tuning": {"encoder": "lstm", "hidden": 5},
    "low_rank": {"rank": 3},  # its basis is fixed
}
CASES = {
    "adafactor": ("prompt_tuning", {}),  # the paper's
    "from_0": ("prompt_tuning", {"start_step": 0, "warmup_steps": 5}),
    "adamw": ("prompt_tuning", {"name": "adamw", "learning_rate": 0.03}),
    "residual": ("residual", {}),
    "p_tuning": ("p_tuning", {"learning_rate": 0.01}),  # at 0.3 its LSTM amplifies rounding
    "low_rank": ("low_rank", {}),
}


@pytest.mark.parametrize(("method", "optimizer"), CASES.values(), ids=CASES)
def test_twenty_steps_are_the_embedded_engines(tmp_path, method, optimizer):
    prompt = PromptConfig(length=4, method=method, settings=METHODS[method])
    experiment = make_experiment(tmp_path, prompt, **optimizer)
    backbone, start = random_params(), inputs.starting_prompt(experiment)
    batches = [random_batch(rows=8, seed=i) for i in range(20)]
    before = {**backbone, **{SCOPE + name: value for name, value in start.params.items()}}

    wrapper = plugin.make_optimizer(experiment)
    model = make_model(start, wrapper)
    state = train_state.FlaxOptimTrainState.create(
        wrapper, {"params": unflatten_dict(before, sep="/")}
    )
    t5x_step = jax.jit(
        lambda state, batch: trainer.train_with_lr(
            state, batch, jnp.float32(0), jax.random.PRNGKey(0), model, None
        )
    )
    recipe = step.make_recipe(
        MODEL, prompt, experiment.optimizer, experiment.train, start_step=START
    )
    programs = step.compile_step(recipe)
    our_state = step.init_state(start.params, recipe.optimizer, START)
    for batch in batches:
        state, t5x_metrics = t5x_step(state, batch)
        our_state, our_metrics = step.train_step(programs, our_state, backbone, [batch])
        assert gaps(t5x_metrics["loss"].total, our_metrics["loss"]) < 1e-5

    after = flatten_dict(unfreeze(state.params), sep="/")
    fixed = recipe.method.fixed
    changed = {n for n in after if not np.array_equal(after[n], before[n])}
    assert changed == {SCOPE + name for name in start.params if name not in fixed}
    theirs = {n.removeprefix(SCOPE): v for n, v in after.items() if n.startswith(SCOPE)}
    assert gaps(start.fold(theirs), start.fold(our_state.trainable)) < 1e-4
    # No slot for what is frozen: two moments of each trained leaf at most, and counts.
    slots = [leaf for leaf in jax.tree.leaves(state.param_states) if leaf.ndim]
    trained = [value for name, value in start.params.items() if name not in fixed]
    assert sum(leaf.size for leaf in slots) <= sum(2 * value.size + 8 for value in trained)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "prompt_tuning"])
def test_logits_with_the_folded_prompt_are_the_methods(tmp_path, method):
    prompt = PromptConfig(length=4, method=method, settings=METHODS[method])
    start = inputs.starting_prompt(make_experiment(tmp_path, prompt))
    backbone, batch = random_params(), random_batch()
    leaves = {SCOPE + name: value for name, value in start.params.items()}
    rows = np.asarray(start.fold(start.params))
    assert rows.shape == (4, CONFIG.embed_dim)
    unfolded = run_t5x(transformer(start), {**backbone, **leaves}, batch)
    folded = run_t5x(transformer(rows), {**backbone, PROMPT: rows}, batch)
    assert gaps(unfolded, folded) < 1e-6


def test_a_fold_with_dropout_needs_a_key(tmp_path):
    settings = {"encoder": "lstm", "hidden": 5, "dropout": 0.5}
    prompt = PromptConfig(length=4, method="p_tuning", settings=settings)
    start = inputs.starting_prompt(make_experiment(tmp_path, prompt))
    tree = unflatten_dict(
        {**random_params(), **{SCOPE + n: v for n, v in start.params.items()}}, sep="/"
    )
    tokens = [random_batch()[f"{name}_tokens"] for name in INPUTS]

    def logits(train, seed):
        rngs = {"dropout": jax.random.key(seed)}
        return transformer(start).apply({"params": tree}, *tokens, enable_dropout=train, rngs=rngs)

    np.testing.assert_array_equal(logits(False, 0), logits(False, 1))
    assert not np.array_equal(logits(True, 0), logits(True, 1))


@pytest.mark.parametrize("trainable", ["prompt", "model"])
def test_t5x_can_partition_and_restore_the_optimiser(tmp_path, trainable):
    experiment = make_experiment(tmp_path)
    config = dataclasses.replace(experiment.train, trainable=trainable)
    experiment = dataclasses.replace(experiment, train=config)
    model = make_model(np.zeros((4, 32)), plugin.make_optimizer(experiment))
    shapes = {name: (8, 12) for name in random_batch()}
    variables = model.get_initial_variables(jax.random.PRNGKey(0), shapes)
    state = train_state.FlaxOptimTrainState.create(model.optimizer_def, variables)
    rules = partitioning.standard_logical_axis_rules()
    axes = partitioning.PjitPartitioner(num_partitions=1, logical_axis_rules=rules).get_mesh_axes(
        state
    )
    assert flatten_dict(unfreeze(axes.params), sep="/")[PROMPT] == jax.sharding.PartitionSpec(
        None, None
    )
    again = state.restore_state(state.state_dict())
    assert jax.tree.structure(again.param_states) == jax.tree.structure(state.param_states)


def test_logged_learning_rate_counts_from_the_backbones_step(tmp_path):
    warm = make_experiment(tmp_path, learning_rate=0.2, warmup_steps=4)
    rate = plugin.make_learning_rate(warm)
    np.testing.assert_allclose([rate(START + i) for i in (0, 3, 9)], [0.05, 0.2, 0.2], rtol=1e-6)
    constant = make_experiment(tmp_path, learning_rate=0.2)
    assert plugin.make_learning_rate(constant)(START + 7) == 0.2
    falling = make_experiment(tmp_path, learning_rate=0.2, warmup_steps=4, schedule="rsqrt")
    np.testing.assert_allclose(
        plugin.make_learning_rate(falling)(START + 7), 0.2 * (START + 7) ** -0.5, rtol=1e-6
    )


# Whole runs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a backbone, and a gin file with a task."""
    folder = tmp_path_factory.mktemp("t5x")
    (folder / "runs").mkdir()  # as most working directories have one
    write_t5x(folder / f"checkpoint_{START}", random_params(), START)
    macros = {
        **{name.upper(): value for name, value in to_dict(CONFIG).items()},
        "VOCABULARY": "bytes",
        "MIXTURE_OR_TASK_NAME": "t5x_yes_no",
        "MIXTURE_OR_TASK_MODULE": "t5x_task",
        "TASK_FEATURE_LENGTHS": {"inputs": 24, "targets": 8},
        "BATCH_SIZE": 8,
        "PROMPT_LENGTH": 5,
        "EVAL_PERIOD": 10,
        "INITIAL_CHECKPOINT_PATH": str(folder / f"checkpoint_{START}"),
    }
    text = "".join(f"{name} = {value!r}\n" for name, value in macros.items())
    (folder / "small.gin").write_text(text)
    return folder


def call(work: Path, *arguments: str) -> str:
    """Runs Python in `work`, on one CPU device; returns what it printed."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
    }
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=work,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert result.returncode == 0, result.stdout[-4000:]
    return result.stdout


def upstream(work: Path, mode: str, file: str, **macros: object) -> str:
    """The plain upstream way."""
    bindings = [f"--gin.{name}={value!r}" for name, value in macros.items()]
    flags = [f"--run_mode={mode}", f"--gin_search_paths={gin_folder()},{work}", "--logtostderr"]
    files = [f"--gin_file=t5x/{file}", "--gin_file=small.gin"]
    return call(work, "-m", "t5x.main", *flags, *files, *bindings)


def ours(work: Path, mode: str, file: str, *flags: str, **macros: object) -> str:
    """The project's command; the file of runs/ first, so that small.gin overrides its recipe."""
    bindings = [f"--gin.{name}={value!r}" for name, value in macros.items()]
    files = [f"--gin_file=runs/{file}", "--gin_file=small.gin"]
    return call(work, "-m", "prompt_tuning.cli", mode, *flags, *files, *bindings)


def predictions(file: Path) -> list[str]:
    return [json.loads(line)["prediction"] for line in file.read_text().splitlines()]


@pytest.fixture(scope="module", params=["prompt_tuning", "residual"])
def runs(request, work):
    """20 steps of either engine; T5X is stopped after 10 and started again, the plain way.

    Returns the folder of the two runs, relative to `work`, and what T5X printed.
    """
    method = request.param
    settings = {"PROMPT_METHOD": method, "PROMPT_SETTINGS": METHODS[method]}
    train = functools.partial(ours, work, "train", "prompt_tune.gin")
    train(MODEL_DIR=f"{method}/embedded", TRAIN_STEPS_RELATIVE=20, **settings)
    common = {"MODEL_DIR": str(work / method / "t5x"), **settings}
    first = train("--engine=t5x", TRAIN_STEPS_RELATIVE=10, **common)
    second = upstream(work, "train", "prompt_tune.gin", TRAIN_STEPS_RELATIVE=20, **common)
    return method, first + second


def test_both_engines_tune_the_same_prompt(work, runs):
    method, _ = runs
    for at in (START + 10, START + 20):
        (one, ours), (other, theirs) = (
            load_prompt(work / method / engine / "prompts" / f"step_{at:06d}")
            for engine in ("embedded", "t5x")
        )
        assert gaps(other, one) < 1e-4
        for name in ("task", "backbone", "vocabulary", "step", "method", "settings"):
            assert getattr(theirs, name) == getattr(ours, name), name


def test_both_engines_report_the_same_losses(work, runs):
    method, printed = runs
    pattern = r"\[(\d+)\] collection=train accuracy=.*loss_per_nonpadding_target_token=([\d.e-]+)"
    theirs = {int(at): float(value) for at, value in re.findall(pattern, printed)}
    file = work / method / "embedded/metrics.jsonl"
    records = [json.loads(x) for x in file.read_text().splitlines()]
    losses = {
        r["step"]: r["value"] for r in records if r["split"] == "train" and r["name"] == "loss"
    }
    for at in (START + 10, START + 20):
        # The embedded engine logs every step here, T5X the mean of ten; all have equal weights.
        mean = np.mean([losses[i] for i in range(at - 9, at + 1)])
        assert theirs[at] == pytest.approx(mean, rel=1e-5)


def test_only_the_methods_leaves_change(work, runs):
    method, _ = runs
    before, after = work / f"checkpoint_{START}", work / method / "t5x" / f"checkpoint_{START + 20}"
    shapes = read_shapes(after)
    leaves = {name: shape for name, shape in shapes.items() if name.startswith(SCOPE)}
    assert {name: shapes[name] for name in shapes if name not in leaves} == read_shapes(before)
    assert read_step(after) == START + 20
    for name in read_shapes(before):
        np.testing.assert_array_equal(read_param(after, name), read_param(before, name), name)
    saved, _ = load_prompt(work / method / "t5x" / "prompts" / f"step_{START + 20:06d}")
    if method == "prompt_tuning":
        assert leaves == {PROMPT: (5, 32)}
        np.testing.assert_array_equal(read_param(after, PROMPT), saved)
    else:
        assert f"{PROMPT}/rows" in leaves
        fold = inputs.make_fold(PromptConfig(method=method, settings=METHODS[method]), CONFIG)
        params = {name.removeprefix(SCOPE): read_param(after, name) for name in leaves}
        assert gaps(jax.jit(fold)(params), saved) < 1e-6  # folded by a process with other threads


def test_eval_and_infer_use_the_prompt(work, runs):
    method, last = runs[0], START + 20
    answers = f"inference_eval/t5x_yes_no-{last:06d}.jsonl"
    expected = predictions(work / method / "t5x" / answers)
    assert expected == predictions(work / method / "embedded" / answers)
    # The whole checkpoint of T5X, which holds the paper's prompt, or the parameters of a method ...
    of_method = {"PROMPT_FILE": str(work / method / f"t5x/prompts/step_{last:06d}")}
    upstream(
        work,
        "eval",
        "eval.gin",
        CHECKPOINT_PATH=str(work / method / f"t5x/checkpoint_{last}"),
        EVAL_OUTPUT_DIR=str(work / method / "eval"),
        **({} if method == "prompt_tuning" else of_method),
    )
    assert predictions(work / method / "eval" / answers) == expected
    # ... and the frozen backbone with a prompt folder, whose step is in the names of the files.
    if method == "prompt_tuning":
        upstream(
            work,
            "eval",
            "eval.gin",
            CHECKPOINT_PATH=str(work / f"checkpoint_{START}"),
            EVAL_OUTPUT_DIR=str(work / method / "eval_backbone"),
            **of_method,
        )
        assert predictions(work / method / "eval_backbone" / answers) == expected
    ours(
        work,
        "infer",
        "infer.gin",
        "--engine=t5x",
        PROMPT_FILE=f"{method}/embedded/prompts/step_{last:06d}",
        INFER_OUTPUT_DIR=f"{method}/infer",
    )
    file = work / method / "infer/t5x_yes_no-predict.jsonl-00000-of-00001"
    assert predictions(file) == expected
