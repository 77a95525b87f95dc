"""The arrays of a run's state as they are saved: by name, with a checksum each, sealed.

For `run_state.py`, which hands them to Orbax.
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

SHOWN = 5  # differences, in an error


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves under readable names: `opt_state/inner_states/train/0/mu/prompt`.

    Saving a flat dictionary keeps us independent of how Orbax treats named tuples, empty states
    and None; the structure is the caller's to give back.
    """
    paths = jax.tree_util.tree_leaves_with_path(tree)
    leaves = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in paths}
    assert len(leaves) == len(paths), "two leaves of the state have the same name"
    return leaves


def nonempty(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """What is saved: Orbax refuses arrays without elements."""
    return {name: leaf for name, leaf in leaves.items() if 0 not in leaf.shape}


def target(leaf: Any) -> Any:
    """What Orbax needs to restore a leaf; one without a sharding goes to the first device."""
    if isinstance(leaf, np.ndarray):
        return leaf
    sharding = getattr(leaf, "sharding", None)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def empty(leaf: Any) -> Any:
    """An array without elements, as `leaf` is one."""
    numpy = np if isinstance(leaf, np.ndarray) else jnp
    return numpy.zeros(leaf.shape, leaf.dtype)


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def digests(leaves: Mapping[str, Any]) -> dict[str, str]:
    """The SHA-256 of every array that this process has whole."""

    def digest(leaf: Any) -> str:
        array = np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
        content = hashlib.sha256(f"{array.dtype} {array.shape}\n".encode())
        content.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return content.hexdigest()

    whole = {n: x for n, x in leaves.items() if _is_whole(x)}
    with concurrent.futures.ThreadPoolExecutor() as pool:  # hashing releases Python's lock
        return dict(zip(whole, pool.map(digest, whole.values()), strict=True))


def _is_whole(leaf: Any) -> bool:
    """Whether this process has all of an array: of a prompt every process has."""
    if not isinstance(leaf, jax.Array):
        return True
    return leaf.is_fully_addressable or leaf.is_fully_replicated


def seal(content: dict[str, Any]) -> dict[str, Any]:
    """The JSON values, and their SHA-256 with them."""
    text = json.dumps(content, sort_keys=True)
    return {**content, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def check_seal(content: Mapping[str, Any], step: int) -> None:
    """Raises ValueError where they are not what was sealed, for this step."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    if seal(rest) != content:
        raise ValueError("its JSON values are not what was saved, by their SHA-256")
    if content.get("step", step) != step:
        raise ValueError(f"it is the state of step {content['step']}, under another name")


def check_same(stored: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    """Refuses the state of another run; Orbax would cast another dtype silently."""

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
