"""The table of T5X's and Hugging Face's names of a T5's parameters.

PyTorch stores a matrix as [out, in] and T5X as [in, out], so all but the embedding are transposed.
`huggingface.py` and `conversion.py` use this table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

# T5X's name, Hugging Face's, and whether the array is transposed. q, k, v, o are the first letters
# of query, key, value, out.
RULES: tuple[tuple[str, str, bool], ...] = (
    (r"token_embedder/embedding", r"shared.weight", False),
    (r"decoder/logits_dense/kernel", r"lm_head.weight", True),
    (
        r"(encoder|decoder)/relpos_bias/rel_embedding",
        r"\1.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        True,
    ),
    (r"(encoder|decoder)/\1_norm/scale", r"\1.final_layer_norm.weight", False),
    (
        r"encoder/layers_(\d+)/pre_attention_layer_norm/scale",
        r"encoder.block.\1.layer.0.layer_norm.weight",
        False,
    ),
    (
        r"encoder/layers_(\d+)/attention/([qkvo])\w+/kernel",
        r"encoder.block.\1.layer.0.SelfAttention.\2.weight",
        True,
    ),
    (
        r"encoder/layers_(\d+)/pre_mlp_layer_norm/scale",
        r"encoder.block.\1.layer.1.layer_norm.weight",
        False,
    ),
    (
        r"encoder/layers_(\d+)/mlp/(w\w+)/kernel",
        r"encoder.block.\1.layer.1.DenseReluDense.\2.weight",
        True,
    ),
    (
        r"decoder/layers_(\d+)/pre_self_attention_layer_norm/scale",
        r"decoder.block.\1.layer.0.layer_norm.weight",
        False,
    ),
    (
        r"decoder/layers_(\d+)/self_attention/([qkvo])\w+/kernel",
        r"decoder.block.\1.layer.0.SelfAttention.\2.weight",
        True,
    ),
    (
        r"decoder/layers_(\d+)/pre_cross_attention_layer_norm/scale",
        r"decoder.block.\1.layer.1.layer_norm.weight",
        False,
    ),
    (
        r"decoder/layers_(\d+)/encoder_decoder_attention/([qkvo])\w+/kernel",
        r"decoder.block.\1.layer.1.EncDecAttention.\2.weight",
        True,
    ),
    (
        r"decoder/layers_(\d+)/pre_mlp_layer_norm/scale",
        r"decoder.block.\1.layer.2.layer_norm.weight",
        False,
    ),
    (
        r"decoder/layers_(\d+)/mlp/(w\w+)/kernel",
        r"decoder.block.\1.layer.2.DenseReluDense.\2.weight",
        True,
    ),
)
EMBEDDING, HEAD = "token_embedder/embedding", "decoder/logits_dense/kernel"
SHARED, LM_HEAD = "shared.weight", "lm_head.weight"
# Names of further copies of the embedding table in older files.
COPIES_OF_SHARED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# A tensor in files of T5 1.0 that no model uses: cross-attention has no relative positions.
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


class Tensor(NamedTuple):
    """Hugging Face's name of a parameter, and whether it is transposed there."""

    name: str
    transposed: bool

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in Hugging Face's format of a shape in T5X's, and vice versa."""
        return shape[::-1] if self.transposed else shape


def to_huggingface(name: str) -> Tensor:
    """Hugging Face's tensor of T5X's parameter `name`.

    Raises:
      ValueError: a T5 has no parameter of that name.

    >>> to_huggingface("decoder/layers_3/encoder_decoder_attention/out/kernel")
    Tensor(name='decoder.block.3.layer.1.EncDecAttention.o.weight', transposed=True)
    """
    for pattern, replacement, transposed in RULES:
        if match := re.fullmatch(pattern, name):
            return Tensor(match.expand(replacement), transposed)
    raise ValueError(f"no rule of RULES matches the parameter {name}.")


def count_layers(names: Iterable[str], stack: str) -> int:
    """The number of layers of a stack, by Hugging Face's names.

    >>> count_layers(["encoder.block.0.layer.0.layer_norm.weight", UNUSED], "encoder")
    1
    """
    matches = (re.match(rf"{stack}\.block\.(\d+)\.", name) for name in names)
    return max((int(match.group(1)) + 1 for match in matches if match), default=0)


def is_transposed(name: str) -> bool:
    """Whether Hugging Face's tensor `name` is transposed: all matrices but the embedding are.

    >>> is_transposed("lm_head.weight"), is_transposed("shared.weight")
    (True, False)
    """
    return name != SHARED and "layer_norm" not in name
