"""Settings as plain JSON values and back: how they are stored, hashed and compared."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from prompt_tuning.config.runs import ModelRun
from prompt_tuning.config.setting import check

ConfigT = TypeVar("ConfigT")


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as plain JSON values: what is stored, hashed and compared."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, (tuple, list)):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    return plain(config)


# Where a run's files lie and on what devices it ran: not what the experiment is.
_PLACES = frozenset(
    {
        "model_dir",
        "initial_checkpoint_path",
        "num_model_partitions",
        "verify_checkpoint",
        "data.vocabulary",
        "data.tfds_data_dir",
        "data.files.train_file",
        "data.files.eval_file",
        "prompt.file",
    }
)


def config_hash(experiment: ModelRun) -> str:
    """The SHA-256, in hexadecimal, of all settings but the places of files and devices.

    (Backbone and vocabulary have hashes of their own, of their contents.)
    """
    settings = {k: v for k, v in flatten(to_dict(experiment)).items() if k not in _PLACES}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted names.

    >>> flatten({"train": {"z_loss": 0.1}, "model_dir": "runs"})
    {'train.z_loss': 0.1, 'model_dir': 'runs'}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def from_dict(cls: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """The inverse of `to_dict`.

    Raises:
      ConfigError: a field is unknown or missing.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - known)
    check(not unknown, f"{cls.__name__} has no field {unknown}; it has {sorted(known)}.")

    def typed(name: str, value: Any) -> Any:
        hint = hints[name]
        return from_dict(hint, value) if dataclasses.is_dataclass(hint) else value  # type: ignore[arg-type]

    return cls(**{name: typed(name, value) for name, value in values.items()})
