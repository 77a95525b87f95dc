"""Length groups: which rows of a batch share a shape, so that little of a step is padding.

A batch is sorted by length and cut into a few groups of as many rows each; a group is padded to the
least of a few widths that holds its rows, and the groups' gradients are summed. The cut follows
from the lengths of the whole batch, which every host knows, and from settings: all hosts cut alike,
and a resumed run cuts as the first one did. `features.py` makes the arrays of a group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from prompt_tuning.config import ConfigError, DataConfig, TrainConfig

# What a group costs beside its tokens, in tokens: starting a program, and filling a device badly.
# Of T5 1.1 small on two cores 0 to 80 were measured (groups of 4 rows beside groups of 8).
GROUP_COST = 64


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows that are padded alike."""

    rows: tuple[int, ...]  # places in the batch
    inputs: int  # the width T
    targets: int  # the width L


@dataclasses.dataclass(frozen=True)
class Cutting:
    """How batches of a run are cut: the same for all of its steps."""

    inputs: int  # TASK_FEATURE_LENGTHS
    targets: int
    prompt: int  # rows of the prompt: every row of a batch pays for them
    fewest: int = 1  # groups a batch is cut into whatever its lengths
    most: int = 1  # groups it is cut into where that saves padding
    data_parts: int = 1  # of the mesh: a group's rows are filled up to a multiple of it

    @property
    def max_shapes(self) -> int:
        """How many shapes there can be, and so programs to compile, in a run of any length."""
        counts = len({self.fewest, self.most})
        return counts * len(input_widths(self.inputs)) * len(target_widths(self.targets))


def make_cutting(
    train: TrainConfig,
    data: DataConfig,
    prompt_length: int,
    data_parts: int,
    recorded: Mapping[str, int] | None = None,
) -> Cutting:
    """The cutting of a run: MICROBATCHES groups at least, LENGTH_GROUPS where that helps.

    Every group has to divide by the `data_parts` of the mesh; LENGTH_GROUPS is lowered until it
    does. A run that goes on, perhaps on another mesh, is cut into as many groups as before, which
    it has `recorded`: dropout is drawn for each group, so another number would be another course
    of the run. Where the groups are too small for the mesh, they are filled up.

    Raises:
      ConfigError: MICROBATCHES does not fit batch and mesh.
    """
    prompt = prompt_length if train.trainable == "prompt" else 0
    lengths = data.task_feature_lengths
    cutting = Cutting(lengths["inputs"], lengths["targets"], prompt, data_parts=data_parts)
    if recorded is not None:
        return dataclasses.replace(cutting, **recorded)
    fewest, rows = train.microbatches, data.batch_size
    if rows % fewest or (rows // fewest) % data_parts:
        raise ConfigError(
            f"MICROBATCHES = {fewest} does not cut BATCH_SIZE = {rows} into equal parts that "
            f"divide by the {data_parts} data-parallel devices: choose a divisor of "
            f"{rows // data_parts}."
        )
    most = max(
        n
        for n in range(fewest, max(fewest, train.length_groups) + 1)
        if rows % (n * data_parts) == 0
    )
    return dataclasses.replace(cutting, fewest=fewest, most=most)


def record_cutting(cutting: Cutting) -> dict[str, int]:
    """What `make_cutting` needs to go on; the rest follows from the settings and the mesh."""
    return {"fewest": cutting.fewest, "most": cutting.most}


def fill_up(cutting: Cutting, rows: int) -> int:
    """How many empty rows a group of so many needs to divide by the data-parallel devices.

    >>> fill_up(Cutting(512, 8, prompt=0, most=4, data_parts=8), rows=12)
    4
    """
    return -rows % cutting.data_parts


def cut_batch(inputs: Sequence[int], targets: Sequence[int], cutting: Cutting) -> tuple[Group, ...]:
    """The groups of a batch whose rows have these lengths, shortest rows first.

    Rows of the same length keep their order. Many groups are made where the padding they save
    outweighs what they cost, else few.

    >>> cutting = Cutting(inputs=512, targets=8, prompt=0, most=2)
    >>> [(g.rows, g.inputs, g.targets) for g in cut_batch([500, 30, 40, 490], [2] * 4, cutting)]
    [((1, 2), 48, 2), ((3, 0), 512, 2)]
    """
    order = np.argsort(np.asarray(inputs), kind="stable")
    few, many = (_cut(order, inputs, targets, cutting, n) for n in (cutting.fewest, cutting.most))
    extra = GROUP_COST * (len(many) - len(few))
    return many if _cost(many, cutting) + extra < _cost(few, cutting) else few


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


def _cost(groups: Sequence[Group], cutting: Cutting) -> int:
    return sum(len(g.rows) * (cutting.prompt + g.inputs + g.targets) for g in groups)


def fitting_width(length: int, widths: Sequence[int]) -> int:
    """The least of ascending `widths` that holds `length`, else the last."""
    return next((width for width in widths if width >= length), widths[-1])


def input_widths(length: int) -> tuple[int, ...]:
    """The widths that inputs of at most `length` tokens are padded to, in multiples of 8.

    Every width is compiled once. There are four to a doubling from an eighth of the length on,
    where rows of real tasks lie, and two below it.

    >>> input_widths(512)
    (32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)
    >>> input_widths(20)
    (8, 16, 20)
    """
    parts = (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28)  # of 32
    widths = {min(length, -(-length * part // 32 // 8) * 8) for part in parts}
    return (*sorted(widths - {length}), length)


def target_widths(length: int) -> tuple[int, ...]:
    """The widths that targets are padded to: logits over the vocabulary cost the most a token.

    >>> target_widths(8), target_widths(62)
    ((2, 4, 8), (2, 4, 8, 16, 32, 62))
    """
    doubled = {2**n for n in range(1, length.bit_length()) if 2**n < length}
    return (*sorted(doubled), length)
