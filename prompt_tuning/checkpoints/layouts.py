"""The location of every parameter of a T5X checkpoint, in all layouts that T5X has written.

`t5x.py` reads the arrays from there. There are three layouts:

* T5X's own: a msgpack file `checkpoint`, whose leaves are arrays, or TensorStore specs of zarr
  folders in the same folder. Specs of 2021 name other storage drivers and have their path under
  another key; only the path is used, so they are no special case;
* one msgpack file with every array inside;
* Orbax's: `state/_METADATA` lists the leaves, which are in `state/`, in an OCDBT database or in a
  zarr folder each. Older checkpoints list them in a msgpack tree of `PLACEHOLDER://name`.
"""

from __future__ import annotations

import ast
import dataclasses
import gzip
import json
import math
import os
import posixpath
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import tensorstore as ts
from flax import serialization

from prompt_tuning.checkpoints.architecture import describe_adapter
from prompt_tuning.config import ConfigError
from prompt_tuning.runtime.storage import (
    Folder,
    describe_lfs_pointer,
    explain,
    open_folder,
    reason_of,
)

INDEX = "checkpoint"  # T5X's msgpack file
METADATA = "_METADATA"  # Orbax's list of leaves
_PLACEHOLDER = "PLACEHOLDER://"
_TF_MAGIC = b"model_checkpoint_path"
LARGE = 2**26  # bytes of a chunk
_MALFORMED = (ValueError, KeyError, TypeError, SyntaxError, AttributeError, RecursionError)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a checkpoint, not read yet: `value` if it is inline, else `spec`."""

    what: str
    folder: Folder
    spec: dict[str, Any] | None = None
    value: np.ndarray | None = None

    def open(self, context: ts.Context) -> ts.Future[ts.TensorStore] | ts.TensorStore:
        """A TensorStore of the array, which reads slices on demand."""
        if self.spec is None:
            return ts.array(np.asarray(self.value))
        # Without fill_missing_data_reads=False a missing chunk would be read as zeros. With
        # recheck_cached_data=False all shards of a chunk use one cached copy.
        options = {"open": True, "fill_missing_data_reads": False, "recheck_cached_data": False}
        return ts.open({**self.spec, **options}, read=True, context=context)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The parameters, step and optimizer slots of a checkpoint, without mutable variables."""

    folder: Folder
    params: Mapping[str, Leaf]  # by name: "encoder/layers_0/attention/query/kernel"
    step: Leaf
    # Optimizer slots by name, "encoder/.../kernel/v_row", for pre-training that is resumed.
    slots: Mapping[str, Leaf] = dataclasses.field(default_factory=dict)


def find_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint at a path: a folder of any layout, or a single msgpack file.

    Raises:
      ConfigError: there is none, or its index is malformed.
    """
    folder = open_folder(path)
    state = Folder(_join(folder.path, "state"), folder.bucket)
    if (index := folder.read(INDEX)) is not None:
        return _from_msgpack(index, folder)
    for place in (folder, state):
        if (metadata := place.read(METADATA)) is not None:
            return _from_orbax(metadata, place)
    if (index := state.read(INDEX)) is not None:
        return _from_msgpack(index, state)
    parent = Folder(posixpath.dirname(folder.path), folder.bucket)
    name = posixpath.basename(folder.path)
    if name and (index := parent.read(name)) is not None:
        return _from_msgpack(index, parent, name)
    raise ConfigError(_absent(folder))


def _join(*parts: str) -> str:
    return "/".join(part for part in parts if part)


def _pointer(folder: Folder) -> str:
    return describe_lfs_pointer(folder.path) if folder.bucket is None else ""


def _absent(folder: Folder) -> str:
    if folder.bucket is None and (adapter := describe_adapter(Path(folder.path))):
        return adapter
    steps = folder.numbered("checkpoint_")
    message = (
        f"there is no T5X checkpoint at {folder.url}: it has neither {INDEX!r} (T5X's msgpack "
        f"index) nor 'state/{METADATA}' (Orbax), and is no msgpack file itself."
    )
    if not steps:
        return message + " Give the path of a checkpoint_<step> folder."
    shown = ", ".join(f"{folder.url}/{step}" for step in steps[-5:])
    return message + f" It is a folder of {len(steps)} checkpoints. Give one of them: {shown}."


def _from_msgpack(data: bytes, folder: Folder, name: str = INDEX) -> Checkpoint:
    where = f"{folder.url}/{name}"
    if data.startswith(_TF_MAGIC):
        raise ConfigError(
            f"{where} is part of a TensorFlow checkpoint. Expected T5X's format. The released T5 "
            "models are available in it: gs://t5-data/pretrained_models/t5x/."
        )
    try:
        tree: Any = serialization.msgpack_restore(data)
        root = next((tree[key] for key in ("optimizer", "_optimizer") if key in tree), tree)
        target, step = root["target"], root["state"]["step"]
        flat = _flatten(target)
    except (*_MALFORMED, msgpack.exceptions.UnpackException) as error:
        raise ConfigError(
            _pointer(folder)
            or f"{where} is not the index of a T5X checkpoint, or it is truncated or damaged "
            f"({_describe_error(error)}). Copy the checkpoint again."
        ) from error
    database = _uses_database(flat, folder)
    params = {
        param: _leaf(value, param, folder, database)
        for param, value in flat.items()
        if value is not None
    }
    if not params:
        raise ConfigError(
            f"{where} lists no parameters: its 'target' is empty. Give a checkpoint with a model."
        )
    states = root["state"].get("param_states") or {}
    slots = {
        name: _leaf(value, f"state/param_states/{name}", folder, database)
        for name, value in _flatten(states).items()
        if value is not None
    }
    return Checkpoint(folder, params, _leaf(step, "state/step", folder, database), slots)


def _describe_error(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it has no {error.args[0]!r:.80}"
    return f"{reason_of(error):.200}"


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}/{key}" if prefix else str(key)
        if isinstance(value, Mapping) and not {"driver", "kvstore"} <= set(value):
            flat.update(_flatten(value, name))
        else:
            flat[name] = value
    return flat


def _uses_database(flat: Mapping[str, Any], folder: Folder) -> bool:
    """Whether the placeholders of a tree are arrays in an OCDBT database."""
    if not any(isinstance(value, str) for value in flat.values()):
        return False
    return folder.read("manifest.ocdbt") is not None


def _leaf(value: Any, name: str, folder: Folder, database: bool) -> Leaf:
    what = f"{name} of the checkpoint {folder.url}"
    if isinstance(value, str) and value.startswith(_PLACEHOLDER):
        path = value.removeprefix(_PLACEHOLDER)
        return Leaf(what, folder, spec=_zarr(folder, path, what, database=database))
    if isinstance(value, Mapping):
        store = value["kvstore"]
        path = value.get("path") or (store.get("path") if isinstance(store, Mapping) else None)
        if value["driver"] != "zarr" or not isinstance(path, str):
            raise ConfigError(f"{what} is stored as {value!r}: expected a zarr array with a path.")
        return Leaf(what, folder, spec=_zarr(folder, path, what))
    if isinstance(value, (np.ndarray, np.generic, int, float)):
        return Leaf(what, folder, value=np.asarray(value))
    raise ConfigError(f"{what} is neither an array nor a TensorStore spec: found {value!r:.80}.")


def _zarr(
    folder: Folder, path: str, what: str, *, database: bool = False, driver: str = "zarr"
) -> dict[str, Any]:
    """The spec of a zarr array at a path relative to the checkpoint's folder."""
    path = path.rstrip("/")
    if not path or path.startswith("/") or ".." in path.split("/"):
        raise ConfigError(
            f"{what} has the path {path!r}, outside of the checkpoint's folder. Expected a path in "
            "it. Copy the checkpoint again."
        )
    if database:
        store = {"driver": "ocdbt", "base": folder.spec(), "path": f"{path}/"}
    else:
        store = folder.spec(path)
    return {"driver": driver, "kvstore": store}


def _from_orbax(data: bytes, folder: Folder) -> Checkpoint:
    try:
        metadata = json.loads(data)
        keys = [
            tuple(str(part) for part in ast.literal_eval(key))
            for key, entry in metadata["tree_metadata"].items()
            if not entry["value_metadata"].get("skip_deserialize")  # set for None and empty nodes
        ]
        driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
        database = metadata.get("use_ocdbt", True)
    except _MALFORMED as error:
        raise ConfigError(
            _pointer(folder)
            or f"{folder.url}/{METADATA} is not Orbax's list of a checkpoint's arrays, or it is "
            f"truncated or damaged ({_describe_error(error)}). Copy the checkpoint again."
        ) from error

    def leaf(key: tuple[str, ...]) -> Leaf:
        what = f"{'/'.join(key)} of the checkpoint {folder.url}"
        spec = _zarr(folder, ".".join(key), what, database=database, driver=driver)
        return Leaf(what, folder, spec=spec)

    if ("state", "step") not in keys or not any(key[0] == "target" for key in keys):
        raise ConfigError(
            f"{folder.url} is not a T5X checkpoint: {METADATA} lists no 'state/step' or no "
            "'target/...'."
        )
    params = {"/".join(key[1:]): leaf(key) for key in keys if key[0] == "target"}
    slots = {"/".join(key[2:]): leaf(key) for key in keys if key[:2] == ("state", "param_states")}
    return Checkpoint(folder, params, leaf(("state", "step")), slots)


def open_leaves(leaves: Mapping[str, Leaf], context: ts.Context) -> dict[str, ts.TensorStore]:
    """The opened leaves; they are opened concurrently, which is faster on a remote store.

    Raises:
      ConfigError: an array's metadata is missing or damaged.
    """
    opening = {name: leaf.open(context) for name, leaf in leaves.items()}

    def opened(name: str) -> ts.TensorStore:
        store = opening[name]
        if isinstance(store, ts.TensorStore):
            return store
        check_chunk_size(store.result(), leaves[name].what)
        return store.result()

    return {
        name: explain(lambda name=name: opened(name), leaf.folder, leaf.what)
        for name, leaf in leaves.items()
    }


# What TensorStore does not check --------------------------------------------------------------


def check_chunk_size(store: ts.TensorStore, what: str) -> None:
    """Checks that a chunk is small, or at most twice as large as its array.

    TensorStore allocates a whole chunk; if it cannot, it aborts the process.

    Raises:
      ConfigError: a chunk is too large.
    """
    itemsize = store.dtype.numpy_dtype.itemsize
    chunk = math.prod(side or 1 for side in store.chunk_layout.read_chunk.shape or ()) * itemsize
    array = math.prod(store.shape) * itemsize
    if chunk > LARGE and chunk > 2 * array:
        raise ConfigError(
            f"cannot read {what}: it has chunks of {chunk} bytes for an array of {array} bytes. "
            "The checkpoint is damaged: copy it again."
        )


def check_gzipped(store: ts.TensorStore, what: str) -> None:
    """Decompresses every gzipped chunk of an array on a local disk.

    TensorStore stops reading a chunk once it has all numbers, so it notices neither a missing end
    nor a wrong checksum.

    Raises:
      ConfigError: a file is truncated, or its checksum differs.
    """
    spec: dict[str, Any] = store.spec().to_json()
    compressor = spec.get("metadata", {}).get("compressor")
    place = spec.get("kvstore", {})
    if place.get("driver") != "file" or not isinstance(compressor, dict):
        return
    if spec.get("driver") != "zarr" or compressor.get("id") != "gzip":
        return
    for file in Path(place["path"]).iterdir():
        if not re.fullmatch(r"\d+([./]\d+)*", file.name):
            continue
        try:
            with gzip.open(file) as chunk:
                while chunk.read(2**20):
                    pass
        except (OSError, EOFError, zlib.error) as error:
            raise ConfigError(
                describe_lfs_pointer(file)
                or f"cannot read {what}: {os.fspath(file)} is truncated, or its checksum differs. "
                "The checkpoint is damaged, or was copied incompletely: copy it again."
            ) from error
