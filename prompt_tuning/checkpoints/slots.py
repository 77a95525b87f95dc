"""Adafactor's moments under T5X's names, and back; for checkpoints of pre-training.

optax stores trees of moments (`v_row/<parameter>`), T5X the moments of each parameter
(`<parameter>/v_row`). The arrays are equal, including placeholders of length 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from prompt_tuning.model import sharding

_KINDS = ("v", "v_row", "v_col")


def get_slots(opt_state: Any) -> dict[str, Array]:
    """T5X's `param_states`, from the state of Adafactor as `optim.make_optimizer` makes it."""
    slots: dict[str, Array] = {}
    for path, value in jax.tree_util.tree_leaves_with_path(opt_state):
        if (name := _slot_name(path)) is not None:
            slots[name] = value
            # T5X's slot of the momentum, which T5 does not use.
            slots[name.rpartition("/")[0] + "/m"] = jnp.zeros((1,), jnp.float32)
    return slots


def set_slots(opt_state: Any, slots: Mapping[str, Array] | None, *, count: int) -> Any:
    """The optimizer's state with these moments (None: unchanged), after `count` steps of a run."""

    def replace(path: tuple[Any, ...], value: Array) -> Array:
        name = _slot_name(path)
        if name is not None:
            return value if slots is None else slots[name]
        if getattr(path[-1], "name", None) == "count":
            return sharding.put(np.full(value.shape, count, value.dtype), value.sharding)
        return value

    return jax.tree_util.tree_map_with_path(replace, opt_state)


def _slot_name(path: tuple[Any, ...]) -> str | None:
    """`<parameter>/<kind>` for a moment, else None; a moment's last key is the parameter's name."""
    *_, owner, last = (None, *path)
    kind = getattr(owner, "name", None)
    return f"{last.key}/{kind}" if last is not None and kind in _KINDS else None
