"""One table between T5X's names of a T5's parameters and Hugging Face's.

PyTorch keeps a matrix as [out, in] and T5X as [in, out], so all but the embedding are transposed.
`huggingface.py` reads by this table, `conversion.py` reads and writes by it.
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
# Other names under which older files hold the embedding table again.
COPIES_OF_SHARED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# In the first T5's files, and read by nothing: cross-attention has no relative positions.
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


class Tensor(NamedTuple):
    """A parameter's name at Hugging Face, and whether it is transposed there."""

    name: str
    transposed: bool

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape at Hugging Face of a shape in T5X, or the other way round."""
        return shape[::-1] if self.transposed else shape


def to_huggingface(name: str) -> Tensor:
    """Where Hugging Face keeps T5X's parameter.

    Raises:
      ValueError: no T5 has a parameter of that name.

    >>> to_huggingface("decoder/layers_3/encoder_decoder_attention/out/kernel")
    Tensor(name='decoder.block.3.layer.1.EncDecAttention.o.weight', transposed=True)
    """
    for pattern, replacement, transposed in RULES:
        if match := re.fullmatch(pattern, name):
            return Tensor(match.expand(replacement), transposed)
    raise ValueError(f"no rule of RULES matches the parameter {name}.")


def count_layers(names: Iterable[str], stack: str) -> int:
    """How many layers of a stack Hugging Face's names are of.

    >>> count_layers(["encoder.block.0.layer.0.layer_norm.weight", UNUSED], "encoder")
    1
    """
    found = (re.match(rf"{stack}\.block\.(\d+)\.", name) for name in names)
    return max((int(match.group(1)) + 1 for match in found if match), default=0)


def is_transposed(name: str) -> bool:
    """Whether the tensor of that name at Hugging Face is transposed: all matrices but one are.

    >>> is_transposed("lm_head.weight"), is_transposed("shared.weight")
    (True, False)
    """
    return name != SHARED and "layer_norm" not in name
