"""A run that goes on elsewhere: the bits of its state, then the same course to rounding."""

import functools

import jax
import numpy as np
import pytest
from tiny_models import CONFIG, cutting_of, random_params

from prompt_tuning.batches import batching, groups
from prompt_tuning.checkpoints.run_state import RunStateStore
from prompt_tuning.config import (
    DataConfig,
    Experiment,
    ModelConfig,
    OptimizerConfig,
    PromptConfig,
    TrainConfig,
)
from prompt_tuning.model import sharding, t5
from prompt_tuning.training import optim
from prompt_tuning.training import step as steps

SAVED, STEPS = 2, 6
LENGTHS = {"inputs": 320, "targets": 2}
MODEL = ModelConfig(
    **{
        **CONFIG.__dict__,
        **{"num_encoder_layers": 1, "num_decoder_layers": 1, "dropout_rate": 0.1},
    }
)
EXPERIMENT = Experiment(
    model_dir="",
    initial_checkpoint_path="",
    model=MODEL,
    data=DataConfig(mixture_or_task_name="x", task_feature_lengths=LENGTHS, batch_size=8),
    train=TrainConfig(train_steps_relative=STEPS, length_groups=4),
)


def make_rows() -> batching.Rows:
    """Many short ones and a few long ones: a batch is cut where the mesh allows it."""
    rng = np.random.default_rng(0)
    lengths = rng.choice([7, 320], 64, p=[0.8, 0.2])
    inputs = [rng.integers(3, 384, n).astype(np.int32) for n in lengths]
    targets = [np.array([rng.choice([5, 9]), 1], np.int32) for _ in lengths]
    texts = [""] * len(inputs)
    return batching.Rows("x", inputs, targets, texts, texts, [{} for _ in texts], 0, 0)


@functools.cache
def mesh(data: int, model: int) -> jax.sharding.Mesh:
    return sharding.make_mesh(model, jax.devices()[: data * model])


@functools.cache
def on_mesh(place: tuple[int, int]):
    """First state, frozen part and programs."""
    shapes = random_params(MODEL)
    places = sharding.param_shardings(shapes, mesh(*place))
    params = {name: jax.device_put(np.asarray(x), places[name]) for name, x in shapes.items()}
    prompt = np.random.default_rng(1).uniform(-0.5, 0.5, (4, MODEL.embed_dim)).astype(np.float32)
    params["prompt"] = sharding.replicate(prompt, mesh(*place))
    trainable, frozen = optim.split_params(params, optim.PROMPT_RULES)
    recipe = steps.make_recipe(
        t5.T5(MODEL), PromptConfig(), OptimizerConfig(), EXPERIMENT.train, start_step=7
    )
    init_state = functools.partial(steps.init_state, optimizer=recipe.optimizer, step=7)
    state = jax.jit(init_state)(trainable)
    return state, frozen, steps.compile_step(recipe, state)


def go_on(place, cutting, state, first):
    """From the state of a step to the end: what follows each step, and the groups of each."""
    _, frozen, programs = on_mesh(place)
    state = jax.tree.map(lambda x: x.copy(), state)  # a step donates it
    followed, sizes = [], set()
    for step in range(first, STEPS):
        batch = batching.train_groups(
            [make_rows()], [1.0], cutting, seed=0, step=step, batch_size=8
        )
        placed = [sharding.shard_batch(group, mesh(*place)) for group in batch]
        state, metrics = steps.train_step(programs, state, frozen, placed)
        sizes.add(tuple(len(group["encoder_input_tokens"]) for group in batch))
        followed.append((np.asarray(state.trainable["prompt"]), float(metrics["loss"]), state))
        state = jax.tree.map(lambda x: x.copy(), state)
    return followed, sizes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second", "cut"),
    [
        ((1, 1), (4, 2), (4, 4, 4, 4)),  # groups of two rows, filled up
        # A mesh that could not cut, and one that could.
        ((8, 1), (1, 1), (8,)),
        ((1, 8), (4, 2), (4, 4, 4, 4)),
    ],
)
def test_a_run_goes_on_on_another_mesh(tmp_path, first, second, cut):
    """Equal bits when it is restored; then losses and prompt to 1e-5 of the largest of each."""
    cutting = cutting_of(EXPERIMENT, first[0])
    begun, sizes = go_on(first, cutting, on_mesh(first)[0], 0)
    assert sizes == {(8,)} if first == (8, 1) else (2, 2, 2, 2) in sizes
    with RunStateStore(tmp_path) as store:
        store.save(7 + SAVED, begun[SAVED - 1][2], {"cutting": groups.record_cutting(cutting)})
        state, meta = store.restore(on_mesh(second)[0])
    for one, other in zip(
        jax.tree.leaves(state), jax.tree.leaves(begun[SAVED - 1][2]), strict=True
    ):
        assert set(one.sharding.device_set) == set(mesh(*second).devices.flat)
        np.testing.assert_array_equal(one, other)
    cutting = cutting_of(EXPERIMENT, second[0], meta["cutting"])
    resumed, sizes = go_on(second, cutting, state, SAVED)
    assert cut in sizes
    for (prompt, loss, _), (wanted, wanted_loss, _) in zip(resumed, begun[SAVED:], strict=True):
        np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
        np.testing.assert_allclose(prompt, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
