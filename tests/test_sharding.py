"""Eight devices in four meshes do what one does, each holding its share."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from tiny_models import ONE_LAYER as CONFIG
from tiny_models import random_batch, random_params, random_prompt

from prompt_tuning.checkpoints import t5x
from prompt_tuning.checkpoints.run_state import RunStateStore
from prompt_tuning.config import (
    ConfigError,
    ModelConfig,
    OptimizerConfig,
    PromptConfig,
    TrainConfig,
)
from prompt_tuning.decoding import decode
from prompt_tuning.model import sharding, t5
from prompt_tuning.model.prompt import Prompt
from prompt_tuning.session import checks
from prompt_tuning.training import optim, step

MESHES = {(8, 1): 1, (4, 2): 2, (2, 4): 4, (1, 8): 8}
every_mesh = pytest.mark.parametrize(
    "shape",
    [pytest.param(m, marks=() if m == (4, 2) else pytest.mark.slow) for m in MESHES],
    ids=str,
)
pytestmark = pytest.mark.skipif(
    len(jax.devices()) != 8,
    reason="needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8",
)


def run(mesh, batches, config=CONFIG):
    """Loss and gradient of a group, the prompt after steps on all batches, and beam tokens.

    Every other batch is cut into two groups, of which the second is padded to less.
    """
    shapes = t5.param_shapes(config)
    params = {name: value.astype(config.dtype) for name, value in random_params(CONFIG).items()}
    backbone = jax.device_put(params, sharding.param_shardings(shapes, mesh))
    state, model = make_state(mesh), t5.T5(config)
    recipe = step.make_recipe(model, PromptConfig(), OptimizerConfig(), TrainConfig())
    sharded = [[sharding.shard_batch(group, mesh) for group in cut(*b)] for b in enumerate(batches)]
    programs = step.compile_step(recipe, state)
    folded = programs.fold(state, backbone)
    zeros = programs.zeros(state, folded)
    grad, _, metrics = programs.add(zeros, folded, state, backbone, sharded[1][0], np.int32(0))
    first = state.trainable["prompt"].copy()
    for groups in sharded:
        state, _ = step.train_step(programs, state, backbone, groups)
    generate = functools.partial(decode.generate, model, length=6, num_decodes=3)
    tokens, _ = jax.jit(generate)(backbone, Prompt(first), sharded[0][0]["encoder_input_tokens"])
    found = metrics["loss"], grad.rows, state.trainable["prompt"], tokens
    return backbone, [np.asarray(x) for x in found]


def cut(number, batch):
    """A batch whole, or its halves."""
    if number % 2 == 0:
        return [batch]
    halves = [{name: value[i : i + 8] for name, value in batch.items()} for i in (0, 8)]
    halves[1]["encoder_input_tokens"] = halves[1]["encoder_input_tokens"][:, :8]
    return halves


@pytest.fixture(scope="module")
def batches():
    rows = [random_batch(rows=16, inputs=12, targets=6, seed=i) for i in range(20)]
    return [{k: np.asarray(v) for k, v in batch.items()} for batch in rows]


@pytest.fixture(scope="module")
def single(batches):
    return run(sharding.make_mesh(1, jax.devices()[:1]), batches)[1]


@every_mesh
def test_a_mesh_equals_one_device(shape, batches, single):
    mesh = sharding.make_mesh(MESHES[shape])
    assert tuple(mesh.shape.values()) == shape
    backbone, (loss, grad, prompt, tokens) = run(mesh, batches)
    np.testing.assert_allclose(loss, single[0], rtol=1e-5)
    np.testing.assert_allclose(grad, single[1], atol=1e-5 * np.abs(single[1]).max())
    np.testing.assert_allclose(prompt, single[2], atol=1e-4)
    np.testing.assert_array_equal(tokens, single[3])
    for name, value in backbone.items():
        if value.ndim < 2:
            continue
        parts = 1 if name.endswith("rel_embedding") and shape[1] == 8 else shape[1]
        held = {s.data.nbytes for s in value.addressable_shards}
        assert held == {value.nbytes // parts}, name


@pytest.mark.slow
def test_a_bfloat16_backbone_on_a_mesh_equals_one_on_a_device(batches, single):
    """By the gradient: a step of Adafactor is as long where it is all rounding."""
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    one, many = (
        run(mesh, batches[:2], config)[1]
        for mesh in (sharding.make_mesh(1, jax.devices()[:1]), sharding.make_mesh(4))
    )
    np.testing.assert_allclose(many[0], one[0], rtol=0.01)
    for wanted in (one[1], single[1]):
        grad, wanted = many[1].ravel(), wanted.ravel()
        assert grad @ wanted / np.linalg.norm(grad) / np.linalg.norm(wanted) > 0.999


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A checkpoint, and a state that was trained and saved on one device."""
    folder = tmp_path_factory.mktemp("sharding")
    t5x.write_t5x(folder / "checkpoint_9", random_params(CONFIG), 9)
    with RunStateStore(folder / "states") as store:
        store.save(3, make_state(sharding.make_mesh(1, jax.devices()[:1])), {"is": "one"})
        store.wait()
    return folder


def make_state(mesh, seed=5):
    prompt = sharding.replicate(np.asarray(random_prompt(5, seed=seed)), mesh)
    optimizer = optim.make_optimizer(OptimizerConfig(), optim.PROMPT_RULES)
    return jax.jit(functools.partial(step.init_state, optimizer=optimizer, step=9))(
        {"prompt": prompt}
    )


@every_mesh
def test_a_mesh_restores_saves_and_resumes_as_one_device_does(shape, written, tmp_path):
    mesh = sharding.make_mesh(shape[1])
    places = sharding.param_shardings(t5.param_shapes(CONFIG), mesh)
    found, _ = t5x.read_t5x(written / "checkpoint_9", t5.param_shapes(CONFIG), shardings=places)
    for name, value in random_params(CONFIG).items():
        assert found[name].sharding == places[name], name
        np.testing.assert_array_equal(found[name], value, err_msg=name)

    def same(one, other):
        for left, right in zip(*map(jax.tree.leaves, (one, other)), strict=True):
            np.testing.assert_array_equal(left, right)

    state = make_state(mesh)
    with RunStateStore(written / "states", read_only=True) as store:
        restored, _ = store.restore(make_state(mesh, seed=6))  # what one device saved
    same(restored, state)
    assert restored.trainable["prompt"].sharding.is_fully_replicated
    assert restored.trainable["prompt"].sharding.device_set == set(jax.devices())
    with RunStateStore(tmp_path) as store:
        store.save(4, restored, {"is": "eight"})
        store.wait()
        back, _ = store.restore(make_state(sharding.make_mesh(1, jax.devices()[:1]), seed=6))
    same(back, state)


def test_every_parameter_has_a_rule_and_an_unknown_one_is_an_error():
    for name, shape in t5.param_shapes(CONFIG).items():
        assert len(sharding.logical_axes(name, shape.shape)) == len(shape.shape)
    with pytest.raises(ValueError, match="LOGICAL_AXES"):
        sharding.logical_axes("encoder/layers_0/lora/kernel", (2, 3))


def test_what_does_not_divide_says_so():
    with pytest.raises(ConfigError, match="8 devices"):
        sharding.make_mesh(3)
    with pytest.raises(ConfigError, match="BATCH_SIZE = 6"):
        checks.check_batch_size(6, sharding.make_mesh(2))


def test_a_dimension_that_does_not_divide_is_replicated():
    config = ModelConfig(**{**CONFIG.__dict__, "num_embeddings": 259})
    mesh = sharding.make_mesh(2)
    placed = sharding.param_shardings(t5.param_shapes(config), mesh)
    assert placed["token_embedder/embedding"].is_fully_replicated
    assert placed["encoder/layers_0/mlp/wo/kernel"].spec[0] == "model"
