"""Length groups: rows of similar length share a shape, so that little of a step is padding.

A batch is sorted by length and cut into a few groups of equal size. A group is padded to the
smallest of a few widths that fits its rows, and the groups' gradients are summed. The cut depends
only on settings and on the lengths of the whole batch, which every host knows: all hosts cut
alike, and a resumed run cuts as before. `batching.py` makes the arrays of a group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from prompt_tuning.config import ConfigError, DataConfig, TrainConfig

# The overhead of a group in tokens: starting a program, and using the device worse. 0 to 80 were
# measured for T5 1.1 small on two cores (groups of 4 rows against groups of 8).
GROUP_COST = 64


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows that are padded to the same widths."""

    rows: tuple[int, ...]  # indices into the batch
    inputs: int  # the width T
    targets: int  # the width L


@dataclasses.dataclass(frozen=True)
class Cutting:
    """How the batches of a run are cut: the same for all steps."""

    inputs: int  # TASK_FEATURE_LENGTHS
    targets: int
    fewest: int = 1  # groups of every batch
    most: int = 1  # groups of a batch if that saves padding
    data_parts: int = 1  # of the mesh: a group's rows are padded to a multiple of it

    @property
    def max_shapes(self) -> int:
        """The largest number of shapes, and so of programs to compile, of a run of any length."""
        counts = len({self.fewest, self.most})
        return counts * len(input_widths(self.inputs)) * len(target_widths(self.targets))


def make_cutting(
    train: TrainConfig,
    data: DataConfig,
    data_parts: int,
    recorded: Mapping[str, int] | None = None,
) -> Cutting:
    """The cutting of a run: at least MICROBATCHES groups, LENGTH_GROUPS if that saves padding.

    Every group must divide by the `data_parts` of the mesh; LENGTH_GROUPS is lowered until it
    does. A resumed run, perhaps on another mesh, uses the number of groups that was `recorded`:
    dropout is drawn for each group, so another number would change the results. If the groups are
    too small for the mesh, they are padded with rows.

    Raises:
      ConfigError: MICROBATCHES does not fit batch and mesh.
    """
    lengths = data.task_feature_lengths
    cutting = Cutting(lengths["inputs"], lengths["targets"], data_parts=data_parts)
    if recorded is not None:
        return dataclasses.replace(cutting, **recorded)
    fewest, rows = train.microbatches, data.batch_size
    check_microbatches(rows, fewest, data_parts)
    most = max(
        n
        for n in range(fewest, max(fewest, train.length_groups) + 1)
        if rows % (n * data_parts) == 0
    )
    return dataclasses.replace(cutting, fewest=fewest, most=most)


def check_microbatches(rows: int, parts: int, data_parts: int) -> None:
    """Raises ConfigError if a batch cannot be cut into equal parts for the devices."""
    if rows % (parts * data_parts):
        raise ConfigError(
            f"MICROBATCHES = {parts} does not cut BATCH_SIZE = {rows} into equal parts that "
            f"divide by the {data_parts} data-parallel devices: choose a divisor of "
            f"{rows // data_parts}."
        )


def record_cutting(cutting: Cutting) -> dict[str, int]:
    """The fields that a resumed run needs; the others follow from the settings and the mesh."""
    return {"fewest": cutting.fewest, "most": cutting.most}


def fill_up(cutting: Cutting, rows: int) -> int:
    """The number of padding rows that makes a group divide by the data-parallel devices.

    >>> fill_up(Cutting(512, 8, most=4, data_parts=8), rows=12)
    4
    """
    return -rows % cutting.data_parts


def cut_batch(inputs: Sequence[int], targets: Sequence[int], cutting: Cutting) -> tuple[Group, ...]:
    """The groups of a batch whose rows have these lengths, shortest rows first.

    Rows of the same length keep their order. The larger number of groups is used if it saves more
    padding than it costs.

    >>> cutting = Cutting(inputs=512, targets=8, most=2)
    >>> [(g.rows, g.inputs, g.targets) for g in cut_batch([500, 30, 40, 490], [2] * 4, cutting)]
    [((1, 2), 48, 2), ((3, 0), 512, 2)]
    """
    order = np.argsort(np.asarray(inputs), kind="stable")
    few, many = (_cut(order, inputs, targets, cutting, n) for n in (cutting.fewest, cutting.most))
    extra = GROUP_COST * (len(many) - len(few))
    return many if _cost(many) + extra < _cost(few) else few


def _cut(
    order: np.ndarray, inputs: Sequence[int], targets: Sequence[int], cutting: Cutting, parts: int
) -> tuple[Group, ...]:
    groups = []
    for rows in np.split(order, parts):
        groups.append(
            Group(
                tuple(rows.tolist()),
                fitting_width(max(inputs[i] for i in rows), input_widths(cutting.inputs)),
                fitting_width(max(targets[i] for i in rows), target_widths(cutting.targets)),
            )
        )
    return tuple(groups)


def _cost(groups: Sequence[Group]) -> int:
    """Tokens with their padding; the prompt in front of them is the same in every cutting."""
    return sum(len(g.rows) * (g.inputs + g.targets) for g in groups)


def fitting_width(length: int, widths: Sequence[int]) -> int:
    """The smallest of ascending `widths` that fits `length`, else the last."""
    return next((width for width in widths if width >= length), widths[-1])


def input_widths(length: int) -> tuple[int, ...]:
    """The widths that inputs of at most `length` tokens are padded to, in multiples of 8.

    Every width is compiled once. There are four per doubling from an eighth of the length on, where
    most rows of real tasks are, and two below.

    >>> input_widths(512)
    (32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)
    >>> input_widths(20)
    (8, 16, 20)
    """
    parts = (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28)  # of 32
    widths = {min(length, -(-length * part // 32 // 8) * 8) for part in parts}
    return (*sorted(widths - {length}), length)


def target_widths(length: int) -> tuple[int, ...]:
    """The widths that targets are padded to: powers of two, since logits cost the most per token.

    >>> target_widths(8), target_widths(62)
    ((2, 4, 8), (2, 4, 8, 16, 32, 62))
    """
    doubled = {2**n for n in range(1, length.bit_length()) if 2**n < length}
    return (*sorted(doubled), length)
