"""The training step: only the prompt moves, and nothing of the backbone's size is made."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CONFIG, random_batch, random_params, random_prompt

from prompt_tuning.api import model_config
from prompt_tuning.batches import batching
from prompt_tuning.checkpoints import load
from prompt_tuning.config import ModelConfig, OptimizerConfig, TrainConfig
from prompt_tuning.model import t5
from prompt_tuning.model.loss import loss_fn
from prompt_tuning.model.products import fit_to
from prompt_tuning.planning import flops, hlo
from prompt_tuning.training import optim, step
from prompt_tuning.vocabularies.vocabulary import load_vocabulary
from prompt_tuning.world.generator import demo_rows

OPTIMIZER = OptimizerConfig()


def make_parts(rules=optim.PROMPT_RULES, config=CONFIG, length=5):
    params = {**random_params(config), "prompt": random_prompt(length, config)}
    trainable, frozen = optim.split_params(params, rules)
    optimizer = optim.make_optimizer(OPTIMIZER, rules)
    return step.init_state(trainable, optimizer, 0), frozen, optimizer


def test_ten_steps_move_the_prompt_and_nothing_else():
    state, frozen, optimizer = make_parts()
    before = {name: np.asarray(value).copy() for name, value in frozen.items()}
    prompt = np.asarray(state.trainable["prompt"]).copy()
    train_step = jax.jit(step.make_train_step(CONFIG, TrainConfig(), optimizer), donate_argnums=0)
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
    state, frozen, optimizer = make_parts()
    train_step = step.make_train_step(CONFIG, TrainConfig(), optimizer)
    outputs = jax.eval_shape(train_step, state, frozen, random_batch())
    size = state.trainable["prompt"].size
    assert max(leaf.size for leaf in jax.tree.leaves(outputs)) == size
    assert max(leaf.size for leaf in jax.tree.leaves(state.opt_state)) <= size


def test_the_step_costs_two_forward_passes():
    """Backward repeats every product with a weight once, and adds none for the weight itself.

    Only query x key and weights x value cost twice as much backward as forward, because the prompt
    reaches both of their operands; with short inputs at T5 small's width they hardly count, and
    `planning.flops` counts them to the last product.
    """
    config = dataclasses.replace(CONFIG, embed_dim=512, num_heads=6, head_dim=64, mlp_dim=1024)
    shapes = t5.param_shapes(config)
    prompt = jax.ShapeDtypeStruct((8, config.embed_dim), jnp.float32)
    batch = random_batch(rows=4, inputs=24, targets=4)

    def costs(rules, trainable_name, prompt):
        trainable, frozen = optim.split_params({**shapes, "prompt": prompt}, rules)
        optimizer = optim.make_optimizer(OPTIMIZER, rules)
        state = jax.eval_shape(lambda t: step.init_state(t, optimizer, 0), trainable)
        train = TrainConfig(trainable=trainable_name)

        def forward(state, frozen, batch):
            return loss_fn(step.forward_split(config, state.trainable, frozen, batch), batch)[0]

        whole = step.make_train_step(config, train, optimizer)
        texts = [
            jax.jit(f).lower(state, frozen, batch).compile().as_text() for f in (forward, whole)
        ]
        return [hlo.dot_flops(text) for text in texts]

    once, whole = costs(optim.PROMPT_RULES, "prompt", prompt)
    assert 1.9 * once < whole <= 2.02 * once
    cost = flops.count(config, rows=4, prompt=8, inputs=24, targets=4)
    assert (once, whole) == (cost.forward, cost.step)
    # The check can fail: tuning the model costs a third pass.
    nothing = jax.ShapeDtypeStruct((0, config.embed_dim), jnp.float32)
    once, whole = costs(optim.MODEL_RULES, "model", nothing)
    assert whole > 2.7 * once


def test_model_tuning_is_the_same_step_with_another_mask():
    state, frozen, optimizer = make_parts(optim.MODEL_RULES, length=0)
    train = TrainConfig(trainable="model")
    before = {name: np.asarray(value).copy() for name, value in state.trainable.items()}
    train_step = jax.jit(step.make_train_step(CONFIG, train, optimizer))
    state, _ = train_step(state, frozen, random_batch())
    assert set(state.trainable) == set(random_params())
    unchanged = [n for n, v in state.trainable.items() if (np.asarray(v) == before[n]).all()]
    assert unchanged == []


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_five_and_five_steps_are_ten(rate):
    config = ModelConfig(**{**CONFIG.__dict__, "dropout_rate": rate})
    train_step = None
    ends = []
    for pause in (False, True):
        state, frozen, optimizer = make_parts(config=config)
        train_step = jax.jit(step.make_train_step(config, TrainConfig(), optimizer))
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


@pytest.mark.parametrize("parts", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_length_groups_sum_to_the_gradient_of_the_padded_batch(parts):
    batch = random_batch(rows=8, inputs=24, targets=6)
    gradient = step.make_gradient(CONFIG, TrainConfig())
    state, frozen, optimizer = make_parts()
    whole, metrics = jax.jit(gradient)(state, frozen, batch, None)
    programs = step.compile_step(CONFIG, TrainConfig(), optimizer)
    groups = cut(batch, parts)
    assert len({g["encoder_input_tokens"].shape for g in groups}) > 1
    total = programs.zeros(state)
    for number, group in enumerate(groups):
        total = programs.add(total, state, frozen, group, jnp.int32(number))
    grad, expected = np.asarray(total[0]["prompt"]), np.asarray(whole["prompt"])
    np.testing.assert_allclose(grad, expected, atol=1e-5 * np.abs(expected).max())
    for name, value in metrics.items():
        np.testing.assert_allclose(total[1][name], value, rtol=1e-5, err_msg=name)


def test_a_step_on_groups_is_the_step_on_the_batch():
    batch = random_batch(rows=8, inputs=24, targets=6)
    ends = []
    for parts in (1, 4):
        state, frozen, optimizer = make_parts()
        programs = step.compile_step(CONFIG, TrainConfig(), optimizer)
        for _ in range(3):
            state, metrics = step.run_step(programs, state, frozen, cut(batch, parts))
        ends.append((np.asarray(state.trainable["prompt"]), float(metrics["gradient_norm"])))
        assert int(state.step) == 3
        assert programs.whole._cache_size() == (parts == 1)
        assert programs.update._cache_size() == (parts == 4)
    np.testing.assert_allclose(ends[1][0], ends[0][0], atol=1e-4)
    np.testing.assert_allclose(ends[1][1], ends[0][1], rtol=1e-4)


def test_groups_drop_out_by_seed_step_and_number():
    config = ModelConfig(**{**CONFIG.__dict__, "dropout_rate": 0.5})
    state, frozen, _ = make_parts(config=config)
    gradient = jax.jit(step.make_gradient(config, TrainConfig()))
    batch = random_batch()
    losses = [
        float(gradient(state, frozen, batch, jnp.int32(group))[1]["loss"]) for group in (0, 1, 0)
    ]
    assert losses[0] == losses[2] != losses[1]


def test_the_parts_of_a_step_write_into_what_they_are_given():
    """No second sum of gradients and no second state: both are donated, to the last array."""
    state, frozen, optimizer = make_parts()
    programs = step.compile_step(CONFIG, TrainConfig(), optimizer)
    total = jax.eval_shape(programs.zeros, state)
    add = programs.add.lower(total, state, frozen, random_batch(), jnp.int32(0))
    update = programs.update.lower(state, total)
    for lowered, given in ((add, total), (update, state)):
        # But Adafactor's placeholders, which no program reads.
        arrays = sum(leaf.shape != (1,) for leaf in jax.tree.leaves(given))
        assert hlo.donated(lowered.compile().as_text()) == set(range(arrays))


def test_z_loss_and_label_smoothing_are_those_of_the_settings():
    train = TrainConfig(z_loss=0.05, label_smoothing=0.2)
    state, frozen, optimizer = make_parts()
    prompt, batch = jnp.array(state.trainable["prompt"]), random_batch()
    _, metrics = jax.jit(step.make_train_step(CONFIG, train, optimizer))(state, frozen, batch)

    logits = jax.jit(lambda p: step.forward_split(CONFIG, {"prompt": p}, frozen, batch))

    def loss(prompt, **settings):
        return loss_fn(logits(prompt), batch, **settings)[0]

    grad = jax.jit(jax.grad(lambda p: loss(p, z_loss=0.05, label_smoothing=0.2)))(prompt)
    np.testing.assert_allclose(
        metrics["loss"], loss(prompt, z_loss=0.05, label_smoothing=0.2), rtol=1e-5
    )
    np.testing.assert_allclose(metrics["gradient_norm"], jnp.linalg.norm(grad), rtol=1e-4)
    for settings in ({"z_loss": 0.05}, {"label_smoothing": 0.2}):
        assert abs(float(metrics["loss"]) / float(loss(prompt, **settings)) - 1.0) > 1e-2


def test_dropout_differs_between_steps_and_seeds():
    config = ModelConfig(**{**CONFIG.__dict__, "dropout_rate": 0.5})
    losses = []
    state, frozen, optimizer = make_parts(config=config)
    for seed, numbers in ((0, (0, 1, 0)), (1, (0,))):
        run = jax.jit(step.make_train_step(config, TrainConfig(random_seed=seed), optimizer))
        for number in numbers:
            at = state._replace(step=jnp.int32(number))
            losses.append(float(run(at, frozen, random_batch())[1]["loss"]))
    assert losses[0] == losses[2]
    assert len(set(losses)) == 3


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
    optimizer = optim.make_optimizer(OPTIMIZER, optim.PROMPT_RULES)
    state = step.init_state({"prompt": prompt}, optimizer, 0)
    gradient_of = jax.jit(step.make_gradient(fit_to(config, jax.devices()[:1]), TrainConfig()))
    found, _ = gradient_of(state, backbone, batch, None)
    assert found["prompt"].dtype == jnp.float32
    return np.asarray(found["prompt"]).ravel()


def test_bfloat16_moves_the_prompt_where_float32_does():
    half, whole = prompt_gradient("bfloat16"), prompt_gradient("float32")
    cosine = half @ whole / np.linalg.norm(half) / np.linalg.norm(whole)
    assert cosine > 0.999
