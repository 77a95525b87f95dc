"""Where the bundled backbone lies, and its sizes. Works from a checkout and from a wheel."""

from __future__ import annotations

from pathlib import Path

from prompt_tuning.config import ConfigError, ModelConfig

FOLDER = Path(__file__).parent / "tiny"
VOCABULARY_PIECES = 412  # 512 with the 100 sentinels, so that 8 devices can share them
EXTRA_IDS = 100

TINY_CONFIG = ModelConfig(
    num_encoder_layers=2,
    num_decoder_layers=2,
    num_heads=4,
    head_dim=32,
    embed_dim=128,
    mlp_dim=256,
    num_embeddings=VOCABULARY_PIECES + EXTRA_IDS,
    dropout_rate=0.0,
)


def tiny_checkpoint() -> str:
    """The folder of the bundled T5X checkpoint; its name ends with its step."""
    found = sorted(FOLDER.glob("checkpoint_*"))
    if len(found) != 1:
        raise ConfigError(
            f"expected one checkpoint_<step> folder in {FOLDER}, found {len(found)}: the "
            "installation is incomplete. Reinstall the package."
        )
    return str(found[0])


def tiny_vocabulary() -> str:
    """The bundled SentencePiece model; the 100 sentinels follow its last piece."""
    return str(FOLDER / "sentencepiece.model")
