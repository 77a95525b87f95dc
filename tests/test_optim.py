"""The mask covers every parameter, and the optimiser is T5X's Adafactor."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import CONFIG

from prompt_tuning.config import OptimizerConfig
from prompt_tuning.model import t5
from prompt_tuning.training import optim


def run(optimizer, start, grads):
    params = {"prompt": jnp.asarray(start)}
    state = optimizer.init(params)
    for grad in grads:
        updates, state = optimizer.update({"prompt": jnp.asarray(grad)}, state, params)
        params = optax.apply_updates(params, updates)
        yield np.asarray(params["prompt"])


@pytest.mark.parametrize(
    ("name", "start", "params"),
    [
        ("5x32", 0, "5x32/params"),
        ("150x128", 0, "150x128/params"),
        ("20x64_from_step_1100000", 1_100_000, "20x64_from_step_1100000/params"),
        ("20x64_from_step_1100000", 0, "20x64_from_step_0/params"),
    ],
)
def test_trajectories_equal_t5x(shared_dir, name, start, params):
    arrays = np.load(shared_dir / "goldens" / "t5x" / "adafactor.npz")
    optimizer = optim.make_optimizer(OptimizerConfig(), optim.PROMPT_RULES, start_step=start)
    ours = list(run(optimizer, arrays[f"{name}/init"], arrays[f"{name}/grads"]))
    np.testing.assert_allclose(ours, arrays[params], atol=1e-5)


def adafactor_by_hand(config, start, grads, first_step):
    """Shazeer and Stern (2018), algorithm 4, as T5X computes it without factoring."""
    value, moment = start.astype(np.float64), np.zeros(start.shape)
    for step, grad in enumerate(grads, first_step + 1):
        decay = 1.0 - step**-config.decay_rate
        moment = decay * moment + (1.0 - decay) * (np.square(grad.astype(np.float64)) + 1e-30)
        update = grad / np.sqrt(moment)
        update /= max(1.0, np.sqrt(np.mean(update**2)) / config.clipping_threshold)
        update *= config.learning_rate
        if config.multiply_by_parameter_scale:
            update *= max(np.sqrt(np.mean(value**2)), 1e-3)
        value = (1.0 - config.weight_decay) * value - update
        yield value


@pytest.mark.parametrize(
    "changes",
    [
        {"decay_rate": 0.5},
        {"clipping_threshold": 0.3},
        {"weight_decay": 0.1},
        {"multiply_by_parameter_scale": True},
        {"learning_rate": 0.02},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_setting_has_its_effect(changes):
    rng = np.random.default_rng(0)
    start = rng.normal(size=(4, 8)).astype(np.float32)
    grads = (rng.normal(size=(6, 4, 8)) * np.logspace(0, 1, 6)[:, None, None]).astype(np.float32)
    config = OptimizerConfig(**changes)
    optimizer = optim.make_optimizer(config, optim.PROMPT_RULES, start_step=7)
    expected = list(adafactor_by_hand(config, start, grads, 7))
    np.testing.assert_allclose(list(run(optimizer, start, grads)), expected, atol=1e-5)
    plain = list(adafactor_by_hand(OptimizerConfig(), start, grads, 7))
    assert np.abs(plain[-1] - expected[-1]).max() > 1e-2


def test_the_start_step_of_the_configuration_wins():
    rng = np.random.default_rng(0)
    start, grads = (
        rng.normal(size=(4, 8)),
        rng.normal(size=(30, 4, 8)) * np.logspace(0, -4, 30)[:, None, None],
    )
    late = optim.make_optimizer(OptimizerConfig(), optim.PROMPT_RULES, start_step=1_100_000)
    zero = optim.make_optimizer(
        OptimizerConfig(start_step=0), optim.PROMPT_RULES, start_step=1_100_000
    )
    plain = optim.make_optimizer(OptimizerConfig(), optim.PROMPT_RULES, start_step=0)
    start, grads = start.astype(np.float32), grads.astype(np.float32)
    ends = [list(run(tx, start, grads))[-1] for tx in (late, zero, plain)]
    np.testing.assert_array_equal(ends[1], ends[2])
    assert np.abs(ends[0] - ends[1]).max() > 1e-2


def test_an_update_has_the_root_mean_square_of_the_rate():
    rng = np.random.default_rng(0)
    start, grad = rng.normal(size=(2, 6, 16)).astype(np.float32)
    config = OptimizerConfig(learning_rate=0.3, weight_decay=0.0)
    optimizer = optim.make_optimizer(config, optim.PROMPT_RULES, start_step=1_100_000)
    end = next(run(optimizer, start, [grad]))
    np.testing.assert_allclose(np.sqrt(np.mean((end - start) ** 2)), 0.3, rtol=1e-3)


def test_warm_up_rises_to_the_rate():
    rate = optim.learning_rate(OptimizerConfig(learning_rate=0.4, warmup_steps=4))
    values = [float(rate(i)) for i in range(6)]
    np.testing.assert_allclose(values, [0.1, 0.2, 0.3, 0.4, 0.4, 0.4], rtol=1e-6)


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_frozen_parameters_get_zero_updates_and_no_slots(name):
    params = {
        "encoder": {"w": jnp.ones((4, 4)), "prompt": {"prompt": {"prompt": jnp.ones((2, 4))}}}
    }
    optimizer = optim.make_optimizer(OptimizerConfig(name=name), optim.PROMPT_RULES)
    state = optimizer.init(params)
    import jax

    sizes = [leaf.size for leaf in jax.tree.leaves(state)]
    assert max(sizes) == 8
    grads = jax.tree.map(lambda x: 3.0 * jnp.ones_like(x), params)
    updates, _ = optimizer.update(grads, state, params)
    np.testing.assert_array_equal(updates["encoder"]["w"], 0.0)
    assert np.abs(updates["encoder"]["prompt"]["prompt"]["prompt"]).min() > 0.01


def test_every_parameter_is_trained_or_frozen_by_name():
    names = [*t5.param_shapes(CONFIG), "prompt"]
    prompt = optim.label_names(names, optim.PROMPT_RULES)
    model = optim.label_names(names, optim.MODEL_RULES)
    assert [n for n in names if prompt[n] == "train"] == ["prompt"]
    assert [n for n in names if model[n] == "freeze"] == ["prompt"]
    with pytest.raises(ValueError, match="adapter/w"):
        optim.label_names([*names, "adapter/w"], optim.PROMPT_RULES)
