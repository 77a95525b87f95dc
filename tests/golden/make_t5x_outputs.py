"""Makes t5x_outputs.npz: what upstream T5X computes on random weights and random rows.

Run where T5X can be imported (docs/t5x.md). Made with google-research/t5x at
cc342d419ec3e3e9c4bf1df33c82330cafdc1e16, jax 0.10.2, flax 0.12.8, on CPU in float32. The sizes
differ from one another wherever they can, so that no two of them can be confused.
"""

import functools
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import seqio
from t5x import adafactor, decoding, models
from t5x.examples.t5 import network

ROWS, INPUTS, TARGETS, BEAMS = 4, 11, 7, 3
CONFIG = network.T5Config(
    vocab_size=384,
    dtype=jnp.float32,
    emb_dim=24,
    num_heads=3,
    head_dim=4,
    num_encoder_layers=3,
    num_decoder_layers=1,
    mlp_dim=40,
    mlp_activations=("gelu", "linear"),
    dropout_rate=0.0,
    logits_via_embedding=False,
)


def sequences(rng, length):
    tokens = rng.integers(3, 259, (ROWS, length))
    lengths = np.array([length, length - 1, 3, 1])
    tokens[np.arange(ROWS), lengths - 1] = 1
    tokens[np.arange(length)[None, :] >= lengths[:, None]] = 0
    return tokens.astype(np.int32)


def main():
    rng = np.random.default_rng(0)
    vocabulary = seqio.ByteVocabulary()
    optimizer = adafactor.Adafactor(
        learning_rate=0.3,
        decay_rate=0.8,
        multiply_by_parameter_scale=False,
        weight_decay_rate=1e-5,
        logical_factor_rules=adafactor.standard_logical_factor_rules(),
    )
    model = models.EncoderDecoderModel(
        module=network.Transformer(config=CONFIG),
        input_vocabulary=vocabulary,
        output_vocabulary=vocabulary,
        optimizer_def=optimizer,
        decode_fn=functools.partial(decoding.beam_search, alpha=0.6),
        z_loss=1e-4,
    )
    targets = sequences(rng, TARGETS)
    batch = {
        "encoder_input_tokens": sequences(rng, INPUTS),
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets > 0).astype(np.int32),
    }
    shapes = {name: value.shape for name, value in batch.items()}
    params = model.get_initial_variables(jax.random.key(0), shapes)["params"]
    params = flax.core.unfreeze(params)
    # Norm scales other than one, so that a forgotten scale shows.
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.uniform(0.5, 1.5, x.shape), jnp.float32) if x.ndim == 1 else x,
        params,
    )
    out = {f"in/{name}": value for name, value in batch.items()}
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    out |= {f"param/{name}": np.asarray(value) for name, value in flat.items()}
    out["logits"] = model._compute_logits(params, batch, dropout_rng=None)
    out["scores"] = model.score_batch(params, batch)
    loss, grads = jax.value_and_grad(lambda p: model.loss_fn(p, batch, None)[0])(params)
    out["loss"] = loss
    flat = flax.traverse_util.flatten_dict(grads, sep="/")
    out |= {f"grad/{name}": np.asarray(value) for name, value in flat.items()}
    decodes, aux = model.predict_batch_with_aux(
        params, batch, num_decodes=BEAMS, return_all_decodes=True
    )
    out["beams/tokens"], out["beams/scores"] = decodes, aux["scores"]
    out |= trajectories(rng, optimizer)
    path = Path(__file__).with_name("t5x_outputs.npz")
    np.savez_compressed(path, **{name: np.asarray(value) for name, value in out.items()})


def trajectories(rng, optimizer):
    """Adafactor from steps 0 and 1,100,000, on a small tensor and on one that it factors."""
    out = {}
    for rows, width, start in ((6, 8, 0), (6, 8, 1_100_000), (130, 128, 1_100_000)):
        name = f"adafactor/{rows}x{width}_from_{start}"
        # Two steps, and inputs rounded to eighths, keep the file small.
        grads = np.round(rng.normal(size=(2, rows, width)) * 8).astype(np.float32) / 8
        init = np.round(rng.normal(size=(rows, width)) * 8) / 8
        params = {"prompt": jnp.asarray(init, jnp.float32)}
        definition = adafactor.Adafactor(
            learning_rate=0.3,
            decay_rate=0.8,
            multiply_by_parameter_scale=False,
            weight_decay_rate=1e-5,
        )
        state = definition.init_state(params)
        state = state.replace(step=jnp.int32(start))
        out[f"{name}/init"] = params["prompt"]
        steps = []
        for grad in grads:
            params, state = definition.apply_gradient(
                definition.hyper_params, params, state, {"prompt": jnp.asarray(grad)}
            )
            steps.append(np.asarray(params["prompt"]))
        out[f"{name}/grads"], out[f"{name}/params"] = grads, np.stack(steps)
    return out


if __name__ == "__main__":
    main()
