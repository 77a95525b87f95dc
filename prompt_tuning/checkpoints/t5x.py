"""Reads and writes T5X checkpoints, as flat dictionaries of arrays by T5X's names.

`layouts.py` finds the location of each array. Loading is exact: the names and shapes must be the
model's. Each device reads its own shard, in the run's dtype. `load.py` reads backbones with it;
model tuning and pre-training write their checkpoints with it.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import difflib
import itertools
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from flax import serialization, traverse_util
from jax.experimental import multihost_utils
from jax.typing import DTypeLike
from jaxtyping import Array

from prompt_tuning.checkpoints.layouts import (
    INDEX,
    Checkpoint,
    Leaf,
    check_gzipped,
    find_checkpoint,
    open_leaves,
)
from prompt_tuning.config import ConfigError
from prompt_tuning.runtime.replace_folder import replace_folder
from prompt_tuning.runtime.storage import explain

PathLike = str | os.PathLike[str]
Index = tuple[slice, ...]

NAMES_SHOWN = 5  # names shown in an error
BYTES_IN_FLIGHT = 2**30  # limit of bytes on the host between storage and devices
CHUNK_BYTES = 2**24  # small enough that most shards of a matrix are whole chunks
CHUNKS_IN_FLIGHT = 4  # concurrent writes
_FORMAT_VERSION = 3  # T5X's, since June 2021
_READ = {"file_io_concurrency": {"limit": 64}}


def read_t5x(
    path: PathLike, shapes: Mapping[str, jax.ShapeDtypeStruct], **how: Any
) -> tuple[dict[str, Array], int]:
    """All parameters and the step of a checkpoint; the arguments are those of `iter_t5x`."""
    checkpoint = find_checkpoint(path)  # once, because its index may be on a remote store
    return dict(iter_t5x(checkpoint, shapes, **how)), _step(checkpoint.step)


def iter_t5x(
    checkpoint: Checkpoint,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    *,
    dtype: DTypeLike | None = None,
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
    unread: Collection[str] = (),
) -> Iterator[tuple[str, Array]]:
    """The parameters of a checkpoint that are named by `shapes`, one by one.

    Loading is exact: the checkpoint must have all parameters of `shapes` and no others, except
    those of `unread`. Each device receives only its own shard; without `shardings` the first device
    receives everything. Without `dtype` the dtypes are those of `shapes`.

    Raises:
      ConfigError: there is no such checkpoint, its names or shapes are not exactly the model's, it
        is damaged, or it cannot be reached.
    """
    context = ts.Context(_READ)
    leaves = {name: leaf for name, leaf in checkpoint.params.items() if name in shapes}
    stores = open_leaves(leaves, context)
    stored: dict[str, tuple[tuple[int, ...], Any]] = {
        name: (tuple(store.shape), store.dtype.numpy_dtype) for name, store in stores.items()
    }
    others = set(checkpoint.params) - set(shapes) - set(unread)
    unknown = {name: ((), np.dtype("float32")) for name in others}
    needed = {name: tuple(shape.shape) for name, shape in shapes.items()}
    check_tree(checkpoint.folder.url, {**stored, **unknown}, needed)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    requests = []
    for name in sorted(shapes):
        wanted = np.dtype(shapes[name].dtype if dtype is None else dtype)
        store = ts.cast(stores[name], wanted.name)
        sharding = device if shardings is None else shardings[name]
        requests.append(_Request(name, leaves[name], store, sharding, wanted))
    yield from _restore(requests)


def read_slots(path: PathLike, like: Mapping[str, Array]) -> dict[str, Array]:
    """The optimizer's arrays named by `like`, in its shapes, dtypes and shardings.

    Names are T5X's: a parameter's name, followed by `/v`, `/v_row`, `/v_col` or `/m`.

    Raises:
      ConfigError: the checkpoint does not have exactly these arrays.
    """
    checkpoint = find_checkpoint(path)
    stores = open_leaves(checkpoint.slots, ts.Context(_READ))
    problems = sorted(set(like) ^ set(stores)) or sorted(
        name for name in like if tuple(stores[name].shape) != tuple(like[name].shape)
    )
    if problems:
        raise ConfigError(
            f"the checkpoint {checkpoint.folder.url} does not have the optimizer state of this "
            f"run: expected {len(like)} arrays of T5X's Adafactor, it has {len(stores)} (first "
            f"difference: {problems[0]}). Set RESTORE_OPTIMIZER = False to begin with empty "
            "moments."
        )
    requests = [
        _Request(
            name,
            checkpoint.slots[name],
            ts.cast(stores[name], np.dtype(value.dtype).name),
            value.sharding,
            np.dtype(value.dtype),
        )
        for name, value in sorted(like.items())
    ]
    return dict(_restore(requests))


def read_step(path: PathLike) -> int:
    """The training step at which the checkpoint was written."""
    return _step(find_checkpoint(path).step)


def read_shapes(path: PathLike) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter; no array is read."""
    stores = open_leaves(find_checkpoint(path).params, ts.Context(_READ))
    return {name: tuple(store.shape) for name, store in sorted(stores.items())}


def read_param(path: PathLike, name: str, *, check: bool = False) -> np.ndarray:
    """One parameter, in the dtype of the file; with `check` gzip's checksums are compared.

    Raises:
      ConfigError: the checkpoint has no parameter of that name.
    """
    checkpoint = find_checkpoint(path)
    if name not in checkpoint.params:
        near = difflib.get_close_matches(name, checkpoint.params, n=3) or sorted(checkpoint.params)
        raise ConfigError(
            f"the checkpoint {checkpoint.folder.url} has no parameter {name!r}. Did you mean one "
            f"of: {_shorten(near)}?"
        )
    leaf = checkpoint.params[name]
    (store,) = open_leaves({name: leaf}, ts.Context(_READ)).values()
    if check:
        check_gzipped(store, leaf.what)
    return explain(lambda: np.asarray(store.read().result()), leaf.folder, leaf.what)


def _step(leaf: Leaf) -> int:
    (store,) = open_leaves({"step": leaf}, ts.Context(_READ)).values()
    if math.prod(store.shape) != 1:  # before memory is allocated for it
        raise ConfigError(f"{leaf.what} must be one integer, found an array {tuple(store.shape)}.")
    value = explain(lambda: np.asarray(store.read().result()), leaf.folder, leaf.what)
    # A run that T5X resumed saves its step as a float.
    if value.size != 1 or value.dtype.kind not in "iuf" or value.reshape(()) % 1 != 0:
        raise ConfigError(f"{leaf.what} must be one integer, found {value.dtype}{value.shape}.")
    return int(value.reshape(()))


def check_tree(
    where: str,
    stored: Mapping[str, tuple[tuple[int, ...], Any]],
    needed: Mapping[str, tuple[int, ...]],
) -> None:
    """Checks that the arrays of a checkpoint are exactly those of the model.

    `stored` has the shape and the dtype of every array, `needed` the shapes of the model.

    Raises:
      ConfigError: with all arrays that are missing, unknown, of another shape, or not floating
        point.
    """
    problems = []
    if missing := sorted(set(needed) - set(stored)):
        problems.append(f"missing in the checkpoint ({len(missing)}): {_shorten(missing)}")
    if unexpected := sorted(set(stored) - set(needed)):
        problems.append(f"unknown to the model ({len(unexpected)}): {_shorten(unexpected)}")
    both = sorted(set(stored) & set(needed))
    misshapen = [
        f"{name} has shape {stored[name][0]}, the model needs {needed[name]}"
        for name in both
        if stored[name][0] != needed[name]
    ]
    if misshapen:
        problems.append(f"of another shape ({len(misshapen)}): {_shorten(misshapen, '; ')}")
    # T5X before version 3 stored bfloat16 as uint16; T5X itself cannot read those files either.
    kinds = [f"{name} is {stored[name][1]}" for name in both if not _is_floating(stored[name][1])]
    if kinds:
        problems.append(f"not floating point ({len(kinds)}): {_shorten(kinds)}")
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise ConfigError(
            f"the checkpoint {where} does not fit the model:\n{listed}\n"
            "Check that the gin file in models/ is that of this checkpoint. If it is, the "
            "checkpoint is damaged: copy it again."
        )


def _is_floating(dtype: Any) -> bool:
    try:
        return bool(jnp.issubdtype(np.dtype(dtype), jnp.floating))
    except TypeError:
        return False


def _shorten(names: Iterable[str], separator: str = ", ") -> str:
    names = list(names)
    rest = len(names) - NAMES_SHOWN
    shown = separator.join(names[:NAMES_SHOWN])
    return f"{shown} and {rest} more" if rest > 0 else shown


class _Request(NamedTuple):
    name: str
    leaf: Leaf
    store: ts.TensorStore
    sharding: jax.sharding.Sharding
    dtype: np.dtype

    def start(self) -> dict[Any, tuple[ts.Future, int]]:
        """The started reads of this process's distinct shards, and their sizes in bytes."""
        reads = {}
        for index in self.sharding.addressable_devices_indices_map(self.shape).values():
            if (key := _hashable(index)) not in reads:
                part = self.store[index] if index else self.store
                reads[key] = (part.read(), math.prod(part.shape) * self.dtype.itemsize)
        return reads

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.store.shape)


def _hashable(index: Index | None) -> tuple[tuple[int | None, int | None], ...]:
    return tuple((part.start, part.stop) for part in index or ())


def _restore(requests: Iterable[_Request]) -> Iterable[tuple[str, Array]]:
    """Every (name, array); reads run ahead of the copies to the devices, within a byte budget."""
    waiting: collections.deque[tuple[_Request, dict[Any, tuple[ts.Future, int]]]] = (
        collections.deque()
    )
    requests = list(requests)
    # The host memory of a restore is then at most about twice the largest parameter.
    largest = max((math.prod(r.shape) * r.dtype.itemsize for r in requests), default=0)
    budget, in_flight = min(BYTES_IN_FLIGHT, largest // 2), 0
    for request in requests:
        reads = request.start()
        waiting.append((request, reads))
        in_flight += sum(size for _, size in reads.values())
        while in_flight > budget:
            first, reads = waiting.popleft()
            yield first.name, _finish(first, reads)
            _return_memory()
            in_flight -= sum(size for _, size in reads.values())
    for request, reads in waiting:
        yield request.name, _finish(request, reads)


def _return_memory() -> None:
    """Returns freed buffers to the system, which glibc would keep."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _finish(request: _Request, reads: Mapping[Any, tuple[ts.Future, int]]) -> Array:
    leaf = request.leaf
    shards = {
        key: explain(lambda read=read: np.asarray(read.result()), leaf.folder, leaf.what)
        for key, (read, _) in reads.items()
    }
    return jax.make_array_from_callback(
        request.shape, request.sharding, lambda index: shards[_hashable(index)]
    )


def write_t5x(
    path: PathLike,
    params: Mapping[str, Array | np.ndarray],
    step: int,
    *,
    dtype: DTypeLike | None = "float32",
    slots: Mapping[str, Array] | None = None,
    files: Mapping[str, str] | None = None,
) -> None:
    """Writes `params` as a checkpoint in T5X's own layout, atomically.

    One parameter at a time is made a NumPy array, so values that read themselves lazily
    (`__array__`) need the memory of the largest. Without `dtype` each keeps its own.

    `slots` are the optimizer's float32 arrays; without them upstream finetuning needs a
    `RestoreCheckpointConfig` that does not restore them. `files` are texts, by file name, that T5X
    ignores. It is a collective of all processes; the first writes.

    Raises:
      ConfigError: the path is not a local folder.
    """
    gathered = ((name, _gather(param)) for name, param in sorted(params.items()))
    moments = ((name, _gather(slot)) for name, slot in sorted((slots or {}).items()))
    if jax.distributed.is_initialized() and jax.process_index() != 0:
        collections.deque(itertools.chain(gathered, moments), maxlen=0)
        return
    with replace_folder(path) as folder:
        writer = Writer(folder)
        for name, array in gathered:
            array = array if dtype is None else array.astype(np.dtype(dtype))
            writer.add(name, array.shape, array.dtype, array.__getitem__)
        for name, slot in moments:
            writer.add_slot(name, slot)
        for name, text in (files or {}).items():
            (folder / name).write_text(text, encoding="utf-8")
        writer.close(step)


def _gather(value: Array | np.ndarray) -> np.ndarray:
    """The whole array on this host; a collective if it is sharded over several processes."""
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(value, tiled=True))
    return np.asarray(value)


class Writer:
    """Writes a checkpoint to an empty folder, array by array and chunk by chunk.

    As T5X does, it writes vectors and scalars into the msgpack index, and larger arrays into
    gzipped zarr folders. Both checkpoint managers of T5X read the result.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tree: dict[str, Any] = {}
        self._slots: dict[str, Any] = {}

    def add(
        self, name: str, shape: tuple[int, ...], dtype: np.dtype, read: Callable[[Index], Any]
    ) -> None:
        """Writes an array; `read` returns the values of the slices of a chunk."""
        path = f"target.{name.replace('/', '.')}/"
        self._tree[name] = self._write(path, shape, dtype, read)

    def add_slot(self, name: str, array: np.ndarray) -> None:
        """Writes an array of the optimizer's state."""
        path = f"state.param_states.{name.replace('/', '.')}/"
        self._slots[name] = self._write(path, array.shape, array.dtype, array.__getitem__)

    def _write(
        self, path: str, shape: tuple[int, ...], dtype: np.dtype, read: Callable[[Index], Any]
    ) -> Any:
        """The entry of the index for an array, which it writes."""
        if len(shape) < 2:
            return np.asarray(read(tuple(slice(0, size) for size in shape)))
        chunks = _chunks(shape, dtype.itemsize)
        compressor = {"id": "gzip", "level": 1}
        metadata = {"shape": list(shape), "chunks": chunks, "compressor": compressor}
        spec = {"driver": "zarr", "dtype": dtype.name, "metadata": metadata}
        place = {"driver": "file", "path": f"{self._folder}/{path}"}
        store = ts.open({**spec, "kvstore": place}, create=True).result()
        writing: collections.deque[Any] = collections.deque()
        for corner in itertools.product(*map(range, (0,) * len(shape), shape, chunks)):
            parts = zip(corner, chunks, shape, strict=True)
            index = tuple(slice(start, min(start + n, size)) for start, n, size in parts)
            writing.append(store[index].write(read(index)))
            if len(writing) > CHUNKS_IN_FLIGHT:
                writing.popleft().result()
        for write in writing:
            write.result()
        return {**spec, "kvstore": {"driver": "file", "path": path}}

    def close(self, step: int) -> None:
        """Writes the index, which completes the checkpoint."""
        state: dict[str, Any] = {"step": np.asarray(step, np.int32)}
        if self._slots:
            state["param_states"] = traverse_util.unflatten_dict(self._slots, sep="/")
        optimizer = {
            "state": state,
            "target": traverse_util.unflatten_dict(self._tree, sep="/"),
        }
        index = {"version": _FORMAT_VERSION, "optimizer": optimizer}
        (self._folder / INDEX).write_bytes(serialization.msgpack_serialize(index))


def _chunks(shape: tuple[int, ...], itemsize: int) -> list[int]:
    """The shape of a chunk: the longest side is halved until a chunk has at most CHUNK_BYTES.

    Shards along any axis then consist mostly of whole chunks.

    >>> _chunks((32128, 4096), 4)
    [2008, 2048]
    """
    chunks = list(shape)
    while math.prod(chunks) * itemsize > CHUNK_BYTES:
        longest = chunks.index(max(chunks))
        chunks[longest] = math.ceil(chunks[longest] / 2)
    return chunks
