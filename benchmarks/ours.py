"""One measurement of this project's step, in a process of its own."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from prompt_tuning.runtime import startup

STARTED = time.perf_counter()
startup.prepare()  # as the command does

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import Mesh, NamedSharding  # noqa: E402
from workload import Workload, main, measure  # noqa: E402

from prompt_tuning.api import model_config  # noqa: E402
from prompt_tuning.batches import batching  # noqa: E402
from prompt_tuning.batches.groups import cut_batch, make_cutting  # noqa: E402
from prompt_tuning.checkpoints.run_state import RunStateStore  # noqa: E402
from prompt_tuning.config import (  # noqa: E402
    DataConfig,
    Experiment,
    ModelConfig,
    OptimizerConfig,
    PromptConfig,
    TrainConfig,
)
from prompt_tuning.decoding import decode  # noqa: E402
from prompt_tuning.methods.method import Start  # noqa: E402
from prompt_tuning.methods.table import find_method  # noqa: E402
from prompt_tuning.model import sharding, t5  # noqa: E402
from prompt_tuning.model.device import choose_device  # noqa: E402
from prompt_tuning.planning import flops, plan  # noqa: E402
from prompt_tuning.training import step  # noqa: E402


def experiment(workload: Workload) -> Experiment:
    """A run with the defaults for everything that the workload does not say."""
    lengths = {"inputs": 512, "targets": workload.targets}
    return Experiment(
        model_dir="",
        initial_checkpoint_path="",
        model=model_config(workload.size),  # type: ignore[arg-type]
        data=DataConfig(
            mixture_or_task_name="any", task_feature_lengths=lengths, batch_size=workload.rows
        ),
        prompt=PromptConfig(length=workload.prompt, method=workload.method),
    )


def batches(workload: Workload, number: int) -> list[dict[str, np.ndarray]]:
    """The groups of a step; for "ours-512" one batch at full length."""
    inputs, targets = workload.tokens(number)
    if workload.engine == "ours-512":
        return [batching.pad_batch(inputs, targets, 512, workload.targets)]  # type: ignore[list-item]
    run = experiment(workload)
    cutting = make_cutting(run.train, run.data, 1)
    groups = cut_batch([len(x) for x in inputs], [len(x) for x in targets], cutting)
    return [
        batching.pad_batch(  # type: ignore[misc]
            [inputs[i] for i in g.rows], [targets[i] for i in g.rows], g.inputs, g.targets
        )
        for g in groups
    ]


def shapes(workload: Workload, number: int) -> tuple[tuple[int, int], ...]:
    """Rows and width of every group of a step."""
    return tuple(b["encoder_input_tokens"].shape for b in batches(workload, number))


TASKS = ("a", "b")  # of a prompt with members; the rows of a batch are theirs in turn


class Prepared(NamedTuple):
    """All that a step needs."""

    model: t5.T5
    mesh: Mesh
    programs: step.Programs
    state: step.TrainState
    frozen: Any
    has_members: bool


def prepare(workload: Workload) -> Prepared:
    """The programs of a step, and a random backbone."""
    config = dataclasses.replace(
        model_config(workload.size),
        dtype=workload.dtype,
        dropout_rate=0.1 if workload.engine == "ours-dropout" else 0.0,  # 0.1: the recipe's
        attention="cudnn" if workload.engine == "ours-cudnn" else "xla",
    )
    mesh = sharding.make_mesh(1)
    if mesh.size != workload.devices:
        raise SystemExit(f"JAX has {mesh.size} devices, and {workload.devices} are to be measured")
    prompt = experiment(workload).prompt
    model = t5.T5(config, choose_device(config, mesh.devices.flat))
    recipe = step.make_recipe(model, prompt, OptimizerConfig(), TrainConfig())
    tasks = TASKS if recipe.method.members else ()
    draw_rows = functools.partial(_rows, config=config)
    start = Start(jax.random.key(0), config, workload.prompt, draw_rows, tasks=tasks)
    params = sharding.replicate(recipe.method.init(recipe.settings, start), mesh)
    state = step.init_state(params, recipe.optimizer, 0)
    state = jax.device_put(state, sharding.replicated(mesh))
    programs = step.compile_step(recipe, state)
    return Prepared(
        model, mesh, programs, state, make_backbone(config, mesh), recipe.method.members
    )


def _rows(number: int, config: ModelConfig) -> Any:
    return jax.random.normal(jax.random.key(1), (number, config.embed_dim))


def make_backbone(config: ModelConfig, mesh: Mesh) -> dict[str, jax.Array]:
    """Random weights, one after the other, as a run restores them."""
    shapes = t5.param_shapes(config)
    places = sharding.param_shardings(shapes, mesh)

    @functools.cache  # most matrices are of a few shapes
    def make(shape: tuple[int, ...], where: NamedSharding) -> Any:
        def draw(key: jax.Array) -> jax.Array:
            if len(shape) == 1:  # a norm's scale
                return jnp.ones(shape, config.dtype)
            return (jax.random.normal(key, shape) * shape[0] ** -0.5).astype(config.dtype)

        return jax.jit(draw, out_shardings=where)

    return {
        name: jax.block_until_ready(make(leaf.shape, places[name])(jax.random.key(number)))
        for number, (name, leaf) in enumerate(shapes.items())
    }


def place(groups: list[dict[str, np.ndarray]], prepared: Prepared) -> list[dict[str, jax.Array]]:
    """The groups of a step on the devices; each row names its member, if there are members."""
    if prepared.has_members:
        for batch in groups:
            rows = len(batch["encoder_input_tokens"])
            batch["which"] = np.arange(rows, dtype=np.int32) % len(TASKS)
    return [sharding.shard_batch(batch, prepared.mesh) for batch in groups]


def run(workload: Workload) -> dict[str, Any]:
    """Steps on a random backbone, and what they cost."""
    prepared = prepare(workload)
    config, state = prepared.model.config, prepared.state

    def one(number: int) -> None:
        nonlocal state
        placed = place(batches(workload, number), prepared)
        state, metrics = step.train_step(prepared.programs, state, prepared.frozen, placed)
        jax.block_until_ready(metrics)

    found = measure(workload, one, STARTED, lambda number: shapes(workload, number))
    found["input_seconds"] = make_inputs(workload, prepared)
    if stats := jax.devices()[0].memory_stats():  # a processor has none
        found["device_memory_bytes"] = float(stats["peak_bytes_in_use"])
    groups = [shapes(workload, number) for number in range(1, workload.steps + 1)]
    # Each row has one member's prompt, of as many rows as a plain prompt.
    plain = (
        dataclasses.replace(workload, method="prompt_tuning") if prepared.has_members else workload
    )
    given, once = plan.describe_prompt(dataclasses.replace(experiment(plain), model=config))
    sizes = {**given, "targets": workload.targets}
    costs = [sum(flops.count(config, rows=r, inputs=t, **sizes).step for r, t in g) for g in groups]
    if workload.method != "prompt_tuning" or workload.targets == 2:
        found |= decode_rate(workload, prepared, state)
    return (
        found
        | save(state)
        | {
            "flops_per_step": float(np.mean(costs)) + once,
            "encoder_tokens": float(np.mean([sum(r * t for r, t in g) for g in groups])),
            "programs": len({shape for g in groups for shape in g}),
        }
    )


def make_inputs(workload: Workload, prepared: Prepared) -> float:
    """How long the rows of a step take to be put together and onto the devices.

    Part of a step here; a run makes them ahead, while the device computes.
    """
    seconds = []
    for number in range(workload.steps):
        begin = time.perf_counter()
        jax.block_until_ready(place(batches(workload, number), prepared))
        seconds.append(time.perf_counter() - begin)
    return float(np.median(seconds))


def decode_rate(workload: Workload, prepared: Prepared, state: step.TrainState) -> dict[str, float]:
    """Tokens a second of greedy decoding of 32 tokens, and the sizes of the prompt.

    Random weights seldom end a sequence, so all rows are as long as they may be.
    """
    prompt = prepared.programs.fold_for_use(state, prepared.frozen)
    batch = place(batches(workload, 1), prepared)[0]
    tokens, which = batch["encoder_input_tokens"], batch.get("which")
    run = jax.jit(decode.generate, static_argnums=0, static_argnames="length")
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        found, _ = jax.block_until_ready(
            run(prepared.model, prepared.frozen, prompt, tokens, which, length=32)
        )
        seconds.append(time.perf_counter() - begin)
    method = find_method(workload.method)
    trained = [v.size for leaf, v in state.trainable.items() if leaf not in method.fixed]
    stored = state.trainable if method.visibility == "prompt" else prompt
    return {
        "decoded_per_second": float((np.asarray(found) > 0).sum() / min(seconds[1:])),
        "trained_parameters": float(sum(trained)),
        "stored_bytes": float(sum(4 * x.size for x in jax.tree.leaves(stored))),
    }


def save(state: step.TrainState) -> dict[str, float]:
    """How long saving the state of a run takes, and how large it is."""
    with tempfile.TemporaryDirectory() as folder, RunStateStore(folder) as store:
        seconds = []
        for number in range(3):  # the first one sets up Orbax
            begin = time.perf_counter()
            store.save(number, state)
            store.wait()
            seconds.append(time.perf_counter() - begin)
        written = sum(p.stat().st_size for p in Path(folder, "2").rglob("*") if p.is_file())
    return {"save_seconds": min(seconds), "save_bytes": float(written)}


if __name__ == "__main__":
    main(run)
