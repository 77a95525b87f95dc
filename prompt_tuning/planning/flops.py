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


def count(config: ModelConfig, *, rows: int, prompt: int, inputs: int, targets: int) -> Cost:
    """The cost of a batch that is padded to `inputs` and `targets` tokens.

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
    attention = 2 * (layers_e * s * s * joined + layers_d * (t * t * joined + t * s * width))
    # Layer 0: the projections of self-attention, its products (twice), the query of
    # cross-attention, the key kernel if it is absorbed into the query, and the query's gradient.
    unreached = t * (5 + absorbed) * projection + joined * 4 * t * t + width * t * s
    return Cost(*(2 * rows * n for n in (weights, attention, unreached)))
