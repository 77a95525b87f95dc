"""The settings of the model."""

from __future__ import annotations

from typing import Literal

from prompt_tuning.config.setting import check, setting, settings

Activation = Literal["gelu", "relu", "silu", "linear"]
Attending = Literal["xla", "cudnn"]
FROM_CHECKPOINT = "from_checkpoint"  # in a gin file, as a size of the model: the checkpoint's
_SIZE = "the model's size: set by a file of models/"


@settings
class ModelConfig:
    """The model: sizes and family of a T5, which a file of models/ sets.

    The field names are T5X's, the defaults T5 1.1's.
    """

    num_encoder_layers: int = setting("NUM_ENCODER_LAYERS", _SIZE, at_least=1)
    num_decoder_layers: int = setting("NUM_DECODER_LAYERS", _SIZE, at_least=1)
    num_heads: int = setting("NUM_HEADS", _SIZE, at_least=1)
    head_dim: int = setting("HEAD_DIM", _SIZE, at_least=1)
    embed_dim: int = setting("EMBED_DIM", _SIZE, at_least=1)
    mlp_dim: int = setting("MLP_DIM", _SIZE, at_least=1)
    num_embeddings: int = setting("NUM_EMBEDDINGS", _SIZE, at_least=1)
    mlp_activations: tuple[Activation, ...] = setting(
        "MLP_ACTIVATIONS", "T5 1.0: ('relu',)", default=("gelu", "linear")
    )
    logits_via_embedding: bool = setting(
        "LOGITS_VIA_EMBEDDING", "T5 1.0: True, its output is its embedding table", default=False
    )
    relative_attention_num_buckets: int = setting(
        "RELATIVE_ATTENTION_NUM_BUCKETS", "T5's", default=32, at_least=1
    )
    relative_attention_max_distance: int = setting(
        "RELATIVE_ATTENTION_MAX_DISTANCE", "T5's", default=128, at_least=1
    )
    dropout_rate: float = setting(
        "DROPOUT_RATE", "in training only", default=0.1, at_least=0, below=1
    )
    dtype: Literal["float32", "bfloat16"] = setting(
        "DTYPE",
        "of the activations and the frozen weights: 'float32' or 'bfloat16'",
        default="float32",
    )
    attention: Attending = setting(
        "ATTENTION",
        "of the encoder; 'cudnn': by cuDNN, on NVIDIA's GPUs in bfloat16 (docs/scale.md)",
        default="xla",
    )

    def __post_init__(self) -> None:
        check(
            len(self.mlp_activations) >= 1,
            "MLP_ACTIVATIONS is empty: ('gelu', 'linear') is T5 1.1's, ('relu',) T5 1.0's.",
        )
        fits = self.dtype == "bfloat16" and self.head_dim <= 128 and self.head_dim % 8 == 0
        check(
            self.attention == "xla" or fits,
            f"ATTENTION = 'cudnn' takes heads of at most 128, a multiple of 8, in bfloat16; found "
            f"HEAD_DIM = {self.head_dim} and DTYPE = '{self.dtype}'. Set DTYPE = 'bfloat16', or "
            "ATTENTION = 'xla'.",
        )
