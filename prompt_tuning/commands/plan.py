"""`t5x plan`: estimates memory and time of a run on chips that this machine need not have."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys

from prompt_tuning.commands.command import Command
from prompt_tuning.commands.runs import add_gin_flags, load


def _add_flags(command: argparse.ArgumentParser) -> None:
    add_gin_flags(command)
    command.add_argument(
        "--topology",
        default="cpu:1",
        metavar="CHIP:N",
        help="v5e:4x8, v4:2x2x2, h100:8, ... (cpu:1); TPUs need `pip install libtpu`, no TPU",
    )
    command.add_argument(
        "--utilisation", type=float, default=0.4, help="assumed share of the chips' peak (0.4)"
    )
    command.add_argument("--json", metavar="FILE|-", help="also write the plan as JSON")


def _plan(args: argparse.Namespace, rest: list[str]) -> int:
    from prompt_tuning.planning.chips import parse_topology

    topology = parse_topology(args.topology)
    # Programs are only compiled, which needs no accelerator.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu else queries a TPU VM's metadata
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    loaded = load(args, "train", {"MODEL_DIR": "", "INITIAL_CHECKPOINT_PATH": ""})

    import jax

    if topology.chip.platform != "tpu":
        jax.config.update("jax_num_cpu_devices", topology.devices)
    from prompt_tuning.planning import plan as plans

    print(f"compiling the step for {topology.name} ...", file=sys.stderr, flush=True)
    plan = plans.make_plan(loaded.run, topology, utilisation=args.utilisation)
    values = json.dumps(dataclasses.asdict(plan), indent=2)
    if args.json == "-":
        print(values)
        return 0
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            file.write(values + "\n")
    print(plans.describe(plan))
    return 0


COMMANDS = {
    "plan": Command(
        "estimate whether a run fits on given chips, and how long it takes",
        _add_flags,
        _plan,
    )
}
