"""Rows to batches: the arrays of a step.

`order.py` computes from (seed, step) which rows a training batch has, and `groups.py` cuts it into
length groups. Only numpy here: `tasks/task_rows.py` reads the rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
from jaxtyping import Float32, Int32

from prompt_tuning.batches.groups import Cutting, cut_batch, fill_up, fitting_width, input_widths
from prompt_tuning.batches.order import row_order

Lengths = Mapping[str, int]  # TASK_FEATURE_LENGTHS
Tokens = Int32[np.ndarray, "_"]


class Batch(TypedDict):
    """What a training or evaluation step takes; the names are T5X's. Token 0 is padding."""

    encoder_input_tokens: Int32[np.ndarray, "B T"]
    decoder_input_tokens: Int32[np.ndarray, "B L"]
    decoder_target_tokens: Int32[np.ndarray, "B L"]
    decoder_loss_weights: Float32[np.ndarray, "B L"]


class TrainBatch(Batch, total=False):
    """A batch for training. If the prompt has members, `which` is the number of each row's."""

    which: Int32[np.ndarray, "B"]


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """One split of one task, in the order of its files."""

    task: str
    inputs: list[Tokens]  # cut to TASK_FEATURE_LENGTHS, end-of-sequence included
    targets: list[Tokens]
    input_texts: list[str]  # before tokenising; decoded from the tokens if the task keeps none
    target_texts: list[str]
    examples: list[dict[str, Any]]  # all features as seqio gives them, for postprocess_fn
    truncated_inputs: int
    truncated_targets: int

    def __len__(self) -> int:
        return len(self.examples)


def train_batch(
    rows: Sequence[Rows],
    rates: Sequence[float],
    *,
    seed: int,
    step: int,
    batch_size: int,
    lengths: Lengths,
) -> Batch:
    """The batch of a step, a pure function of (seed, step); steps count from 0 in this run."""
    inputs, targets, _ = _step_rows(rows, rates, seed, step, batch_size)
    return make_batch(inputs, targets, lengths)


def train_groups(
    rows: Sequence[Rows],
    rates: Sequence[float],
    cutting: Cutting,
    *,
    seed: int,
    step: int,
    batch_size: int,
    members: Sequence[int] | None = None,
) -> list[TrainBatch]:
    """The same batch as length groups, which split its rows: their losses add up to the batch's.

    A group that does not divide by the mesh is padded with rows at its end, as in `eval_batches`.
    The padding does not change the dropout of the real rows. If the prompt has members, `members`
    has the number of each task's member, and every row is given that of its task as `which`.
    """
    inputs, targets, tasks = _step_rows(rows, rates, seed, step, batch_size)
    groups: list[TrainBatch] = []
    for group in cut_batch([len(x) for x in inputs], [len(x) for x in targets], cutting):
        fill = fill_up(cutting, len(group.rows))
        padded = (*group.rows, *group.rows[-1:] * fill)
        own_targets = [*(targets[i] for i in group.rows), *[np.zeros(0, np.int32)] * fill]
        batch: TrainBatch = {
            **pad_batch([inputs[i] for i in padded], own_targets, group.inputs, group.targets)
        }
        if members is not None:
            batch["which"] = np.asarray([members[tasks[i]] for i in padded], np.int32)
        groups.append(batch)
    return groups


def _step_rows(
    rows: Sequence[Rows], rates: Sequence[float], seed: int, step: int, batch_size: int
) -> tuple[list[Tokens], list[Tokens], list[int]]:
    """Inputs, targets and the number of the task of each row of a step."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    task, row = row_order(seed, [len(r) for r in rows], rates, positions)
    chosen = [(rows[t], int(i)) for t, i in zip(task, row, strict=True)]
    return [r.inputs[i] for r, i in chosen], [r.targets[i] for r, i in chosen], task.tolist()


def eval_batches(
    rows: Rows, batch_size: int, lengths: Lengths
) -> Iterator[tuple[Batch, list[int]]]:
    """Batches of rows of similar length, longest first, each with the numbers of its rows.

    Every batch has `batch_size` rows, so that few shapes are compiled. The last batch is padded
    with copies of its last input without targets: a copy has no loss weight, and decoding it takes
    no longer than its original. Ignore results past the last real row.
    """
    order = sorted(range(len(rows)), key=lambda row: -len(rows.inputs[row]))
    for start in range(0, len(rows), batch_size):
        places = order[start : start + batch_size]
        fill = batch_size - len(places)
        inputs = [rows.inputs[i] for i in [*places, *places[-1:] * fill]]
        targets = [rows.targets[i] for i in places] + [np.zeros(0, np.int32)] * fill
        yield make_batch(inputs, targets, lengths), places


def make_batch(
    inputs: Sequence[Sequence[int] | Tokens],
    targets: Sequence[Sequence[int] | Tokens],
    lengths: Lengths,
) -> Batch:
    """The rows as arrays: T is the smallest of a few widths that fits all inputs, L is fixed.

    >>> batch = make_batch([[5, 6, 1]], [[7, 1]], {"inputs": 64, "targets": 4})
    >>> batch["encoder_input_tokens"].shape, batch["decoder_input_tokens"].tolist()
    ((1, 8), [[0, 7, 1, 0]])
    """
    longest = max((len(row) for row in inputs), default=0)
    width = fitting_width(longest, input_widths(lengths["inputs"]))
    return pad_batch(inputs, targets, width, lengths["targets"])


def pad_batch(
    inputs: Sequence[Sequence[int] | Tokens],
    targets: Sequence[Sequence[int] | Tokens],
    input_width: int,
    target_width: int,
) -> Batch:
    """The rows as arrays of these widths; longer rows are an error."""
    target_tokens = _pad(targets, target_width)
    return Batch(
        encoder_input_tokens=_pad(inputs, input_width),
        # T5 starts decoding with the padding token.
        decoder_input_tokens=np.pad(target_tokens, ((0, 0), (1, 0)))[:, :-1],
        decoder_target_tokens=target_tokens,
        decoder_loss_weights=(target_tokens != 0).astype(np.float32),
    )


def _pad(rows: Sequence[Sequence[int] | Tokens], width: int) -> Int32[np.ndarray, "B W"]:
    longest = max((len(row) for row in rows), default=0)
    assert longest <= width, f"a row of {longest} tokens was not cut to {width}"
    padded = np.zeros((len(rows), width), np.int32)
    for padded_row, row in zip(padded, rows, strict=True):
        padded_row[: len(row)] = row
    return padded
