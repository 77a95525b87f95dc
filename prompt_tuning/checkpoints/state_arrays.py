"""The arrays of a run's state by name, and their checksums.

`run_state.py` saves them with Orbax, and checks them when it restores a state.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning.config import ConfigError

SHOWN = 5  # differences shown in an error


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves by readable name, such as `opt_state/inner_states/train/0/mu/prompt`.

    A flat dictionary does not depend on how Orbax saves named tuples, empty states and None. The
    caller restores the structure.
    """
    paths = jax.tree_util.tree_leaves_with_path(tree)
    leaves = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in paths}
    assert len(leaves) == len(paths), "two leaves of the state have the same name"
    return leaves


def drop_empty(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves that have elements; Orbax cannot save the others."""
    return {name: leaf for name, leaf in leaves.items() if 0 not in leaf.shape}


def restore_target(leaf: Any) -> Any:
    """Orbax's argument to restore a leaf; without a sharding it is restored to the first device."""
    if isinstance(leaf, np.ndarray):
        return leaf
    sharding = getattr(leaf, "sharding", None)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def make_empty(leaf: Any) -> Any:
    """An array of the same shape and dtype as `leaf`, which has no elements."""
    numpy = np if isinstance(leaf, np.ndarray) else jnp
    return numpy.zeros(leaf.shape, leaf.dtype)


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def compute_digests(leaves: Mapping[str, Any]) -> dict[str, str]:
    """The SHA-256 of every array, by name, except arrays sharded over several processes."""

    def digest(leaf: Any) -> str:
        array = np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
        content = hashlib.sha256(f"{array.dtype} {array.shape}\n".encode())
        content.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return content.hexdigest()

    whole = {n: x for n, x in leaves.items() if _is_whole(x)}
    with concurrent.futures.ThreadPoolExecutor() as pool:  # hashing releases the GIL
        return dict(zip(whole, pool.map(digest, whole.values()), strict=True))


def _is_whole(leaf: Any) -> bool:
    """Whether this process has all elements of an array; replicated arrays are whole."""
    if not isinstance(leaf, jax.Array):
        return True
    return leaf.is_fully_addressable or leaf.is_fully_replicated


def add_digest(content: dict[str, Any]) -> dict[str, Any]:
    """The JSON values with their SHA-256 added."""
    text = json.dumps(content, sort_keys=True)
    return {**content, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def check_digest(content: Mapping[str, Any], step: int) -> None:
    """Raises ValueError if the SHA-256 of the JSON values differs, or their step."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    if add_digest(rest) != content:
        raise ValueError("the SHA-256 of its metadata differs")
    if content.get("step", step) != step:
        raise ValueError(f"it is the state of step {content['step']}: the folder was renamed")


def check_same(stored: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    """Checks names, shapes and dtypes of a saved state; Orbax would silently cast dtypes."""

    def describe(leaf: Any) -> str:
        return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"

    problems = [f"{name} is missing" for name in sorted(set(wanted) - set(stored))]
    problems += [f"{name} is unknown" for name in sorted(set(stored) - set(wanted))]
    problems += [
        f"{name} is {describe(stored[name])}, this run has {describe(leaf)}"
        for name, leaf in sorted(wanted.items())
        if name in stored and not _is_key(leaf) and describe(stored[name]) != describe(leaf)
    ]
    if problems:
        rest = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ConfigError(
            f"the state in {where} was saved by another run: {'; '.join(problems[:SHOWN])}{rest}. "
            "Use the settings it was started with, or another MODEL_DIR."
        )
