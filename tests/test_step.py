"""The training step: only the prompt moves, and nothing of the backbone's size is made."""

import dataclasses
import functools

import hlo_text
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import ONE_LAYER as CONFIG
from tiny_models import as_model, fit_to, random_batch, random_params, random_prompt

from prompt_tuning.api import model_config
from prompt_tuning.batches import batching
from prompt_tuning.checkpoints import load
from prompt_tuning.config import OptimizerConfig, PromptConfig, TrainConfig
from prompt_tuning.model import loss, t5
from prompt_tuning.model.loss import loss_fn
from prompt_tuning.model.prompt import Prompt
from prompt_tuning.planning import flops, hlo
from prompt_tuning.training import optim, step
from prompt_tuning.vocabularies.vocabulary import load_vocabulary
from prompt_tuning.world.generator import demo_rows

OPTIMIZER = OptimizerConfig()
MODEL = t5.T5(CONFIG)


def make_parts(trainable="prompt", config=CONFIG, length=5, **train):
    """The state, the frozen parameters and the recipe of a step."""
    params = {**random_params(config), "prompt": random_prompt(length, config)}
    trained, frozen = optim.split_params(params, optim.RULES[trainable])
    recipe = make_recipe(config, TrainConfig(trainable=trainable, **train))
    return step.init_state(trained, recipe.optimizer, 0), frozen, recipe


def make_recipe(config, train=None):
    return step.make_recipe(as_model(config), PromptConfig(), OPTIMIZER, train or TrainConfig())


def whole_step(recipe):
    return functools.partial(step.whole_step, recipe)


def gradient_of(recipe, state, frozen, batch, group=None):
    """Gradient of the prompt, and the sums."""
    folded = step.fold(recipe, state, frozen)
    start = step.zeros(recipe, state, folded)
    total = step.add(recipe, start, folded, state, frozen, batch, group)
    return total.prompt.rows, total.metrics


def test_ten_steps_move_the_prompt_and_nothing_else():
    state, frozen, recipe = make_parts()
    before = {name: np.asarray(value).copy() for name, value in frozen.items()}
    prompt = np.asarray(state.trainable["prompt"]).copy()
    train_step = jax.jit(whole_step(recipe), donate_argnums=0)
    losses = []
    for _ in range(10):
        state, metrics = train_step(state, frozen, random_batch())
        losses.append(float(metrics["loss"]))
    for name, value in frozen.items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    assert list(state.trainable) == ["prompt"]
    assert np.abs(state.trainable["prompt"] - prompt).max() > 0.1
    assert losses[-1] < losses[0]
    assert int(state.step) == 10
    assert train_step._cache_size() == 1


def test_no_gradient_slot_or_output_is_larger_than_the_prompt():
    state, frozen, recipe = make_parts()
    train_step = whole_step(recipe)
    outputs = jax.eval_shape(train_step, state, frozen, random_batch())
    size = state.trainable["prompt"].size
    assert max(leaf.size for leaf in jax.tree.leaves(outputs)) == size
    assert max(leaf.size for leaf in jax.tree.leaves(state.opt_state)) <= size


@pytest.mark.parametrize("name", ["prompt", pytest.param("model", marks=pytest.mark.slow)])
def test_the_step_costs_two_forward_passes(name):
    """Backward repeats every product with a weight once, and adds none for the weight itself.

    Only query x key and weights x value cost twice as much backward as forward, because the prompt
    reaches both of their operands; with short inputs at T5 small's width they hardly count, and
    `planning.flops` counts them to the last product.
    """
    config = dataclasses.replace(CONFIG, embed_dim=512, num_heads=6, head_dim=64, mlp_dim=1024)
    shapes = t5.param_shapes(config)
    prompt = jax.ShapeDtypeStruct((8, config.embed_dim), jnp.float32)
    batch = random_batch(rows=4, inputs=24, targets=4)

    def costs(prompt):
        trainable, frozen = optim.split_params({**shapes, "prompt": prompt}, optim.RULES[name])
        recipe = make_recipe(config, TrainConfig(trainable=name))
        state = jax.eval_shape(lambda t: step.init_state(t, recipe.optimizer, 0), trainable)

        def forward(state, frozen, batch):
            prompt, backbone = step.split_prompt({**frozen, **state.trainable})
            logits = loss.forward(recipe.model, backbone, Prompt(prompt["prompt"]), batch)
            return loss_fn(logits, batch)[0]

        whole = whole_step(recipe)
        texts = [
            jax.jit(f).lower(state, frozen, batch).compile().as_text() for f in (forward, whole)
        ]
        return [hlo_text.dot_flops(text) for text in texts]

    if name == "model":  # the check can fail: tuning the model costs a third pass
        once, whole = costs(jax.ShapeDtypeStruct((0, config.embed_dim), jnp.float32))
        assert whole > 2.7 * once
        return
    once, whole = costs(prompt)
    assert 1.9 * once < whole <= 2.02 * once
    cost = flops.count(config, rows=4, prompt=8, inputs=24, targets=4)
    assert (once, whole) == (cost.forward, cost.step)


def test_model_tuning_is_the_same_step_with_another_mask():
    state, frozen, recipe = make_parts("model", length=0)
    before = {name: np.asarray(value).copy() for name, value in state.trainable.items()}
    train_step = jax.jit(whole_step(recipe))
    state, _ = train_step(state, frozen, random_batch())
    assert set(state.trainable) == set(random_params(CONFIG))
    unchanged = [n for n, v in state.trainable.items() if (np.asarray(v) == before[n]).all()]
    assert unchanged == []


@pytest.mark.parametrize("rate", [pytest.param(0.0, marks=pytest.mark.slow), 0.1])
def test_five_and_five_steps_are_ten(rate):
    config = dataclasses.replace(CONFIG, dropout_rate=rate)
    train_step = jax.jit(whole_step(make_parts(config=config)[2]))
    ends = []
    for pause in (False, True):
        state, frozen, _ = make_parts(config=config)
        for i in range(10):
            if pause and i == 5:  # through the host, as a saved state goes
                state = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), state)
            state, _ = train_step(state, frozen, random_batch(seed=i))
        ends.append(state)
    for straight, resumed in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_array_equal(straight, resumed)


def cut(batch, parts):
    """Length groups of a batch, each padded to what its own rows need."""
    order = np.argsort(np.asarray(batch["encoder_input_tokens"] > 0).sum(1), kind="stable")
    groups = []
    for rows in np.split(order, parts):
        group = {name: np.asarray(value)[rows] for name, value in batch.items()}
        widths = {
            name: int((group[whole] > 0).sum(1).max())
            for name, whole in (("e", "encoder_input_tokens"), ("d", "decoder_target_tokens"))
        }
        groups.append({name: jnp.asarray(v[:, : widths[name[0]]]) for name, v in group.items()})
    return groups


@pytest.mark.parametrize("parts", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_length_groups_sum_to_the_gradient_of_the_padded_batch(parts):
    batch = random_batch(rows=8, inputs=24, targets=6)
    state, frozen, recipe = make_parts()
    whole, metrics = jax.jit(functools.partial(gradient_of, recipe))(state, frozen, batch)
    programs = step.compile_step(recipe)
    groups = cut(batch, parts)
    assert len({g["encoder_input_tokens"].shape for g in groups}) > 1
    folded = programs.fold(state, frozen)
    total = programs.zeros(state, folded)
    for number, group in enumerate(groups):
        total = programs.add(total, folded, state, frozen, group, jnp.int32(number))
    grad, expected = np.asarray(total.prompt.rows), np.asarray(whole)
    np.testing.assert_allclose(grad, expected, atol=1e-5 * np.abs(expected).max())
    for name, value in metrics.items():
        np.testing.assert_allclose(total.metrics[name], value, rtol=1e-5, err_msg=name)


def test_a_step_on_groups_is_the_step_on_the_batch():
    batch = random_batch(rows=8, inputs=24, targets=6)
    ends = []
    for parts in (1, 2):
        state, frozen, recipe = make_parts()
        programs = step.compile_step(recipe)
        for _ in range(3):
            state, metrics = step.train_step(programs, state, frozen, cut(batch, parts))
        ends.append((np.asarray(state.trainable["prompt"]), float(metrics["gradient_norm"])))
        assert int(state.step) == 3
        assert programs.whole._cache_size() == (parts == 1)
        assert programs.update._cache_size() == (parts == 2)
    np.testing.assert_allclose(ends[1][0], ends[0][0], atol=1e-4)
    np.testing.assert_allclose(ends[1][1], ends[0][1], rtol=1e-4)


def test_groups_drop_out_by_seed_step_and_number():
    config = dataclasses.replace(CONFIG, dropout_rate=0.5)
    state, frozen, recipe = make_parts(config=config)
    gradient = jax.jit(functools.partial(gradient_of, recipe))
    batch = random_batch()
    losses = [
        float(gradient(state, frozen, batch, jnp.int32(group))[1]["loss"]) for group in (0, 1, 0)
    ]
    assert losses[0] == losses[2] != losses[1]


def test_the_parts_of_a_step_write_into_what_they_are_given():
    """No second sum of gradients and no second state: both are donated, to the last array."""
    state, frozen, recipe = make_parts()
    programs = step.compile_step(recipe)
    folded = programs.fold(state, frozen)
    total = jax.eval_shape(programs.zeros, state, folded)
    add = programs.add.lower(total, folded, state, frozen, random_batch(), jnp.int32(0))
    update = programs.update.lower(state, frozen, total)
    for lowered, given in ((add, total), (update, state)):
        # But Adafactor's placeholders, which no program reads.
        arrays = sum(leaf.shape != (1,) for leaf in jax.tree.leaves(given))
        assert hlo.donated(lowered.compile().as_text()) == set(range(arrays))


def test_z_loss_and_label_smoothing_are_those_of_the_settings():
    state, frozen, recipe = make_parts(z_loss=0.05, label_smoothing=0.2)
    prompt, batch = jnp.array(state.trainable["prompt"]), random_batch()
    _, metrics = jax.jit(whole_step(recipe))(state, frozen, batch)

    logits = jax.jit(lambda p: loss.forward(MODEL, frozen, Prompt(p), batch))

    @functools.partial(jax.jit, static_argnames=("z_loss", "label_smoothing"))
    def loss_of(prompt, **settings):
        return loss_fn(logits(prompt), batch, **settings)[0]

    grad = jax.jit(jax.grad(lambda p: loss_of(p, z_loss=0.05, label_smoothing=0.2)))(prompt)
    np.testing.assert_allclose(
        metrics["loss"], loss_of(prompt, z_loss=0.05, label_smoothing=0.2), rtol=1e-5
    )
    np.testing.assert_allclose(metrics["gradient_norm"], jnp.linalg.norm(grad), rtol=1e-4)
    for settings in ({"z_loss": 0.05}, {"label_smoothing": 0.2}):
        assert abs(float(metrics["loss"]) / float(loss_of(prompt, **settings)) - 1.0) > 1e-2


def test_dropout_differs_between_steps_and_seeds():
    config = dataclasses.replace(CONFIG, dropout_rate=0.5)
    losses = []
    state, frozen, _ = make_parts(config=config)
    for seed, numbers in ((0, (0, 1, 0)), (1, (0,))):
        run = jax.jit(whole_step(make_recipe(config, TrainConfig(random_seed=seed))))
        for number in numbers:
            at = state._replace(step=jnp.int32(number))
            losses.append(float(run(at, frozen, random_batch())[1]["loss"]))
    assert losses[0] == losses[2]
    assert len(set(losses)) == 3


# PROMPT_AVERAGE and INPUT_NOISE ------------------------------------------------------------------


def test_the_average_is_of_all_steps_and_what_is_used():
    """Its weights are 1, d, d^2, ... from the newest on, and sum to 1."""
    state, frozen, recipe = make_parts(prompt_average=0.5)
    names = step.averaged_names(recipe, state.trainable)
    state = jax.jit(lambda t: step.init_state(t, recipe.optimizer, 0, names))(state.trainable)
    plain, _, without = make_parts()
    programs, others = step.compile_step(recipe), step.compile_step(without)
    np.testing.assert_array_equal(
        programs.fold_for_use(state, frozen).rows, state.trainable["prompt"]
    )  # before the first step
    prompts = []
    for seed in range(3):
        groups = [random_batch(seed=seed)] * (1 + seed % 2)  # one program, or its parts
        plain, _ = step.train_step(others, plain, frozen, groups)
        prompts.append(np.asarray(plain.trainable["prompt"]).copy())
        state, _ = step.train_step(programs, state, frozen, groups)
        np.testing.assert_allclose(state.trainable["prompt"], prompts[-1], rtol=1e-5, atol=1e-6)
        if seed == 1:  # through the host, as a saved state goes
            state = jax.tree.map(lambda x: jnp.array(np.asarray(x)), state)
        weights = 0.5 ** np.arange(seed, -1, -1)
        expected = np.tensordot(weights / weights.sum(), prompts, 1)
        rows = programs.fold_for_use(state, frozen).rows
        np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-6)
    assert plain.average == {}


def test_an_average_is_donated_too():
    state, frozen, recipe = make_parts(prompt_average=0.9)
    names = step.averaged_names(recipe, state.trainable)
    state = jax.eval_shape(
        lambda t: step.init_state(t, recipe.optimizer, 0, names), state.trainable
    )
    lowered = step.compile_step(recipe).whole.lower(state, frozen, random_batch())
    arrays = sum(leaf.shape != (1,) for leaf in jax.tree.leaves(state))
    assert len(hlo.donated(lowered.compile().as_text())) == arrays
    assert state.average.keys() == {"prompt"}


def noisy(trainable="prompt", length=5, **train):
    state, frozen, recipe = make_parts(trainable, length=length, **train)
    return state, frozen, jax.jit(functools.partial(gradient_of, recipe))


def test_input_noise_adds_the_divergence_of_noisy_predictions():
    settings = {"input_noise": 0.25, "input_noise_weight": 3.0, "random_seed": 8, "z_loss": 0.0}
    state, frozen, gradient = noisy(**settings)
    prompt, batch = state.trainable["prompt"], random_batch()
    grad, metrics = gradient(state, frozen, batch)

    table = np.asarray(frozen["token_embedder/embedding"], np.float64)
    key = jax.random.fold_in(jax.random.key(8), state.step)
    key = jax.random.fold_in(key, 2**31 - 2)
    draws = jax.random.normal(key, (*batch["encoder_input_tokens"].shape, CONFIG.embed_dim))
    noise = jnp.float32(0.25 * np.sqrt((table**2).mean())) * draws

    def objective(prompt):
        logits = [
            loss.forward(MODEL, frozen, Prompt(prompt), batch, noise=x) for x in (None, noise)
        ]
        p, log_p, log_q = jax.nn.softmax(logits[0]), *map(jax.nn.log_softmax, logits)
        kl = ((p * (log_p - log_q)).sum(-1) * batch["decoder_loss_weights"]).sum()
        return loss_fn(logits[0], batch, z_loss=0.0)[0] + 3.0 * kl, kl

    (expected, kl), slope = jax.jit(jax.value_and_grad(objective, has_aux=True))(prompt)
    assert float(kl) > 1e-3 * float(expected)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"] - metrics["cross_entropy"], 3 * kl, rtol=1e-3)
    np.testing.assert_allclose(grad, slope, atol=1e-5 * np.abs(slope).max())
    # The same draws for the same step, others for another.
    again = gradient(state, frozen, batch)[1]["loss"]
    later = gradient(state._replace(step=state.step + 1), frozen, batch)[1]["loss"]
    assert metrics["loss"] == again != later


def test_input_noise_drops_out_what_the_plain_prediction_does():
    """Without noise to speak of, the two predictions are one."""
    config = dataclasses.replace(CONFIG, dropout_rate=0.5)
    state, frozen, gradient = noisy(config=config, input_noise=1e-9, z_loss=0.0)
    _, metrics = gradient(state, frozen, random_batch())
    np.testing.assert_allclose(metrics["loss"], metrics["cross_entropy"], rtol=1e-6)


def test_the_model_is_tuned_with_input_noise_too():
    state, frozen, recipe = make_parts("model", length=0, input_noise=0.25, z_loss=0.0)
    after, metrics = jax.jit(whole_step(recipe))(state, frozen, random_batch())
    assert metrics["loss"] > 1.001 * metrics["cross_entropy"]
    assert all(np.isfinite(value).all() for value in after.trainable.values())


def prompt_gradient(dtype, attention="xla"):
    """Of a trained backbone, on its own rows, at a prompt of its own pieces, where JAX computes."""
    vocabulary = load_vocabulary("tiny")
    rows = demo_rows("tiny_mood", "test")[:16]
    inputs, targets = (
        [[*vocabulary.encode(row[key]), 1] for row in rows] for key in ("inputs", "targets")
    )
    widths = max(map(len, inputs)), max(map(len, targets))
    batch = jax.tree.map(jnp.asarray, dict(batching.pad_batch(inputs, targets, *widths)))
    config = dataclasses.replace(
        model_config("tiny"), dtype=dtype, dropout_rate=0.0, attention=attention
    )
    backbone, _ = load.read_backbone("tiny", config, dtype=dtype)
    prompt = backbone["token_embedder/embedding"][100:120].astype(jnp.float32)
    recipe = make_recipe(fit_to(config, jax.devices()[:1]))
    state = step.init_state({"prompt": prompt}, recipe.optimizer, 0)
    gradient, _ = jax.jit(functools.partial(gradient_of, recipe))(state, backbone, batch)
    assert gradient.dtype == jnp.float32
    return np.asarray(gradient).ravel()


@pytest.mark.slow  # test_t5.py has its logits, test_products.py its gradients
def test_bfloat16_moves_the_prompt_where_float32_does():
    half, whole = prompt_gradient("bfloat16"), prompt_gradient("float32")
    cosine = half @ whole / np.linalg.norm(half) / np.linalg.norm(whole)
    assert cosine > 0.999
