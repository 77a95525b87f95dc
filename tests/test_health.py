"""A loss that is not finite names its step and rows; one that stands still is said in words."""

import math
import re
import types

import numpy as np
import pytest

from prompt_tuning.data import features
from prompt_tuning.training import health


def rows(task: str, targets: list[list[int]]) -> features.Rows:
    tokens = [np.array(t, np.int32) for t in targets]
    texts = [str(t) for t in targets]
    return features.Rows(task, tokens, tokens, texts, texts, [{} for _ in targets], 0, 0)


def test_the_first_step_that_is_not_finite_is_named():
    good = {"loss": np.float32(1), "gradient_norm": np.float32(2)}
    health.check_finite([good, good], 9)
    bad = [good, {**good, "gradient_norm": np.float32("inf")}, {**good, "loss": np.float32("nan")}]
    with pytest.raises(health.NotFiniteError, match=r"in step 8 \(gradient norm inf\)") as caught:
        health.check_finite(bad, 9)
    assert caught.value.step == 8
    assert isinstance(caught.value, FloatingPointError)


def test_the_rows_of_a_batch_are_those_that_it_was_made_of():
    """Every row is one token, its number, so that the batch itself says what is in it."""
    train = (rows("a", [[n] for n in range(1, 8)]), rows("b", [[n] for n in range(101, 106)]))
    data = types.SimpleNamespace(train=train, rates=(1.0, 2.0))
    config = types.SimpleNamespace(batch_size=4, train_split="train")
    run = types.SimpleNamespace(data=config, train=types.SimpleNamespace(random_seed=3))
    for step in (1, 5):
        batch = features.train_batch(
            train,
            data.rates,
            seed=3,
            step=step - 1,
            batch_size=4,
            lengths={"inputs": 1, "targets": 1},
        )
        expected = sorted(batch["encoder_input_tokens"][:, 0].tolist())
        named = health.name_rows(data, run, step)
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
NOISE = RNG.normal(0, 0.01, 40)


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        (ENTROPY + NOISE, r"not learning: the .* stays at 0\.3\d+, at the entropy"),
        (ENTROPY + NOISE[:10], "not learning"),
        (2 + NOISE, r"stays at [12]\.\d+, above the entropy of the targets \(0.350\)"),
        (np.geomspace(2, 0.02, 40), None),
        (np.full(40, 0.01) + abs(NOISE), None),  # has learned
        (np.linspace(2, ENTROPY, 40), None),  # is on its way
        (np.concatenate([np.geomspace(2, 0.1, 20), np.geomspace(0.1, 3, 20)]), "is diverging"),
        (ENTROPY + NOISE[:7], None),  # too early to say
    ],
)
def test_the_course_of_a_loss_in_words(losses, said):
    found = health.describe_trouble(losses.tolist(), ENTROPY)
    assert found is None if said is None else re.search(said, found or "")


def test_without_classes_only_divergence_is_said():
    assert health.describe_trouble([3.0] * 40, None) is None
    assert "diverging" in (health.describe_trouble([1.0] * 20 + [9.0] * 20, None) or "")
