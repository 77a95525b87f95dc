"""Downloads models and vocabularies from Hugging Face: hf://organisation/name[@revision]."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from prompt_tuning.config import ConfigError

SCHEME = "hf://"
_ADDRESS = re.compile(r"hf://(?P<name>[^/@]+/[^/@]+)(@(?P<revision>.+))?")
# Weights in other formats than safetensors are not downloaded.
VOCABULARY = ("*.json", "*.model", "*.txt")
MODEL = (*VOCABULARY, "*.safetensors")


def download(address: str, files: Sequence[str] = MODEL) -> Path:
    """The local folder of hf://organisation/name[@revision], whose `files` are downloaded once.

    Raises:
      ConfigError: the address is malformed, huggingface_hub is not installed, or the download
        failed.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise ConfigError(
            "expected hf://organisation/name or hf://organisation/name@revision, found "
            f"{address!r}."
        )
    try:
        import huggingface_hub
    except ImportError as error:
        raise ConfigError(
            f"{address}: huggingface_hub, which downloads from Hugging Face, is not installed. "
            "`pip install huggingface_hub`, or download the model and give its folder."
        ) from error
    try:
        return Path(
            huggingface_hub.snapshot_download(
                match["name"],
                revision=match["revision"],
                allow_patterns=list(files),
                ignore_patterns=["*/*"],
            )
        )
    except Exception as error:  # the libraries below it raise many types
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        reason = re.sub(r"\b(?:Got: )?\w+Error: ", "", first)
        raise ConfigError(
            f"{address} cannot be downloaded and is not in the local cache ({reason}). Check the "
            "name and the network, or download the model elsewhere and give its folder."
        ) from error
