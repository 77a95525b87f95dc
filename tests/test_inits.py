"""The paper's initialisations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning.config import ConfigError, PromptConfig
from prompt_tuning.methods import inits

KEY = jax.random.key(0)


def test_random_uniform_is_symmetric():
    rows = np.asarray(inits.random_uniform(KEY, (100, 64), 0.5))
    assert rows.min() < -0.49
    assert rows.max() > 0.49
    assert np.abs(rows).max() <= 0.5
    assert abs(rows.mean()) < 0.02


def test_sampled_vocab_takes_different_common_pieces():
    table = jnp.arange(40.0)[:, None] * jnp.ones((1, 4))
    rows = np.asarray(inits.sampled_vocab(KEY, table, 10, population=12))[:, 0]
    assert len(set(rows)) == 10
    assert rows.max() < 12
    everything = np.asarray(inits.sampled_vocab(KEY, table, 12, population=12))[:, 0]
    assert sorted(everything) == list(range(12))
    with pytest.raises(ConfigError, match=r"13 .*12"):
        inits.sampled_vocab(KEY, table, 13, population=12)


def test_class_labels_are_means_and_the_rest_is_sampled():
    table = jax.random.normal(KEY, (50, 4))
    rows = inits.class_labels(KEY, table, 6, [[3], [4, 5, 9]], population=20)
    np.testing.assert_allclose(rows[0], table[3])
    np.testing.assert_allclose(rows[1], (table[4] + table[5] + table[9]) / 3, rtol=1e-6)
    for row in np.asarray(rows[2:]):
        assert (np.abs(np.asarray(table[:20]) - row).max(axis=1) == 0).any()
    one = inits.class_labels(KEY, table, 1, [[3], [4]])
    np.testing.assert_allclose(one, table[3:4])
    with pytest.raises(ConfigError, match="1 is empty"):
        inits.class_labels(KEY, table, 6, [[3], []])


def test_text_fills_rows_in_order():
    table = jax.random.normal(KEY, (50, 4))
    rows = inits.from_text(KEY, table, 3, [7, 8, 9, 10])
    np.testing.assert_allclose(rows, table[jnp.array([7, 8, 9])])


def encode(text):
    return [ord(c) - ord("a") + 3 for c in text]


@pytest.mark.parametrize(
    ("config", "labels", "said"),
    [
        (PromptConfig(length=4), ("a", "b"), "class labels 'a', 'b'"),
        (PromptConfig(length=4), (), "4 of the 30 most common pieces"),
        (PromptConfig(length=4, class_labels=("c",)), ("a", "b"), "class labels 'c'"),
        (
            PromptConfig(length=4),
            "abcdefg",
            "labels 'a', 'b', 'c', 'd'; of the 7 labels 3 begin no",
        ),
        (PromptConfig(length=4, init="random_uniform"), ("a",), "uniform random in [-0.5, 0.5]"),
        (PromptConfig(length=4, init="text", text="abcdef"), (), "first 4 of 6 pieces"),
    ],
)
def test_init_prompt_says_what_it_did(config, labels, said):
    table = jax.random.normal(KEY, (30, 8))
    rows, text = inits.init_prompt(config, KEY, table, encode=encode, task_labels=labels)
    assert rows.shape == (4, 8)
    assert rows.dtype == np.float32
    assert said in text
    if config.init == "auto":
        assert "no initialisation" in text


def test_class_labels_without_labels_is_an_error():
    config = PromptConfig(length=4, init="class_labels")
    with pytest.raises(ConfigError, match="CLASS_LABELS"):
        inits.init_prompt(config, KEY, jnp.zeros((30, 8)), encode=encode)
