"""The cost of a step of prompt tuning: floating-point operations of its matrix products.

A test compares it with the compiled step. The backward pass repeats every product with a weight
once, for the input, because a frozen weight has no gradient. It repeats every product of two
activations twice, because both depend on the prompt. In the first decoder layer only the part after
the keys and values of cross-attention depends on the prompt.
"""

from __future__ import annotations

from typing import NamedTuple

from prompt_tuning.config import ModelConfig
from prompt_tuning.model.attention import absorbs


class Cost(NamedTuple):
    """Floating point operations, two for a multiply-add."""

    weights: int  # products with a weight, forward
    attention: int  # query x key and attention weights x value, forward
    unreached: int  # the part of the first decoder layer that has no backward pass

    @property
    def forward(self) -> int:
        """One forward pass."""
        return self.weights + self.attention

    @property
    def step(self) -> int:
        """Forward and the gradient of the prompt."""
        return 2 * self.weights + 3 * self.attention - self.unreached


class Prefixes(NamedTuple):
    """How many keys and values stand in front of those of each attention."""

    encoder: int = 0
    decoder: int = 0
    cross: int = 0


NO_PREFIXES = Prefixes()


def count(
    config: ModelConfig,
    *,
    rows: int,
    prompt: int,
    inputs: int,
    targets: int,
    prefixes: Prefixes = NO_PREFIXES,
) -> Cost:
    """The cost of a batch that is padded to `inputs` and `targets` tokens.

    The backward pass ends where nothing before it depends on the prompt or the `prefixes`.

    >>> small = ModelConfig(num_encoder_layers=8, num_decoder_layers=8, num_heads=6, head_dim=64,
    ...                     embed_dim=512, mlp_dim=1024, num_embeddings=32128)
    >>> cost = count(small, rows=8, prompt=100, inputs=128, targets=8)
    >>> round(cost.forward / 1e9, 1), round(cost.step / cost.forward, 3)
    (80.7, 2.078)
    """
    s, t = prompt + inputs, targets
    d, joined, f = config.embed_dim, config.num_heads * config.head_dim, config.mlp_dim
    layers_e, layers_d = config.num_encoder_layers, config.num_decoder_layers
    projection = d * joined  # query, key, value or out, of one position
    mlp = (len(config.mlp_activations) + 1) * d * f
    encoder = layers_e * s * (4 * projection + mlp)
    # In the decoder: four projections of self-attention, query and out of cross-attention. Its key
    # and value kernels are multiplied with the targets if they are absorbed, else with the encoder.
    absorbed = absorbs(config, t, s)
    crossing, width = (t, config.num_heads * d) if absorbed else (s, joined)
    decoder = layers_d * (t * (6 * projection + mlp) + crossing * 2 * projection)
    weights = encoder + decoder + t * d * config.num_embeddings
    seen = layers_d * (t * (t + prefixes.decoder + prefixes.cross) * joined + t * s * width)
    attention = 2 * (layers_e * s * (s + prefixes.encoder) * joined + seen)
    # The decoder's layer 0. Only the queries of self-attention and its input, if it has a prefix.
    unreached = t * 3 * projection + joined * t * (t + prefixes.decoder)
    if not prefixes.decoder:
        # All of self-attention (its products twice), the query of cross-attention, the key kernel
        # if it is absorbed into the query, and the query's gradient.
        unreached += t * (2 + absorbed) * projection + joined * 3 * t * t
        unreached += width * t * s + t * prefixes.cross * joined
    if prefixes.encoder and not prompt:  # the encoder's layer 0
        unreached += s * 3 * projection + s * (s + prefixes.encoder) * joined
    if not (prefixes.encoder or prompt):  # all of the encoder, and what the decoder reads of it
        unreached += encoder + 4 * layers_e * s * s * joined
        if absorbed:
            unreached += layers_d * 2 * t * s * width
            if not prefixes.decoder:  # layer 0 reads it, but has no gradient for what it reads
                unreached += t * projection + t * s * width
        else:
            products = 0 if prefixes.cross else 2 * t * s * joined
            unreached += layers_d * (s * 2 * projection + products)
    return Cost(*(2 * rows * n for n in (weights, attention, unreached)))


def count_fold(config: ModelConfig, length: int) -> int:
    """What a shared prompt of so many rows adds to a step, once for the whole batch.

    It is encoded, and encoded again with its gradient, though the compiler computes the first
    queries, keys and logits once. The keys and values of its memory, in every decoder layer, are
    computed once, and their gradient once.
    """
    encoded = count(config, rows=1, prompt=length, inputs=0, targets=0)
    joined = config.num_heads * config.head_dim
    memory = 2 * config.num_decoder_layers * length * 2 * config.embed_dim * joined
    once = 2 * (3 * length * config.embed_dim * joined + length * length * joined)
    return encoded.forward + encoded.step - once + 2 * memory
