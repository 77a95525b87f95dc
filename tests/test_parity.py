"""Model, loss, decoding and optimiser against T5X's outputs on the project's own random weights.

The same is checked on T5X's reference outputs in test_t5, test_prompt, test_decode and test_optim;
this file needs nothing that does not come with the project (golden/make_t5x_outputs.py).
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prompt_tuning.config import ModelConfig, OptimizerConfig
from prompt_tuning.decoding import beam
from prompt_tuning.model import t5
from prompt_tuning.model.loss import forward, loss_fn, sequence_log_likelihood
from prompt_tuning.model.prompt import no_prompt
from prompt_tuning.training import optim

CONFIG = ModelConfig(
    num_encoder_layers=3,
    num_decoder_layers=1,
    num_heads=3,
    head_dim=4,
    embed_dim=24,
    mlp_dim=40,
    num_embeddings=384,
    dropout_rate=0.0,
)
NO_PROMPT, MODEL = no_prompt(CONFIG), t5.T5(CONFIG)


@pytest.fixture(scope="module")
def t5x():
    return dict(np.load(Path(__file__).parent / "golden" / "t5x_outputs.npz"))


def part(arrays, prefix):
    return {k[len(prefix) :]: jnp.asarray(v) for k, v in arrays.items() if k.startswith(prefix)}


def close(ours, theirs, name=""):
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * scale, rtol=0, err_msg=name)


def test_the_parameter_tree_is_t5x(t5x):
    ours = {name: shape.shape for name, shape in t5.param_shapes(CONFIG).items()}
    assert ours == {name: value.shape for name, value in part(t5x, "param/").items()}


def test_logits_loss_and_gradients(t5x):
    params, batch = part(t5x, "param/"), part(t5x, "in/")

    def loss(params):
        logits = forward(MODEL, params, NO_PROMPT, batch)
        return loss_fn(logits, batch, z_loss=1e-4)[0], logits

    (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    close(logits, t5x["logits"])
    close(value, t5x["loss"])
    close(sequence_log_likelihood(logits, batch), t5x["scores"])
    for name, grad in grads.items():
        close(grad, t5x[f"grad/{name}"], name)


def test_beams(t5x):
    params, tokens = part(t5x, "param/"), jnp.asarray(t5x["in/encoder_input_tokens"])
    valid = tokens > 0
    encoded = t5.apply(
        t5.T5(CONFIG), params, "encode", t5.apply(t5.T5(CONFIG), params, "embed", tokens), valid
    )
    _, beams, length = t5x["beams/tokens"].shape
    cache = t5.apply(t5.T5(CONFIG), params, "init_cache", encoded, valid, length)

    def step(last, cache, index):
        return t5.apply(t5.T5(CONFIG), params, "decode_step", last, cache, index)

    sequences, scores = beam.beam_search(
        step, cache, len(tokens), beams=beams, length=length, rules=beam.t5x_rules()
    )
    np.testing.assert_array_equal(sequences, t5x["beams/tokens"])
    close(scores, t5x["beams/scores"])


@pytest.mark.parametrize(
    ("shape", "start"), [("6x8", 0), ("6x8", 1_100_000), ("130x128", 1_100_000)]
)
def test_adafactor(t5x, shape, start):
    name = f"adafactor/{shape}_from_{start}"
    optimizer = optim.make_optimizer(OptimizerConfig(), optim.PROMPT_RULES, start_step=start)
    params = {"prompt": jnp.asarray(t5x[f"{name}/init"])}
    state = optimizer.init(params)
    for grad, expected in zip(t5x[f"{name}/grads"], t5x[f"{name}/params"], strict=True):
        updates, state = optimizer.update({"prompt": jnp.asarray(grad)}, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["prompt"], expected, atol=1e-5)
