"""Small random models and batches that many tests share: real objects, not stand-ins."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning.batches import groups
from prompt_tuning.checkpoints import t5x
from prompt_tuning.config import Experiment, ModelConfig
from prompt_tuning.model import loss, t5
from prompt_tuning.model.device import choose_device
from prompt_tuning.model.prompt import Prompt
from prompt_tuning.pretraining import examples

# The sizes of the T5X reference outputs (../shared/goldens/t5x).
CONFIG = ModelConfig(
    num_encoder_layers=2,
    num_decoder_layers=2,
    num_heads=4,
    head_dim=8,
    embed_dim=32,
    mlp_dim=64,
    num_embeddings=384,
    dropout_rate=0.0,
)
ONE_LAYER = dataclasses.replace(CONFIG, num_encoder_layers=1, num_decoder_layers=1)
MODEL = t5.T5(CONFIG)


def as_model(config: ModelConfig | t5.T5) -> t5.T5:
    return config if isinstance(config, t5.T5) else t5.T5(config)


def as_prompt(rows: Any) -> Prompt:
    return rows if isinstance(rows, Prompt) else Prompt(jnp.asarray(rows))


def fit_to(config: ModelConfig, devices: Iterable[Any], platform: str = "") -> t5.T5:
    """The model as it is computed on these devices."""
    return t5.T5(config, choose_device(config, devices, platform))


def forward(config: Any, params: Any, prompt: Any, batch: Any, **settings: Any) -> jax.Array:
    return _forward(as_model(config), params, as_prompt(prompt), batch, **settings)


# Compiled: operation by operation, each is a program of its own.
_forward = jax.jit(loss.forward, static_argnums=0)
apply_t5 = jax.jit(t5.apply, static_argnums=(0, 2))
_init_params = jax.jit(t5.init_params, static_argnums=0)


def random_params(config: ModelConfig = CONFIG, seed: int = 0) -> dict[str, jax.Array]:
    return _init_params(config, jax.random.key(seed))


def write_backbone(folder: Path, config: ModelConfig, step: int) -> str:
    """The path of a T5X checkpoint of a random backbone."""
    path = str(folder / f"checkpoint_{step}")
    t5x.write_t5x(path, random_params(config), step)
    return path


def random_prompt(length: int, config: ModelConfig = CONFIG, seed: int = 1) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (length, config.embed_dim))


def random_batch(
    rows: int = 4, inputs: int = 12, targets: int = 6, seed: int = 0
) -> dict[str, jax.Array]:
    """Rows of different lengths; token 1 ends each, 0 is padding."""
    rng = np.random.default_rng(seed)

    def sequences(length: int) -> np.ndarray:
        tokens = rng.integers(3, CONFIG.num_embeddings, (rows, length))
        lengths = rng.integers(1, length + 1, rows)
        lengths[0] = length
        tokens[np.arange(rows), lengths - 1] = 1
        tokens[np.arange(length)[None, :] >= lengths[:, None]] = 0
        return tokens.astype(np.int32)

    encoder, decoder = sequences(inputs), sequences(targets)
    return {
        "encoder_input_tokens": jnp.asarray(encoder),
        "decoder_input_tokens": jnp.asarray(np.pad(decoder, ((0, 0), (1, 0)))[:, :-1]),
        "decoder_target_tokens": jnp.asarray(decoder),
        "decoder_loss_weights": jnp.asarray((decoder > 0).astype(np.float32)),
    }


def cutting_of(experiment: Experiment, *args: Any) -> groups.Cutting:
    return groups.make_cutting(experiment.train, experiment.data, *args)


def load_data(run: Experiment, *, train: bool = True) -> Any:
    from prompt_tuning.session import setup

    labels = run.prompt.class_labels
    return setup.load_data(run.data, run.eval, run.model, class_labels=labels, train=train)


def evaluator_of(run: Experiment, mesh: jax.sharding.Mesh) -> Any:
    from prompt_tuning.evaluation.evaluate import Evaluator

    model = t5.T5(run.model, choose_device(run.model, mesh.devices.flat))
    return Evaluator(model, mesh, run.eval, run.data)


def join_documents(name, documents):
    """Documents in one array."""
    lengths = [len(ids) for ids in documents]
    tokens = np.concatenate([np.asarray(ids, np.int32) for ids in documents] or [np.zeros(0)])
    return examples.Documents(name, tokens.astype(np.int32), np.cumsum([0, *lengths]))
