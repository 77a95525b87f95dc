"""A loss that is not finite names its step and rows; one that stands still is said in words."""

import math
import re
import types

import numpy as np
import pytest

from prompt_tuning.batches import batching
from prompt_tuning.training import health


def rows(task: str, targets: list[list[int]]) -> batching.Rows:
    tokens = [np.array(t, np.int32) for t in targets]
    texts = [str(t) for t in targets]
    return batching.Rows(task, tokens, tokens, texts, texts, [{} for _ in targets], 0, 0)


def test_the_first_step_that_is_not_finite_is_named():
    good = {"loss": np.float32(1), "gradient_norm": np.float32(2)}
    health.check_finite([good, good], 9)
    bad = [good, {**good, "gradient_norm": np.float32("inf")}, {**good, "loss": np.float32("nan")}]
    with pytest.raises(health.NotFiniteError, match=r"step 8 .*inf") as caught:
        health.check_finite(bad, 9)
    assert caught.value.step == 8
    assert isinstance(caught.value, FloatingPointError)


def test_the_rows_of_a_batch_are_those_that_it_was_made_of():
    """Every row is one token, its number, so that the batch itself says what is in it."""
    train = (rows("a", [[n] for n in range(1, 8)]), rows("b", [[n] for n in range(101, 106)]))
    rates = (1.0, 2.0)
    config = types.SimpleNamespace(batch_size=4, train_split="train")
    for step in (1, 5):
        batch = batching.train_batch(
            train,
            rates,
            seed=3,
            step=step - 1,
            batch_size=4,
            lengths={"inputs": 1, "targets": 1},
        )
        expected = sorted(batch["encoder_input_tokens"][:, 0].tolist())
        named = health.name_rows(train, rates, config, 3, step)
        found = []
        for part in named.split("; "):
            task, split, numbers = part.split(" ", 2)
            assert split == "train"
            found += [int(n) + (1 if task == "a" else 101) for n in numbers.split(", ")]
        assert sorted(found) == expected


def test_the_entropy_of_targets():
    even = [rows("a", [[5, 1], [6, 1]])]
    assert health.target_entropy(even, [1.0]) == pytest.approx(math.log(2) / 2)
    mixed = [*even, rows("b", [[5, 1]])]
    assert health.target_entropy(mixed, [1.0, 3.0]) == pytest.approx(
        -(0.875 * math.log(0.875) + 0.125 * math.log(0.125)) / 2
    )
    assert health.target_entropy([rows("a", [[n] for n in range(500)])], [1.0]) is None
    assert health.target_entropy([rows("a", [[5, 1]] * 3)], [1.0]) is None


ENTROPY = 0.35
RNG = np.random.default_rng(0)
NOISE = RNG.normal(0, 0.01, 200)


# Of the tiny backbone, DROPOUT_RATE = 0: demo.gin, and the same rows with labels drawn at random.
LEARNS = """
    4.28 4.73 3.15 2.77 2.64 2.05 2.03 1.59 1.23 1.09 1.21 0.98 0.98 0.82 0.82 0.63 0.61 0.62
    0.56 1.03 0.67 0.55 0.65 0.43 0.59 0.57 0.62 0.67 0.57 0.48 0.71 0.57 0.48 0.46 0.47 0.68
    0.48 0.41 0.57 0.48 0.54 0.43 0.64 0.44 0.50 0.47 0.45 0.63 0.43 0.56 0.50 0.61 0.42 0.38
    0.41 0.54 0.52 0.45 0.43 0.37 0.39 0.46 0.46 0.36 0.57 0.53 0.41 0.36 0.51 0.47 0.40 0.34
    0.36 0.38 0.43 0.40 0.63 0.38 0.29 0.37 0.48 0.34 0.39 0.36 0.26 0.41 0.30 0.29 0.25 0.35
    0.33 0.44 0.27 0.29 0.31 0.24 0.27 0.25 0.26 0.26 0.29 0.26 0.25 0.37 0.24 0.17 0.17 0.24
    0.37 0.25 0.32 0.24 0.21 0.18 0.19 0.18 0.24 0.22 0.21 0.20 0.17 0.15 0.15 0.18 0.26 0.17
    0.15 0.15 0.17 0.22 0.19 0.18 0.14 0.19 0.29 0.15 0.14 0.12 0.13 0.16 0.22 0.26 0.18 0.16
    0.13 0.12 0.11 0.15 0.27 0.14 0.13 0.13 0.12 0.10 0.10 0.10 0.09 0.12 0.11 0.11
"""
LEARNS_NOTHING = """
    4.12 4.09 3.22 3.12 2.75 2.08 1.54 1.52 1.38 1.16 0.97 0.84 0.71 0.63 0.66 0.67 0.63 0.86
    0.65 0.54 0.67 0.51 0.80 0.44 1.19 0.54 0.60 0.52 0.60 0.49 0.49 0.58 0.59 0.49 0.42 0.52
    0.70 0.55 0.52 0.68 0.44 0.52 0.58 0.50 0.49 0.58 0.52 0.49 0.39 0.55 0.47 0.46 0.74 0.44
    0.43 0.49 0.44 0.46 0.65 0.44 0.39 0.42 0.47 0.61 0.50 0.46 0.37 0.39 0.40 0.46 0.60 0.48
    0.52 0.47 0.45 0.41 0.39 0.41 0.38 0.46 0.41 0.48 0.57 0.41 0.44 0.46 0.44 0.45 0.65 0.44
    0.33 0.37 0.42 0.53 0.40 0.40 0.39 0.41 0.38 0.40 0.36 0.43 0.50 0.43 0.42 0.40 0.59 0.40
    0.40 0.50 0.47 0.38 0.37 0.42 0.44 0.44 0.43 0.40 0.44 0.46 0.43 0.50 0.48 0.44 0.42 0.41
    0.40 0.42 0.38 0.39 0.47 0.47 0.46 0.37 0.41 0.38 0.36 0.40 0.58 0.43 0.40 0.42 0.44 0.45
    0.42 0.42 0.44 0.49 0.55 0.42
"""


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        (ENTROPY + NOISE, r"not learning: the .* stays at 0\.3\d+, at the entropy"),
        (ENTROPY + NOISE[:150], "not learning"),
        (2 + NOISE, r"stays at [12]\.\d+, above the entropy of the targets \(0.350\)"),
        (np.geomspace(2, 0.02, 200), None),
        (np.full(200, 0.01) + abs(NOISE), None),  # has learned
        (np.linspace(2, ENTROPY, 200), None),  # is on its way
        (np.concatenate([np.geomspace(2, 0.1, 20), np.geomspace(0.1, 3, 20)]), "is diverging"),
        (ENTROPY + NOISE[:149], None),  # too early to say
    ],
)
def test_problems_of_a_loss(losses, said):
    found = health.describe_problem(losses.tolist(), ENTROPY)
    assert found is None if said is None else re.search(said, found or "")


def test_a_run_whose_evaluation_shows_it_is_learning():
    losses = (ENTROPY + NOISE).tolist()
    assert health.describe_problem(losses, ENTROPY, learned=lambda: True) is None
    rising = [0.1] * 60 + [0.9] * 60
    assert "diverging" in (health.describe_problem(rising, ENTROPY, learned=lambda: True) or "")


def test_without_classes_only_divergence_is_said():
    assert health.describe_problem([3.0] * 40, None) is None
    assert "diverging" in (health.describe_problem([1.0] * 20 + [9.0] * 20, None) or "")


def test_a_real_run_that_learns_and_one_that_cannot():
    learns, cannot = ([float(x) for x in text.split()] for text in (LEARNS, LEARNS_NOTHING))
    for steps in range(1, len(learns) + 1):
        assert health.describe_problem(learns[:steps], math.log(2) / 2) is None
    assert "is not learning" in (health.describe_problem(cannot, math.log(2) / 2) or "")
