"""The sizes of published models by name, for Python; gin/models/ has the same for the commands."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from prompt_tuning.config import TINY, ConfigError, ModelConfig

Sizes = tuple[int, int, int, int, int, int]  # encoder, decoder, heads, head, embedding, MLP

_T5_1_1: dict[str, Sizes] = {
    "small": (8, 8, 6, 64, 512, 1024),
    "base": (12, 12, 12, 64, 768, 2048),
    "large": (24, 24, 16, 64, 1024, 2816),
    "xl": (24, 24, 32, 64, 2048, 5120),
    "xxl": (24, 24, 64, 64, 4096, 10240),
}
_T5_1_0: dict[str, Sizes] = {
    "small": (6, 6, 8, 64, 512, 2048),
    "base": (12, 12, 12, 64, 768, 3072),
    "large": (24, 24, 16, 64, 1024, 4096),
    "3b": (24, 24, 32, 128, 1024, 16384),
    "11b": (24, 24, 128, 128, 1024, 65536),
}
_BYT5: dict[str, Sizes] = {
    "small": (12, 4, 6, 64, 1472, 3584),
    "base": (18, 6, 12, 64, 1536, 3968),
    "large": (36, 12, 16, 64, 1536, 3840),
    "xl": (36, 12, 32, 64, 2560, 6720),
    "xxl": (36, 12, 64, 64, 4672, 12352),
}


@dataclasses.dataclass(frozen=True)
class Family:
    """Models that differ only in their sizes."""

    sizes: Mapping[str, Sizes]
    num_embeddings: int
    form: Mapping[str, Any] = dataclasses.field(default_factory=dict)


FAMILIES: Mapping[str, Family] = {
    "t5_1_1": Family(_T5_1_1, 32128),
    "t5_1_0": Family(_T5_1_0, 32128, {"mlp_activations": ("relu",), "logits_via_embedding": True}),
    "flan_t5": Family(_T5_1_1, 32128),
    "mt5": Family(_T5_1_1, 250112),
    "byt5": Family(_BYT5, 384),
}
NAMES = tuple(f"{name}_{size}" for name, family in FAMILIES.items() for size in family.sizes)


def model_config(name: str) -> ModelConfig:
    """The sizes of a published model; "base" is T5 1.1's, "tiny" the bundled model's.

    Raises:
      ConfigError: there is no model of that name.

    >>> model_config("xl").embed_dim, model_config("byt5_small").num_decoder_layers
    (2048, 4)
    """
    if name == TINY:
        from prompt_tuning.world.assets import TINY_CONFIG

        return TINY_CONFIG
    full = f"t5_1_1_{name}" if name in _T5_1_1 else name
    if full not in NAMES:
        near = difflib.get_close_matches(full, NAMES, n=3) or NAMES
        raise ConfigError(
            f"no model is called {name!r}. Did you mean one of: {', '.join(near)}? For other sizes "
            "make a prompt_tuning.config.ModelConfig."
        )
    family, size = full.rsplit("_", 1)
    encoder, decoder, heads, head, embed, mlp = FAMILIES[family].sizes[size]
    return ModelConfig(
        num_encoder_layers=encoder,
        num_decoder_layers=decoder,
        num_heads=heads,
        head_dim=head,
        embed_dim=embed,
        mlp_dim=mlp,
        num_embeddings=FAMILIES[family].num_embeddings,
        **FAMILIES[family].form,
    )
