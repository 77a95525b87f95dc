"""Every method: its parameters, where it begins, its formula and gradient, its settings."""

import dataclasses
import functools
import importlib
import sys
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CONFIG, MODEL, apply_t5, random_params

from prompt_tuning.config import (
    ConfigError,
    CorpusConfig,
    DataConfig,
    Experiment,
    PromptConfig,
    TrainConfig,
    gin_reader,
)
from prompt_tuning.methods.inits import STARTS
from prompt_tuning.methods.method import Frozen, Start, check_prompt, first_params
from prompt_tuning.methods.shared_prompt import fold_rows
from prompt_tuning.methods.table import METHODS, find_method, make_settings
from prompt_tuning.model import t5
from prompt_tuning.model.prompt import Prompt
from prompt_tuning.prompts import prompt_file
from prompt_tuning.session import session

P, D = 5, CONFIG.embed_dim
TABLE = np.random.default_rng(0).normal(size=(40, D)).astype(np.float32)
# Each method with its default settings made small, and each of its other forms.
VARIANTS = {
    "prompt_tuning": [{}],
    "p_tuning": [{"hidden": 6}, {"encoder": "lstm", "hidden": 3}],
    "residual": [{"hidden": 7}],
    "superpos": [{"tokens": 9}, {"tokens": 9, "train_tokens": True}],
    "low_rank": [
        {"rank": 3},
        {"form": "dpt", "rank": 3},
        {"form": "dpt", "rank": 8},
        {"form": "lopt2", "rank": 3},
    ],
    "prefix_tuning": [{}, {"hidden": 3, "cross": False}],
    "p_tuning_v2": [{}],
    "shared_prompt": [{}],
    "multitask": [{}, {"form": "concat"}, {"form": "project"}],
    "mpt": [{}],
}
TASKS = ("first", "second", "third")
CASES = [(name, values) for name, variants in VARIANTS.items() for values in variants]
every_variant = pytest.mark.parametrize(("name", "values"), CASES, ids=str)
FIRST = [variants[0] for variants in VARIANTS.values()]
first_variants = pytest.mark.parametrize(
    ("name", "values"),
    [
        pytest.param(*case, marks=[] if case[1] in FIRST else pytest.mark.slow, id=f"{case}")
        for case in CASES
    ],
)


def draw_rows(number):
    """Stands in no order of the table, so that a method that drew its own would differ."""
    return jnp.asarray(TABLE[3 : 3 + number])


def make(name, values, init="auto", seed=0, length=P, model=CONFIG):
    """The method's settings, its first parameters and its fold without dropout."""
    method = find_method(name)
    settings = make_settings(method, name, values)
    reads = "rows" not in method.fields
    backbone = random_params(model) if reads else {}
    start = Start(jax.random.key(seed), model, length, draw_rows, init, TASKS, backbone)
    params = first_params(name, method, settings, start)

    def fold(params, key=None):
        return fold_compiled(method.fold, settings, model, params, backbone, key)

    return method, params, fold


# Compiled: operation by operation, each is a program of its own.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def fold_compiled(fold, settings, model, params, backbone, key):
    return fold(settings, params, Frozen(model, backbone), key)


def test_every_method_is_tested():
    assert set(VARIANTS) == set(METHODS)


@every_variant
def test_parameters_and_rows_are_as_declared(name, values):
    method, params, fold = make(name, values)
    assert list(params) == ["prompt"] or all(leaf.startswith("prompt/") for leaf in params)
    assert {value.dtype for value in params.values()} == {jnp.dtype(jnp.float32)}
    assert set(params) - set(method.fixed)
    prompt = fold(params)
    members = TASKS if method.members else ()
    check_prompt(name, method, prompt, Start(None, CONFIG, P, draw_rows, tasks=members))
    assert all(np.isfinite(field).all() for field in jax.tree.leaves(prompt))
    filled = {field for field in Prompt._fields if getattr(prompt, field) is not None}
    assert filled - {"rows"} <= set(method.fields)
    axes = (len(TASKS),) if method.members else ()
    assert prompt.rows.shape == (*axes, P if "rows" in method.fields else 0, D)


@every_variant
def test_a_key_makes_the_same_parameters_again(name, values):
    first, again, other = (
        {leaf: np.asarray(value) for leaf, value in make(name, values, seed=seed)[1].items()}
        for seed in (0, 0, 1)
    )
    assert first.keys() == again.keys() == other.keys()
    for leaf in first:
        np.testing.assert_array_equal(first[leaf], again[leaf])
    draws = name not in ("prompt_tuning", "superpos", "shared_prompt", "multitask", "mpt")
    assert draws == any((first[leaf] != other[leaf]).any() for leaf in first)


@every_variant
def test_no_two_parameters_are_drawn_with_one_key(name, values):
    """One key makes one array the beginning of another, up to scale. All tasks begin alike."""
    _, params, _ = make(name, {**values, "hidden": 30} if "hidden" in values else values)
    others = tuple(f"/{task}/" for task in TASKS[1:])
    params = {n: np.asarray(v) for n, v in params.items() if not any(t in n for t in others)}
    drawn = [np.ravel(value) for value in params.values() if np.std(value) > 0 and value.size > 20]
    for i, first in enumerate(drawn):
        for second in drawn[:i]:
            size = min(first.size, second.size)
            assert abs(np.corrcoef(first[:size], second[:size])[0, 1]) < 0.9


@first_variants
def test_the_gradient_is_the_finite_difference(name, values):
    """In float64, along directions in which every parameter moves; a T5 is float32 in any case."""
    method, params, fold = make(name, values)
    rng, step, error = np.random.default_rng(0), 1e-5, 1e-5
    if method.visibility == "prompt":
        step, error = 1e-2, 1e-2
    with jax.enable_x64(True):
        params = {
            leaf: jnp.asarray(np.asarray(value, np.float64)) for leaf, value in params.items()
        }
        shapes = jax.tree.leaves(jax.eval_shape(fold, params))
        weights = [jnp.asarray(rng.normal(size=leaf.shape)) for leaf in shapes]

        def loss(params):
            fields = zip(jax.tree.leaves(fold(params)), weights, strict=True)
            return sum((jnp.tanh(field) * weight).sum() for field, weight in fields)

        both = jax.jit(jax.value_and_grad(loss))
        _, gradient = both(params)
        for leaf in set(params) - set(method.fixed):
            direction = jnp.asarray(rng.normal(size=params[leaf].shape))
            ahead, behind = (
                both({**params, leaf: params[leaf] + by * direction})[0] for by in (step, -step)
            )
            expected = float((gradient[leaf] * direction).sum())
            assert abs(expected) > 1e-8
            found = (ahead - behind) / (2 * step)
            np.testing.assert_allclose(found, expected, rtol=error, atol=1e-7)


# Where a method begins, and its formula --------------------------------------------------------


ROWS = TABLE[3 : 3 + P].astype(np.float64)


def relu(x):
    return np.maximum(x, 0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def moved(name, values, init="auto"):
    """The fold of parameters that have moved from where they begin, and those in float64."""
    _, params, fold = make(name, values, init)
    rng = np.random.default_rng(1)
    params = {
        leaf: np.asarray(value) + rng.normal(size=value.shape).astype(np.float32) / 2
        for leaf, value in params.items()
    }
    rows = np.asarray(fold({leaf: jnp.asarray(value) for leaf, value in params.items()}).rows)
    return rows, {leaf[len("prompt/") :]: np.float64(value) for leaf, value in params.items()}


@pytest.mark.parametrize("init", ["auto", *STARTS])
def test_prompt_tuning_is_its_rows(init):
    _, params, fold = make("prompt_tuning", {}, init)
    np.testing.assert_array_equal(fold(params).rows, ROWS)


def test_p_tuning_with_an_mlp():
    rows, p = moved("p_tuning", {"hidden": 6})
    x = p["embedding"]
    for layer in range(3):
        x = (relu(x) if layer else x) @ p[f"mlp_{layer}_kernel"] + p[f"mlp_{layer}_bias"]
    np.testing.assert_allclose(rows, x, rtol=1e-5, atol=1e-5)


def test_p_tuning_with_an_lstm():
    """Against a loop over rows, directions and layers, as PyTorch defines its LSTM."""
    rows, p = moved("p_tuning", {"encoder": "lstm", "hidden": 3})
    x = p["embedding"]
    for layer in range(2):
        outputs = {}
        for direction, order in (("forward", range(P)), ("backward", range(P - 1, -1, -1))):
            name = f"lstm_{layer}_{direction}"
            y, c = np.zeros(3), np.zeros(3)
            for row in order:
                gates = x[row] @ p[f"{name}_input_kernel"] + p[f"{name}_input_bias"]
                gates = gates + y @ p[f"{name}_state_kernel"] + p[f"{name}_state_bias"]
                i, f, g, o = gates[0:3], gates[3:6], gates[6:9], gates[9:12]
                c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
                y = sigmoid(o) * np.tanh(c)
                outputs[direction, row] = y
        x = np.array([[*outputs["forward", r], *outputs["backward", r]] for r in range(P)])
    for layer in range(2):
        x = (relu(x) if layer else x) @ p[f"mlp_{layer}_kernel"] + p[f"mlp_{layer}_bias"]
    np.testing.assert_allclose(rows, x, rtol=1e-5, atol=1e-5)


def test_p_tuning_begins_as_published_or_with_rows():
    for encoder in ("mlp", "lstm"):
        _, normal, _ = make("p_tuning", {"encoder": encoder}, length=60)
        assert abs(normal["prompt/embedding"].mean()) < 0.1
        assert abs(normal["prompt/embedding"].std() - 1) < 0.1
        _, text, _ = make("p_tuning", {"encoder": encoder}, "text")
        np.testing.assert_array_equal(text["prompt/embedding"], ROWS)


def test_only_a_key_drops_out_and_only_between_the_layers_of_an_lstm():
    _, params, fold = make("p_tuning", {"encoder": "lstm", "hidden": 4, "dropout": 0.5})
    _, _, without = make("p_tuning", {"encoder": "lstm", "hidden": 4})
    np.testing.assert_array_equal(fold(params).rows, without(params).rows)
    key, other = jax.random.split(jax.random.key(3))
    np.testing.assert_array_equal(fold(params, key).rows, fold(params, key).rows)
    assert (fold(params, key).rows != fold(params, other).rows).any()
    assert (fold(params, key).rows != fold(params).rows).any()
    np.testing.assert_array_equal(without(params, key).rows, without(params).rows)


def test_what_an_lstm_drops_out_is_right_on_average():
    """While the second layer hardly sees its input, the rows are linear in what is dropped."""
    _, params, fold = make("p_tuning", {"encoder": "lstm", "hidden": 4, "dropout": 0.5})

    def rows(scale, key=None):
        changed = {
            name: value * scale if "lstm_1" in name and name.endswith("input_kernel") else value
            for name, value in params.items()
        }
        return np.asarray(fold(changed, key).rows if key is None else draw(changed, key))

    draw = jax.jit(lambda p, keys: jax.vmap(lambda key: fold(p, key).rows)(keys).mean(axis=0))
    keys = jax.random.split(jax.random.key(0), 2000)
    whole, mean = rows(0.01) - rows(0.0), rows(0.01, keys) - rows(0.0)
    assert np.linalg.norm(mean - whole) < 0.1 * np.linalg.norm(whole)


def test_residual():
    rows, p = moved("residual", {"hidden": 7})
    x = relu(p["rows"] @ p["down_kernel"] + p["down_bias"]) @ p["up_kernel"] + p["up_bias"]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    expected = p["rows"] + x * p["norm_scale"] + p["norm_bias"]
    np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("init", ["auto", *STARTS])
def test_residual_begins_near_its_rows(init):
    """By a normalised row, whose norm is sqrt(D)."""
    _, params, fold = make("residual", {}, init)
    np.testing.assert_array_equal(params["prompt/rows"], ROWS)
    branch = fold(params).rows - ROWS
    np.testing.assert_allclose(np.linalg.norm(branch, axis=1), np.sqrt(D), rtol=1e-3)


def test_superpos():
    rows, p = moved("superpos", {"tokens": 9, "train_tokens": True})
    expected = [
        sum(
            p["weights"][i, j] * (p["fixed_tokens"][j] + p["token_changes"][i, j]) for j in range(9)
        )
        for i in range(P)
    ]
    np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("values", VARIANTS["superpos"])
def test_superpos_begins_as_its_first_tokens(values):
    for init in ("auto", *find_method("superpos").starts):
        _, params, fold = make("superpos", values, init)
        np.testing.assert_array_equal(params["prompt/fixed_tokens"], TABLE[3 : 3 + 9])
        np.testing.assert_array_equal(fold(params).rows, ROWS)


def test_low_rank():
    rows, p = moved("low_rank", {"rank": 3})
    expected = (p["codes"] @ p["fixed_basis"]) * p["scale"] + p["shift"]
    np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-5)
    rows, p = moved("low_rank", {"form": "dpt", "rank": 3})
    np.testing.assert_allclose(rows, p["codes"] @ p["basis"], rtol=1e-5, atol=1e-5)
    rows, p = moved("low_rank", {"form": "lopt2", "rank": 3})
    expected = relu(p["fixed_rows"] @ p["down"]) @ p["up"]
    np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-5)


def test_low_rank_begins_as_published():
    _, ulpt, fold = make("low_rank", {"rank": 64}, length=60)
    np.testing.assert_allclose(fold(ulpt).rows.std(), 8, rtol=0.1)  # sqrt(r)
    assert (ulpt["prompt/scale"] == 1).all()
    assert (ulpt["prompt/shift"] == 0).all()
    _, dpt, _ = make("low_rank", {"form": "dpt", "rank": 64}, length=60)
    for leaf in dpt.values():
        assert 0.49 < jnp.abs(leaf).max() <= 0.5


@pytest.mark.parametrize("init", STARTS)
def test_low_rank_begins_as_near_to_its_rows_as_it_can(init):
    def distance(values):
        _, params, fold = make("low_rank", values, init)
        return float(np.linalg.norm(fold(params).rows - ROWS)), params

    # A fixed basis: what is left is orthogonal to it.
    left, params = distance({"rank": 3})
    basis = np.float64(params["prompt/fixed_basis"])
    centred = ROWS - ROWS.mean(0)
    projection = centred @ np.linalg.pinv(basis) @ basis
    np.testing.assert_allclose(left, np.linalg.norm(centred - projection), rtol=1e-5)
    assert distance({"rank": D})[0] < 1e-3
    # A basis of its own: the singular values that are left out.
    values = np.linalg.svd(ROWS, compute_uv=False)
    for rank in (1, 3, P, P + 4):
        left, params = distance({"form": "dpt", "rank": rank})
        np.testing.assert_allclose(left, np.linalg.norm(values[rank:]), rtol=1e-5, atol=1e-5)
        assert params["prompt/codes"].shape == (P, rank)
    assert jnp.abs(params["prompt/basis"][P:]).min(axis=1).all()  # rows that can still be learned
    assert distance({"form": "lopt2", "rank": 3})[0] < np.linalg.norm(ROWS)
    assert distance({"form": "lopt2", "rank": 64})[0] < 1e-3


def test_prefix_tuning_with_an_mlp():
    _, params, fold = make("prefix_tuning", {"hidden": 3, "decoder": False})
    rng = np.random.default_rng(1)
    params = {n: v + jnp.asarray(rng.normal(size=v.shape), jnp.float32) for n, v in params.items()}
    p = {leaf[len("prompt/") :]: np.float64(value) for leaf, value in params.items()}
    prompt = fold(params)
    assert prompt.decoder is None
    for place in ("encoder", "cross"):
        hidden = np.tanh(p[f"{place}_rows"] @ p[f"{place}_in_kernel"] + p[f"{place}_in_bias"])
        made = hidden @ p[f"{place}_out_kernel"] + p[f"{place}_out_bias"]
        for layer in range(2):
            for number in range(2):
                found = np.asarray(getattr(prompt, place))[layer, number].reshape(P, -1)
                at = (layer * 2 + number) * D
                np.testing.assert_allclose(found, made[:, at : at + D], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("values", [{}, {"hidden": 7}, {"dropout": 0.5}], ids=str)
def test_a_prefix_begins_with_draws_or_as_the_keys_and_values_of_rows(values):
    _, drawn, fold = make("prefix_tuning", values, length=60)
    if "hidden" not in values:
        assert abs(np.asarray(drawn["prompt/cross"]).std() - 1) < 0.1
    _, params, fold = make("prefix_tuning", values, "text")
    backbone, rows = random_params(), jnp.asarray(ROWS, jnp.float32)[None]
    states, expected = t5.encode_keys_values(MODEL, backbone, rows, jnp.ones((1, P), bool))
    found = fold(params)
    np.testing.assert_allclose(found.encoder, expected[0], atol=1e-4)
    cross = apply_t5(MODEL, backbone, "cross_keys_values", states)
    np.testing.assert_allclose(found.cross, cross[0], atol=1e-4)
    dropped = np.asarray(fold(params, jax.random.key(1)).decoder)
    kept = np.isclose(dropped, np.asarray(found.decoder) * (2 if "dropout" in values else 1))
    assert (kept | (dropped == 0)).all()
    assert (kept.mean() < 0.9) == ("dropout" in values)


def test_a_shared_prompt_is_what_the_encoder_makes_of_its_rows():
    _, params, fold = make("shared_prompt", {})
    np.testing.assert_array_equal(params["prompt"], ROWS.astype(np.float32))
    valid = jnp.ones((1, P), bool)
    states = apply_t5(MODEL, random_params(), "encode", params["prompt"][None], valid)
    np.testing.assert_allclose(fold(params).memory, states[0], atol=1e-5)


def test_multitask():
    """The members are in the order of the tasks' names."""
    rows, p = moved("multitask", {})
    assert rows.shape == (3, P, D)
    for found, task in zip(rows, TASKS, strict=True):
        np.testing.assert_allclose(found, p["shared"] + p[f"{task}/rows"], rtol=1e-5, atol=1e-5)
    rows, p = moved("multitask", {"form": "project"})
    for found, task in zip(rows, TASKS, strict=True):
        expected = p["shared"] @ p[f"{task}/kernel"] + p[f"{task}/bias"]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    rows, p = moved("multitask", {"form": "concat", "task_length": 2})
    assert p["shared"].shape == (P - 2, D)
    for found, task in zip(rows, TASKS, strict=True):
        np.testing.assert_array_equal(found, [*p["shared"], *p[f"{task}/rows"]])


def test_mpt():
    rows, p = moved("mpt", {})
    for found, task in zip(rows, TASKS, strict=True):
        expected = p["shared"] * np.outer(p[f"{task}/of_rows"], p[f"{task}/of_columns"])
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "values"), [case for case in CASES if find_method(case[0]).members], ids=str
)
def test_every_task_begins_as_the_first_rows(name, values):
    for init in ("auto", *STARTS):
        _, params, fold = make(name, values, init)
        known = P - P // 2 if (init, values) == ("file", {"form": "concat"}) else P
        for rows in np.asarray(fold(params).rows):
            np.testing.assert_array_equal(rows[:known], ROWS[:known])
            assert np.abs(rows[known:]).max(initial=0) <= 0.5


def test_a_run_on_one_task_has_one_member():
    method, settings = find_method("mpt"), make_settings(find_method("mpt"), "mpt", {})
    start = Start(jax.random.key(0), CONFIG, P, draw_rows, tasks=("only",))
    params = first_params("mpt", method, settings, start)
    assert set(params) == {"prompt/shared", "prompt/only/of_rows", "prompt/only/of_columns"}
    rows = method.fold(settings, params, Frozen(CONFIG, {}), None).rows
    np.testing.assert_array_equal(rows, ROWS[None])


def test_members_are_in_the_order_of_names_not_of_arrays():
    """The names of arrays have another order: "a.b/rows" is before "a/rows"."""
    method, settings = find_method("multitask"), make_settings(find_method("multitask"), "", {})
    start = Start(jax.random.key(0), CONFIG, P, draw_rows, tasks=("a", "a.b", "b"))
    params = first_params("multitask", method, settings, start)
    for number, task in enumerate(start.tasks):
        params[f"prompt/{task}/rows"] += number
    rows = jax.jit(lambda p: method.fold(settings, p, Frozen(CONFIG, {}), None).rows)(params)
    np.testing.assert_allclose(
        rows - ROWS, np.arange(3)[:, None, None] * np.ones((P, D)), atol=1e-5
    )


# The sizes that the papers and their code have at D = 768, and what they train.
SIZES = [
    ("prompt_tuning", {}, 100, 100 * 768),
    ("residual", {}, 10, 10 * 768 + 1_230_368 + 2 * 768),
    ("superpos", {}, 100, 12_800),
    ("low_rank", {"rank": 2}, 100, 2 * 100 + 2 * 768),
    ("low_rank", {"rank": 64}, 100, 7_936),
    ("low_rank", {"form": "dpt", "rank": 10}, 100, 8_680),
    ("low_rank", {"form": "lopt2", "rank": 5}, 20, 2 * 5 * 768),
    ("p_tuning", {}, 20, 20 * 768 + 768 * 128 + 128 + 128 * 128 + 128 + 128 * 768 + 768),
    ("p_tuning", {"encoder": "lstm", "hidden": 384}, 24, 8_289_792),  # LAMA's 8.29 M
    ("prefix_tuning", {}, 20, 1_105_920),
    ("prefix_tuning", {"decoder": False, "cross": False, "hidden": 512}, 20, 9_864_704),
    ("p_tuning_v2", {}, 20, 368_640),
    ("shared_prompt", {}, 100, 100 * 768),
    ("multitask", {}, 100, 4 * 100 * 768),
    ("multitask", {"form": "concat"}, 100, 50 * 768 + 3 * 50 * 768),
    ("multitask", {"form": "project"}, 100, 100 * 768 + 3 * (768 * 768 + 768)),
    ("mpt", {}, 100, 100 * 768 + 3 * (100 + 768)),
]


@pytest.mark.parametrize(("name", "values", "length", "expected"), SIZES, ids=str)
def test_as_many_parameters_as_published(name, values, length, expected):
    method = find_method(name)
    config = dataclasses.replace(
        CONFIG,
        embed_dim=768,
        num_heads=12,
        head_dim=64,
        num_encoder_layers=12,
        num_decoder_layers=12,
    )
    settings = make_settings(method, name, values)

    def init(key):
        return method.init(
            settings, Start(key, config, length, lambda n: jnp.ones((n, 768)), tasks=TASKS)
        )

    key = jax.random.key(0)  # low_rank begins with what numpy makes of the rows
    params = init(key) if name == "low_rank" else jax.eval_shape(init, key)
    assert sum(v.size for leaf, v in params.items() if leaf not in method.fixed) == expected


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


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("prompt_tuning", {"rank": 3}, "no such setting. Expected an empty dict"),
        ("p_tuning", {"hiden": 3}, "Did you mean hidden?"),
        ("p_tuning", {"hidden": "3"}, "Expected an integer"),
        ("p_tuning", {"hidden": True}, "Expected an integer"),
        ("p_tuning", {"hidden": 0}, "'hidden': 0"),
        ("p_tuning", {"encoder": "gru"}, "one of 'mlp', 'lstm'"),
        ("p_tuning", {"dropout": 0.1}, "'dropout': 0.1"),
        ("p_tuning", {"encoder": "lstm", "dropout": 1.0}, "'dropout': 1.0"),
        ("residual", {"hidden": -1}, "'hidden': -1"),
        ("superpos", {"tokens": 0}, "'tokens': 0"),
        ("superpos", {"train_tokens": 1}, "Expected True or False"),
        ("low_rank", {"rank": 0}, "'rank': 0"),
        ("low_rank", {"rank": 2.0}, "Expected an integer"),
        ("low_rank", {"form": "lopt"}, "one of 'ulpt', 'dpt', 'lopt2'"),
        ("low_rank", {3: 3}, "no such setting"),
        ("multitask", {"form": "multiply"}, "one of 'add', 'concat', 'project'"),
        ("multitask", {"task_length": 3}, "'task_length': 3"),
        ("multitask", {"form": "concat", "task_length": 0}, "'task_length': 0"),
    ],
)
def test_a_wrong_setting_is_an_error(name, values, message):
    with pytest.raises(ConfigError) as error:
        make_settings(find_method(name), name, values)
    assert "PROMPT_SETTINGS" in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_gin_file_states_its_defaults(name):
    prompt = gin_reader.load(["demo.gin", f"methods/{name}.gin"]).run.prompt
    assert prompt.method == name
    method = find_method(name)
    assert prompt.settings.keys() == {field.name for field in dataclasses.fields(method.Settings)}
    assert make_settings(method, name, prompt.settings) == method.Settings()


def test_an_integer_is_a_number():
    method = find_method("p_tuning")
    settings = make_settings(method, "p_tuning", {"encoder": "lstm", "dropout": 0})
    assert repr(settings.dropout) == "0.0"


def test_a_method_refuses_a_start_that_its_formula_does_not_allow():
    for init in ("random_uniform", "file"):
        with pytest.raises(ConfigError, match=f"PROMPT_INIT = '{init}'.*'class_labels'"):
            make("superpos", {}, init)
    with pytest.raises(ConfigError, match="PROMPT_LENGTH = 10"):
        make("superpos", {"tokens": 9}, length=10)
    for length, values in ((1, {}), (3, {"task_length": 3})):
        with pytest.raises(ConfigError, match=f"PROMPT_LENGTH = {length}.*'concat'"):
            make("multitask", {"form": "concat", **values}, length=length)


# A user's own method ---------------------------------------------------------------------------

OWN = """
import dataclasses

import jax.numpy as jnp

from prompt_tuning.methods.method import Method
from prompt_tuning.model.prompt import Prompt


@dataclasses.dataclass(frozen=True)
class Settings:
    start: float = 2.0


def init(settings, start):
    scale = jnp.full((), settings.start, jnp.float32)
    return {"prompt/rows": start.draw_rows(start.length), "prompt/scale": scale}


def fold(settings, params, frozen, key):
    return Prompt(rows=params["prompt/rows"] * params["prompt/scale"])


METHOD = Method(Settings, init, fold, starts=("sampled_vocab",))
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """Writes a module into the working directory and returns its name, a new one for each text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])

    def write(text):
        name = f"own_method_{abs(hash(text))}"
        (tmp_path / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        return f"{name}.METHOD"

    return write


def test_a_method_of_the_users_own(own_module):
    name = own_module(OWN)
    _, params, fold = make(name, {"start": 3})
    np.testing.assert_array_equal(fold(params).rows, 3 * TABLE[3 : 3 + P])
    with pytest.raises(ConfigError, match="PROMPT_INIT = 'text'"):
        make(name, {}, "text")
    with pytest.raises(ConfigError, match="Did you mean METHOD"):
        find_method(name.lower())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('{"prompt/rows"', '{"rows"', "parameter 'rows'. Expected 'prompt'"),
        ('{"prompt/rows"', '{"prompt"', "parameter 'prompt'. Expected 'prompt' alone"),
        ('{"prompt/rows"', '{"prompt/"', "parameter 'prompt/'"),
        ("return {", "return []  # {", "returns list"),
        ("(), settings.start, jnp.float32", "(), 2", "'prompt/scale' as int32"),
        ("jnp.full((), settings.start, jnp.float32)", "2.0", "'prompt/scale' as float"),
        ("Prompt(rows=", "(", "Expected a Prompt"),
        ("Prompt(rows=", "Prompt(memory=jnp.zeros((1, 32)), rows=", "memory.*`fields`"),
        ("start.draw_rows(start.length)", "start.draw_rows(2)", r"\(2, 32\)"),
        ('* params["prompt/scale"]', "[:, :3]", r"\(5, 3\)"),
        ('* params["prompt/scale"]', ", lengths=jnp.ones(5, int)", "returns lengths"),
        ("starts=", "members=True, starts=", r"Expected \(3, 5, 32\).*these tasks"),
        ("Prompt(rows=", "Prompt(rows=jnp.float16(1) + 0 * jnp.float16(", "float16"),
        (
            'starts=("sampled_vocab",)',
            'starts=(), fixed=("prompt/rows", "prompt/scale")',
            "only parameters that its `fixed` names",
        ),
        ("METHOD = Method(", "METHOD = dict(Settings=", "has no Method of that name"),
        ("METHOD = Method(Settings", "METHOD = Method(dict", "Expected a frozen dataclass"),
        ("import dataclasses", "import no_such_package", "no_such_package'"),
        ("import dataclasses", "1 / 0", "ZeroDivisionError"),
    ],
)
def test_a_wrong_method_of_the_users_own_is_an_error(own_module, old, new, message):
    assert old in OWN
    text = OWN.replace(old, new, 1)
    if "dict(Settings=" in new:
        text = text.replace("Settings, init, fold, starts", "Settings, init=1, fold=1, starts")
    if "float16(1)" in new:
        text = text.replace('params["prompt/scale"])', 'params["prompt/scale"]))')
    with pytest.raises(ConfigError, match=message):
        make(own_module(text), {})


# Where a method cannot be used ------------------------------------------------------------------


def open_run(name, values=(), *, model=CONFIG, trainable="prompt", objective="task"):
    """Opens the session of a run on a checkpoint that is not there."""
    run = Experiment(
        model_dir="run",
        initial_checkpoint_path="nowhere",
        model=model,
        data=DataConfig(
            mixture_or_task_name="tiny_mood",
            task_feature_lengths={"inputs": 16, "targets": 4},
            vocabulary="bytes",
            batch_size=8,
        ),
        corpus=CorpusConfig(objective=objective),
        prompt=PromptConfig(length=P, method=name, settings=dict(values)),
        train=TrainConfig(train_steps_relative=1, trainable=trainable),
    )
    with pytest.raises(ConfigError) as error:
        session.open_session(run)
    return str(error.value)


CUDNN = dataclasses.replace(CONFIG, attention="cudnn", dtype="bfloat16")


@pytest.mark.parametrize(
    ("name", "values", "refused"),
    [
        ("prefix_tuning", {}, True),
        ("prefix_tuning", {"encoder": False}, False),
        ("p_tuning_v2", {}, True),
        ("shared_prompt", {}, True),
        ("residual", {}, False),
    ],
)
def test_cudnns_attention_takes_no_prefix_of_the_encoder(name, values, refused):
    message = open_run(name, values, model=CUDNN)
    assert (f"PROMPT_METHOD = {name!r}" in message) == refused
    assert "ATTENTION = 'xla'" in message  # these devices have no cuDNN either


def test_nor_of_a_prompt_that_is_scored():
    """A shared prompt too, whose fold is computed without cuDNN."""
    frozen, rows = Frozen(CUDNN, random_params()), draw_rows(P)
    prompt = fold_rows(rows, frozen)
    plain = fold_rows(rows, Frozen(CONFIG, frozen.params))
    np.testing.assert_array_equal(prompt.encoder, plain.encoder)
    for model, refused in ((CUDNN, True), (CONFIG, False)):
        with pytest.raises(ConfigError, match="ATTENTION") if refused else nullcontext():
            prompt_file.check_prompt(prompt, None, shape=(None, D), model=model, where="x")


@pytest.mark.parametrize("name", [name for name in METHODS if name != "prompt_tuning"])
def test_a_run_that_trains_the_model_has_no_method(name):
    message = open_run(name, trainable="model")
    assert message.startswith(f"PROMPT_METHOD = {name!r}")
    assert "TRAINABLE = 'model'" in message
    message = open_run(name, trainable="model", objective="span_corruption")
    assert "OBJECTIVE = 'span_corruption'" in message
    assert "nowhere" in open_run("prompt_tuning", trainable="model")


def test_settings_of_a_method_are_checked_before_anything_is_read():
    assert "Did you mean hidden?" in open_run("residual", {"hiden": 3})
