"""From a batch to the loss and its parts: the function that training differentiates.

The batch holds T5X's four arrays: `encoder_input_tokens` int32[B, T], `decoder_input_tokens`,
`decoder_target_tokens` int32[B, L] and `decoder_loss_weights` float32[B, L]. Packed rows have
`encoder_segment_ids` and `decoder_segment_ids` as well.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from prompt_tuning.model import prompt as prompts
from prompt_tuning.model import t5
from prompt_tuning.model.prompt import Encoded, Prompt

Metrics = dict[str, Float[Array, ""]]
MOST_LABELS = 16  # of a row, scored at a time
METRICS = ("loss", "cross_entropy", "z_loss", "correct", "tokens")  # what `loss_fn` sums


class NotRankableError(FloatingPointError):
    """Log probabilities of answers are not finite."""


def forward(
    model: t5.T5,
    backbone: t5.Params,
    prompt: Prompt,
    batch: Mapping[str, Array],
    which: Int[Array, "B"] | None = None,
    *,
    noise: Float[Array, "B T D"] | None = None,
    dropout_key: PRNGKeyArray | None = None,
) -> Float[Array, "B L V"]:
    """Logits of every target position. With a `dropout_key` both stacks drop out.

    `noise` is added to the embedded input.
    """
    encoder_key, decoder_key = (
        jax.random.split(dropout_key) if dropout_key is not None else (None, None)
    )
    encoded = prompts.encode(
        model,
        backbone,
        prompt,
        batch["encoder_input_tokens"],
        which,
        segments=batch.get("encoder_segment_ids"),
        noise=noise,
        dropout_key=encoder_key,
    )
    return prompts.decode(
        model,
        backbone,
        prompt,
        batch["decoder_input_tokens"],
        encoded,
        which,
        target_valid=batch.get("decoder_segment_ids", batch["decoder_target_tokens"] > 0),
        dropout_key=decoder_key,
    )


def cross_entropy(
    logits: Float[Array, "B L V"],
    targets: Int[Array, "B L"],
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[Float[Array, "B L"], Float[Array, "B L"]]:
    """Cross entropy of every target (without z-loss), and its z-loss `z * log(Z)^2`.

    With label smoothing the entropy of the smoothed target is taken off, so that a perfect
    prediction costs 0 (as in T5X).
    """
    log_z = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    entropy = log_z - chosen
    if label_smoothing:
        vocab = logits.shape[-1]
        confidence, low = 1.0 - label_smoothing, label_smoothing / (vocab - 1)
        spread = vocab * log_z - logits.sum(axis=-1) - entropy
        floor = -(confidence * jnp.log(confidence) + (vocab - 1) * low * jnp.log(low + 1e-20))
        entropy = confidence * entropy + low * spread - floor
    return entropy, z_loss * jnp.square(log_z)


@jax.named_scope("loss")
def loss_fn(
    logits: Float[Array, "B L V"],
    batch: Mapping[str, Array],
    *,
    z_loss: float = 1e-4,
    label_smoothing: float = 0.0,
) -> tuple[Float[Array, ""], Metrics]:
    """The batch's loss, summed over target tokens and not normalised (T5X's default), and sums.

    The metrics are sums as well (`loss`, `cross_entropy`, `z_loss`, `correct`, `tokens`), so that
    batches and devices can be added before dividing.
    """
    targets, weights = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
    weights = weights.astype(jnp.float32)
    entropy, z = cross_entropy(logits, targets, z_loss=z_loss, label_smoothing=label_smoothing)
    correct = (logits.argmax(axis=-1) == targets) * weights
    loss = ((entropy + z) * weights).sum()
    metrics = {
        "loss": loss,
        "cross_entropy": (entropy * weights).sum(),
        "z_loss": (z * weights).sum(),
        "correct": correct.sum(),
        "tokens": weights.sum(),
    }
    return loss, metrics


def draw_noise(
    backbone: t5.Params, tokens: Int[Array, "B T"], size: float, key: PRNGKeyArray
) -> Float[Array, "B T D"]:
    """Normal draws for the embedded tokens, `size` times the RMS of the embedding table."""
    table = backbone["token_embedder/embedding"].astype(jnp.float32)
    rms = jax.lax.stop_gradient(jnp.sqrt(jnp.mean(jnp.square(table))))
    return size * rms * jax.random.normal(key, (*tokens.shape, table.shape[1]), jnp.float32)


@jax.named_scope("divergence")
def divergence(
    logits: Float[Array, "B L V"], other: Float[Array, "B L V"], batch: Mapping[str, Array]
) -> Float[Array, ""]:
    """KL(p || q) of the predictions of two logits, summed over target tokens as the loss is."""
    p, q = jax.nn.log_softmax(logits), jax.nn.log_softmax(other)
    kl = optax.losses.kl_divergence_with_log_targets(q, p)
    return (kl * batch["decoder_loss_weights"].astype(jnp.float32)).sum()


def sequence_log_likelihood(
    logits: Float[Array, "B L V"], batch: Mapping[str, Array]
) -> Float[Array, "B"]:
    """Sum of log p(target | input) over the tokens of every row: what ranking compares."""
    entropy, _ = cross_entropy(logits, batch["decoder_target_tokens"])
    return -(entropy * batch["decoder_loss_weights"]).sum(axis=-1)


def label_log_likelihoods(
    model: t5.T5,
    backbone: t5.Params,
    prompt: Prompt,
    encoded: Encoded,
    labels: Int[Array, "C L"],
    which: Int[Array, "B"] | None = None,
) -> Float[Array, "B C"]:
    """Log p(label | row) of every label for every row, from the encoder's output.

    A row is encoded once, and its labels are scored together, but no more than MOST_LABELS at a
    time: each has logits of its own.
    """
    rows, classes = encoded.states.shape[0], labels.shape[0]
    if classes > MOST_LABELS:
        padded = jnp.pad(labels, ((0, -classes % MOST_LABELS), (0, 0)))
        parts = padded.reshape(-1, MOST_LABELS, labels.shape[1])
        scores = jax.lax.map(
            lambda part: label_log_likelihoods(model, backbone, prompt, encoded, part, which), parts
        )
        return jnp.moveaxis(scores, 0, 1).reshape(rows, -1)[:, :classes]
    # Every row is a part of its own, and all the labels are of its only row.
    own = jnp.zeros((rows, classes), jnp.int32)
    targets = jnp.tile(labels, (rows, 1))
    scores = pair_log_likelihoods(model, backbone, prompt, encoded, own, targets, which)
    return scores.reshape(rows, classes)


def pair_log_likelihoods(
    model: t5.T5,
    backbone: t5.Params,
    prompt: Prompt,
    encoded: Encoded,
    rows: Int[Array, "G C"],
    targets: Int[Array, "G*C L"],
    which: Int[Array, "B"] | None = None,
) -> Float[Array, "G*C"]:
    """Log p(target | row) of targets of the encoded rows; 0 if a target has no tokens.

    `rows` counts the encoded rows in each of G parts, as for `T5.decode`; `which` names the member
    of each encoded row.
    """
    inputs = jnp.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    logits = prompts.decode(
        model, backbone, prompt, inputs, encoded, which, target_valid=targets > 0, rows=rows
    )
    batch = {"decoder_target_tokens": targets, "decoder_loss_weights": targets > 0}
    return sequence_log_likelihood(logits, batch)
