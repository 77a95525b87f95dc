"""One measurement of upstream T5X's own training step, with the project's prompt in its network."""

from __future__ import annotations

import time
from typing import Any

STARTED = time.perf_counter()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from t5x import models, train_state, trainer  # noqa: E402
from t5x.examples.t5 import network  # noqa: E402
from workload import Workload, main, measure  # noqa: E402

from prompt_tuning.api import model_config  # noqa: E402
from prompt_tuning.batches import batching  # noqa: E402
from prompt_tuning.config import OptimizerConfig  # noqa: E402
from prompt_tuning.tasks.vocabulary import load_seqio_vocabulary  # noqa: E402
from prompt_tuning.training import optim  # noqa: E402
from prompt_tuning.upstream import plugin  # noqa: E402


def make_model(workload: Workload) -> models.EncoderDecoderModel:
    """T5X's model with a prompt in front of its encoder."""
    sizes = model_config(workload.size)  # type: ignore[arg-type]
    config = network.T5Config(
        vocab_size=sizes.num_embeddings,
        emb_dim=sizes.embed_dim,
        num_heads=sizes.num_heads,
        num_encoder_layers=sizes.num_encoder_layers,
        num_decoder_layers=sizes.num_decoder_layers,
        head_dim=sizes.head_dim,
        mlp_dim=sizes.mlp_dim,
        mlp_activations=sizes.mlp_activations,
        dropout_rate=0.0,
        dtype=workload.dtype,
    )
    start = np.zeros((workload.prompt, sizes.embed_dim), np.float32)
    vocabulary = load_seqio_vocabulary("bytes")
    optimizer = optim.make_optimizer(OptimizerConfig(), optim.PROMPT_RULES)
    return models.EncoderDecoderModel(
        module=plugin.PromptedTransformer(config=config, start=start),
        input_vocabulary=vocabulary,
        output_vocabulary=vocabulary,
        optimizer_def=plugin.optimizers.OptaxWrapper(optimizer),
    )


def run(workload: Workload) -> dict[str, Any]:
    """Steps as T5X's trainer makes them: every batch at full length."""
    model = make_model(workload)
    shapes = {
        "encoder_input_tokens": (workload.rows, workload.inputs),
        **{
            f"decoder_{name}": (workload.rows, workload.targets)
            for name in ("input_tokens", "target_tokens", "loss_weights")
        },
    }
    make = jax.jit(lambda key: model.get_initial_variables(key, shapes))
    state = train_state.FlaxOptimTrainState.create(model.optimizer_def, make(jax.random.key(0)))
    train = jax.jit(
        lambda state, batch: trainer.train_with_lr(
            state, batch, jnp.float32(0.3), jax.random.PRNGKey(0), model, None
        ),
        donate_argnums=0,
    )

    def one(number: int) -> None:
        nonlocal state
        inputs, targets = workload.tokens(number)
        batch = batching.pad_batch(inputs, targets, workload.inputs, workload.targets)
        state, metrics = train(state, dict(batch))
        jax.block_until_ready(metrics)

    found = measure(workload, one, STARTED)
    if stats := jax.devices()[0].memory_stats():  # a processor has none
        found["device_memory_bytes"] = float(stats["peak_bytes_in_use"])
    return found


if __name__ == "__main__":
    main(run)
