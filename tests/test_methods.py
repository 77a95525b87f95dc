"""Every method: its parameters, where it begins, its formula and gradient, its settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CONFIG

from prompt_tuning.config import ConfigError
from prompt_tuning.methods.method import Frozen, Start, first_params
from prompt_tuning.methods.table import METHODS, find_method, make_settings
from prompt_tuning.model.prompt import Prompt

P, D = 5, CONFIG.embed_dim
TABLE = np.random.default_rng(0).normal(size=(40, D)).astype(np.float32)
# Each method with its default settings made small, and each of its other forms.
VARIANTS = {
    "prompt_tuning": [{}],
}
CASES = [(name, values) for name, variants in VARIANTS.items() for values in variants]
every_variant = pytest.mark.parametrize(("name", "values"), CASES, ids=str)


def draw_rows(number):
    """Stands in no order of the table, so that a method that drew its own would differ."""
    return jnp.asarray(TABLE[3 : 3 + number])


def make(name, values, init="auto", seed=0, length=P):
    """The method's settings, its first parameters and its fold without dropout."""
    method = find_method(name)
    settings = make_settings(method, name, values)
    start = Start(jax.random.key(seed), CONFIG, length, draw_rows, init)
    params = first_params(name, method, settings, start, {})

    def fold(params, key=None):
        return method.fold(settings, params, Frozen(CONFIG, {}), key)

    return method, params, fold


def test_every_method_is_tested():
    assert set(VARIANTS) == set(METHODS)


@every_variant
def test_parameters_and_rows_are_as_declared(name, values):
    method, params, fold = make(name, values)
    assert list(params) == ["prompt"] or all(leaf.startswith("prompt/") for leaf in params)
    assert {value.dtype for value in params.values()} == {jnp.dtype(jnp.float32)}
    assert set(params) - set(method.fixed)
    prompt = fold(params)
    assert isinstance(prompt, Prompt)
    assert prompt.rows.shape == (P, D)
    assert prompt.rows.dtype == jnp.float32
    assert np.isfinite(prompt.rows).all()


@every_variant
def test_a_key_makes_the_same_parameters_again(name, values):
    _, first, _ = make(name, values)
    _, again, _ = make(name, values)
    _, other, _ = make(name, values, seed=1)
    assert first.keys() == again.keys() == other.keys()
    for leaf in first:
        np.testing.assert_array_equal(first[leaf], again[leaf])
    draws = name != "prompt_tuning" and name != "superpos"
    assert draws == any((first[leaf] != other[leaf]).any() for leaf in first)


@every_variant
def test_the_gradient_is_the_finite_difference(name, values):
    """In float64, along directions in which every parameter moves."""
    method, params, fold = make(name, values)
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        params = {
            leaf: jnp.asarray(np.asarray(value, np.float64)) for leaf, value in params.items()
        }
        weights = jnp.asarray(rng.normal(size=(P, D)))

        def loss(params):
            return (jnp.tanh(fold(params).rows) * weights).sum()

        gradient = jax.grad(loss)(params)
        for leaf in set(params) - set(method.fixed):
            direction = jnp.asarray(rng.normal(size=params[leaf].shape))
            ahead, behind = (
                loss({**params, leaf: params[leaf] + step * direction}) for step in (1e-5, -1e-5)
            )
            expected = float((gradient[leaf] * direction).sum())
            assert abs(expected) > 1e-8
            np.testing.assert_allclose((ahead - behind) / 2e-5, expected, rtol=1e-5, atol=1e-7)


# Where a method begins, and its formula --------------------------------------------------------


def test_prompt_tuning_is_its_rows():
    for init in find_method("prompt_tuning").starts:
        _, params, fold = make("prompt_tuning", {}, init)
        np.testing.assert_array_equal(fold(params).rows, TABLE[3 : 3 + P])


# Names and settings ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("prompt_tunning", "Did you mean prompt_tuning?"),
        ("no_such_module_at_all.METHOD", "no_such_module_at_all"),
        ("json.METHOD", "json"),
        ("METHOD", "no such method"),
        ("", "no such method"),
        (".METHOD", "no such method"),
    ],
)
def test_an_unknown_method_is_an_error(name, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        find_method(name)
