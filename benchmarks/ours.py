"""One measurement of this project's step, in a process of its own."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from typing import Any

STARTED = time.perf_counter()

import jax  # noqa: E402
import numpy as np  # noqa: E402
from workload import Workload, main, measure  # noqa: E402

from prompt_tuning.api import model_config  # noqa: E402
from prompt_tuning.checkpoint.run_state import RunStateStore  # noqa: E402
from prompt_tuning.config import OptimizerConfig, TrainConfig  # noqa: E402
from prompt_tuning.data import features  # noqa: E402
from prompt_tuning.data.groups import Cutting, cut_batch  # noqa: E402
from prompt_tuning.model import t5  # noqa: E402
from prompt_tuning.planning import flops  # noqa: E402
from prompt_tuning.training import optim, step  # noqa: E402


def batches(workload: Workload, number: int) -> list[dict[str, np.ndarray]]:
    """The groups of a step; for "ours-512" one batch at full length."""
    inputs, targets = workload.tokens(number)
    if workload.engine == "ours-512":
        return [features.pad_batch(inputs, targets, 512, workload.targets)]  # type: ignore[list-item]
    cutting = Cutting(512, workload.targets, workload.prompt, most=4)
    groups = cut_batch([len(x) for x in inputs], [len(x) for x in targets], cutting)
    return [
        features.pad_batch(  # type: ignore[misc]
            [inputs[i] for i in g.rows], [targets[i] for i in g.rows], g.inputs, g.targets
        )
        for g in groups
    ]


def run(workload: Workload) -> dict[str, Any]:
    """Steps on a random backbone, and what they cost."""
    config = dataclasses.replace(
        model_config(workload.size),  # type: ignore[arg-type]
        dtype=workload.dtype,
        dropout_rate=0.0,
    )
    make = jax.jit(lambda key: t5.init_params(config, key))
    frozen = {n: v.astype(workload.dtype) for n, v in make(jax.random.key(0)).items()}
    prompt = {"prompt": np.zeros((workload.prompt, config.embed_dim), np.float32)}
    optimizer = optim.make_optimizer(OptimizerConfig(), optim.PROMPT_RULES)
    state = step.init_state(prompt, optimizer, 0)  # type: ignore[arg-type]
    programs = step.compile_step(config, TrainConfig(), optimizer)

    def one(number: int) -> None:
        nonlocal state
        state, metrics = step.run_step(programs, state, frozen, batches(workload, number))
        jax.block_until_ready(metrics)

    found = measure(workload, one, STARTED)
    shapes = [
        [batch["encoder_input_tokens"].shape for batch in batches(workload, number)]
        for number in range(1, workload.steps + 1)
    ]
    costs = [
        sum(
            flops.count(
                config, rows=r, prompt=workload.prompt, inputs=t, targets=workload.targets
            ).step
            for r, t in groups
        )
        for groups in shapes
    ]
    with tempfile.TemporaryDirectory() as folder, RunStateStore(folder) as store:
        begin = time.perf_counter()
        store.save(1, state)
        store.wait()
        saved = time.perf_counter() - begin
    return found | {
        "flops_per_step": float(np.mean(costs)),
        "programs": len({shape for groups in shapes for shape in groups}),
        "save_seconds": saved,
    }


if __name__ == "__main__":
    main(run)
