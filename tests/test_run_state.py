"""Run states: a killed run continues bit for bit, and a damaged state costs one period."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from prompt_tuning.checkpoints.run_state import RunStateStore
from prompt_tuning.config import ConfigError


class State(NamedTuple):
    """As the training loop has it: named fields, optax states inside."""

    step: jax.Array
    trainable: dict[str, jax.Array]
    opt_state: Any
    numbers: np.ndarray
    empty: jax.Array
    nothing: None = None


OPTIMIZER = optax.chain(
    optax.partition(
        {"train": optax.adafactor(0.3, min_dim_size_to_factor=8), "freeze": optax.set_to_zero()},
        {"prompt": "train", "other": "freeze"},
    ),
    optax.trace(0.9),
)


@jax.jit
def _advance(step: jax.Array, trainable: Any, opt_state: Any) -> tuple[jax.Array, Any, Any]:
    gradients = jax.tree.map(lambda x: jnp.sin(x * (step + 1)), trainable)
    updates, opt_state = OPTIMIZER.update(gradients, opt_state, trainable)
    return step + 1, optax.apply_updates(trainable, updates), opt_state


def advance(state: State) -> State:
    """One step of something like training."""
    step, trainable, opt_state = _advance(state.step, state.trainable, state.opt_state)
    return state._replace(step=step, trainable=trainable, opt_state=opt_state)


def make_state() -> State:
    key = jax.random.key(0)
    trainable = {
        "prompt": jax.random.normal(key, (16, 8)),
        "other": jax.random.normal(key, (4, 8), jnp.bfloat16),
    }
    return State(
        step=jnp.int32(0),
        trainable=trainable,
        opt_state=OPTIMIZER.init(trainable),
        numbers=np.array([2**40, -1]),
        empty=jnp.zeros((0, 8)),
    )


def assert_same(left: Any, right: Any) -> None:
    """Same structure, dtypes and bits."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def abstract(state: Any) -> Any:
    return jax.tree.map(
        lambda x: x if isinstance(x, np.ndarray) else jax.ShapeDtypeStruct(x.shape, x.dtype), state
    )


@pytest.mark.parametrize("describe", [lambda state: state, abstract])
def test_a_resumed_run_is_the_straight_run(
    tmp_path: Path, describe: Callable[[State], State]
) -> None:
    straight = make_state()
    for _ in range(10):
        straight = advance(straight)

    state = make_state()
    for _ in range(5):
        state = advance(state)
    with RunStateStore(tmp_path) as store:
        assert store.latest_step() is None
        assert store.read_meta() is None
        store.save(5, state, {"task": "boolq", "best": {"score": 0.1 + 0.2, "step": 4}})

    with RunStateStore(tmp_path) as store:  # as a new process has it
        assert store.latest_step() == 5
        meta = {"task": "boolq", "best": {"score": 0.1 + 0.2, "step": 4}}
        assert store.read_meta() == meta
        resumed, found = store.restore(describe(make_state()))
    assert found == meta
    assert_same(resumed, state)
    assert isinstance(resumed.numbers, np.ndarray)
    for _ in range(5):
        resumed = advance(resumed)
    assert_same(resumed, straight)


def test_restores_to_shardings(tmp_path: Path) -> None:
    state = {"kernel": jnp.arange(64.0).reshape(8, 8), "scale": jnp.ones(8), "step": jnp.int32(3)}
    with RunStateStore(tmp_path) as store:
        store.save(3, state)
        for grid in ((8, 1), (2, 4)):
            mesh = jax.make_mesh(grid, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
            wanted = {
                "kernel": jax.ShapeDtypeStruct(
                    (8, 8),
                    jnp.float32,
                    sharding=NamedSharding(mesh, PartitionSpec("data", "model")),
                ),
                "scale": jax.device_put(jnp.zeros(8), NamedSharding(mesh, PartitionSpec("model"))),
                "step": jax.device_put(jnp.int32(0), NamedSharding(mesh, PartitionSpec())),
            }
            restored, _ = store.restore(wanted)
            assert_same(restored, state)
            for name, leaf in wanted.items():
                assert restored[name].sharding == leaf.sharding
            store.save(3 + grid[1], restored)  # and from them
        assert_same(store.restore(state)[0], state)


def test_random_keys_are_state_too(tmp_path: Path) -> None:
    state = {"key": jax.random.key(7), "old_key": jax.random.PRNGKey(8)}
    with RunStateStore(tmp_path) as store:
        store.save(1, state)
        restored, _ = store.restore(state)
    for name in state:
        expected = jax.random.normal(state[name], (3,))
        np.testing.assert_array_equal(jax.random.normal(restored[name], (3,)), expected)


def test_what_is_saved_may_be_overwritten_at_once(tmp_path: Path) -> None:
    add_one = jax.jit(lambda x: x + 1, donate_argnums=0)
    array, numbers = jnp.zeros((1000, 1000)), np.zeros(1000)
    with RunStateStore(tmp_path) as store:
        for step in range(5):
            store.save(step, {"array": array, "numbers": numbers})
            numbers += 1
            for _ in range(3):
                array = add_one(array)
            store.wait()
            restored, _ = store.restore({"array": array, "numbers": numbers})
            assert (np.asarray(restored["array"]) == 3 * step).all()
            assert (restored["numbers"] == step).all()


def test_keeps_two_in_order(tmp_path: Path) -> None:
    with RunStateStore(tmp_path) as store:
        for step in (10, 20, 30):
            store.save(step, {"x": jnp.float32(step)})
        store.save(30, {"x": jnp.float32(-1)})  # there already
        store.wait()
        assert {p.name for p in tmp_path.iterdir()} == {"20", "30"}
        assert store.restore({"x": jnp.float32(0)})[0]["x"] == 30
        with pytest.raises(ValueError, match=r"25.*30"):
            store.save(25, {"x": jnp.float32(25)})


# ---- damage


def files(folder: Path, pattern: str) -> list[Path]:
    found = [p for p in sorted(folder.rglob(pattern)) if p.is_file()]
    assert found, f"Orbax's layout has changed: there is no {pattern}"
    return found


def truncate_arrays(folder: Path) -> None:
    for file in files(folder / "state", "d/*"):
        file.write_bytes(file.read_bytes()[:-7])


def flip_bits(folder: Path) -> None:
    """The smallest change of numbers: no length and no structure tells of it."""
    for file in files(folder / "state", "d/*"):
        data = bytearray(file.read_bytes())
        for place in range(len(data) // 4, len(data) // 2):
            data[place] ^= 1
        file.write_bytes(bytes(data))


def take_the_arrays_of_the_step_before(folder: Path) -> None:
    """Whole files of the right shapes: only their checksums tell."""
    shutil.rmtree(folder / "state")
    shutil.copytree(folder.parent / "1" / "state", folder / "state")


def take_the_name_of_the_next_step(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "1", folder)


def lose_arrays(folder: Path) -> None:
    shutil.rmtree(folder / "state")


def lose_list(folder: Path) -> None:
    (folder / "state" / "_METADATA").unlink()


def rename_leaf(folder: Path) -> None:
    """Looks like the state of another run."""
    file = folder / "state" / "_METADATA"
    file.write_text(file.read_text().replace("trainable/prompt", "trainable/pr0mpt"))


def lose_meta(folder: Path) -> None:
    shutil.rmtree(folder / "meta")


def change_meta(folder: Path) -> None:
    for file in files(folder / "meta", "metadata"):
        file.write_text(file.read_text().replace("boolq", "copa"))


def empty_meta(folder: Path) -> None:
    for file in files(folder / "meta", "metadata"):
        file.write_text("")


DAMAGES = [
    truncate_arrays,
    flip_bits,
    take_the_arrays_of_the_step_before,
    take_the_name_of_the_next_step,
    lose_arrays,
    lose_list,
    rename_leaf,
    lose_meta,
    change_meta,
    empty_meta,
]


def save_two(directory: Path) -> tuple[State, State]:
    first = advance(make_state())
    second = advance(first)
    with RunStateStore(directory) as store:
        store.save(1, first, {"task": "boolq", "step": 1})
        store.save(2, second, {"task": "boolq", "step": 2})
    return first, second


# Orbax leaves reads behind when one of several fails; they complain when its event loop is gone.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_costs_one_period(
    tmp_path: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = save_two(tmp_path)
    damage(tmp_path / "2")
    with RunStateStore(tmp_path) as store:
        meta = store.read_meta()
        assert meta is not None
        assert meta["step"] in (1, 2)
        restored, meta = store.restore(make_state())
        assert_same(restored, first)
        assert meta["step"] == store.latest_step() == 1
        said = capsys.readouterr().out
        assert said.count("\n") == 1
        assert "the saved state of step 2 is damaged" in said
        assert "continuing from step 1" in said
        assert os.path.lexists(tmp_path / "damaged_2")
        store.save(2, second)  # the way is free again
        assert_same(store.restore(make_state())[0], second)
    with RunStateStore(tmp_path) as store:
        assert store.latest_step() == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_when_all_are_damaged_nothing_is_touched(tmp_path: Path) -> None:
    save_two(tmp_path)
    truncate_arrays(tmp_path / "1")
    lose_meta(tmp_path / "2")
    with RunStateStore(tmp_path) as store:
        with pytest.raises(ConfigError, match=r"step 2: .*step 1"):
            store.restore(make_state())
        assert store.latest_step() == 2
    assert {p.name for p in tmp_path.iterdir()} == {"1", "2"}


def test_no_state_is_an_error(tmp_path: Path) -> None:
    with RunStateStore(tmp_path / "new") as store, pytest.raises(ConfigError, match="is no saved"):
        store.restore(make_state())
    with pytest.raises(ConfigError, match="gs://b/checkpoints"):
        RunStateStore("gs://b/checkpoints")


def test_the_state_of_another_run_is_refused(tmp_path: Path) -> None:
    save_two(tmp_path)
    state = make_state()
    longer = state._replace(trainable={**state.trainable, "prompt": jnp.zeros((17, 8))})
    wider = state._replace(trainable={**state.trainable, "other": jnp.zeros((4, 8))})
    more = state._replace(trainable={**state.trainable, "bias": jnp.zeros(3)})
    fewer = state._replace(opt_state=())
    with RunStateStore(tmp_path) as store:
        for other, message in (
            (longer, r"trainable/prompt is float32\[16, 8\], this run has float32\[17, 8\]"),
            (wider, r"trainable/other is bfloat16\[4, 8\], this run has float32\[4, 8\]"),
            (more, "trainable/bias is missing"),
            (fewer, "opt_state/.* is unknown"),
        ):
            with pytest.raises(ConfigError, match=message):
                store.restore(other)
        assert store.latest_step() == 2


@pytest.mark.slow
def test_a_run_killed_while_saving_continues(tmp_path: Path) -> None:
    """A real process, killed without warning while the second state is being written."""
    program = """
        import os, signal, sys, threading, time
        import jax.numpy as jnp
        from pathlib import Path
        from prompt_tuning.checkpoints.run_state import RunStateStore

        directory = Path(sys.argv[1])
        store = RunStateStore(directory)
        store.save(1, {"x": jnp.ones((64, 64)), "y": jnp.ones((4000, 4000))}, {"step": 1})
        store.wait()

        def kill():
            while not any(p.name.startswith("2") for p in directory.iterdir()):
                time.sleep(0.0005)
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=kill, daemon=True).start()
        store.save(2, {"x": 2 * jnp.ones((64, 64)), "y": jnp.zeros((4000, 4000))}, {"step": 2})
        store.wait()
        time.sleep(10)
    """
    environment = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)],
        env=environment,
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    wanted = {"x": jnp.zeros((64, 64)), "y": jnp.zeros((4000, 4000))}
    with RunStateStore(tmp_path) as store:
        restored, meta = store.restore(wanted)
        step = meta["step"]
        assert step == store.latest_step()
        assert float(restored["x"][0, 0]) == step
        assert float(restored["y"].sum()) == (16e6 if step == 1 else 0)
        store.save(3, restored, {"step": 3})
        store.wait()
    assert not [p for p in tmp_path.iterdir() if "tmp" in p.name]
