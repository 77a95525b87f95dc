"""The suites: which workloads belong together, and which engines are there to run them."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from workload import Workload

from prompt_tuning.methods.table import METHODS

BASE = Workload(engine="")
by = dataclasses.replace
IN_PEFT = ("p_tuning", "prefix_tuning")  # besides prompt_tuning
# What is drawn against what, and what belongs to the line of an engine.
SUITES: dict[str, tuple[str, list[Workload]]] = {
    "smoke": ("inputs", [by(BASE, inputs=32, prompt=10, rows=4, steps=1)]),
    "step": ("inputs", [BASE]),
    "lengths": ("inputs", [by(BASE, inputs=n, steps=3) for n in (32, 64, 128, 256, 512)]),
    "prompts": ("prompt", [by(BASE, prompt=n, steps=3) for n in (1, 20, 50, 100, 150)]),
    "rows": ("rows", [by(BASE, rows=n, steps=3) for n in (1, 4, 8, 16, 32)]),
    "sizes": ("flops_per_step", [by(BASE, size=s, steps=3) for s in ("small", "base", "large")]),
    "devices": ("devices", [by(BASE, devices=n, steps=3) for n in (1, 2, 4)]),
    # Of each method, beside PEFT's of the same name; targets of 2 tokens, as a label has.
    "methods": (
        "inputs",
        [
            by(BASE, inputs=n, targets=2, steps=3, method=method)
            for n in (128, 512)
            for method in METHODS
        ],
    ),
    # In turn, so that each round is a pair at each width.
    "shared": (
        "inputs",
        [
            by(BASE, size="base", engine="ours", rows=32, inputs=n, targets=2, steps=3, method=m)
            for n in (64, 128)
            for m in ("prompt_tuning", "shared_prompt")
        ],
    ),
    "dropout": ("inputs", [by(BASE, engine=e) for e in ("ours", "ours-dropout")]),
    "start": (
        "weights_bytes",
        [by(BASE, engine="start", size=s, steps=1) for s in ("small", "base")],
    ),
    # For one GPU or TPU: hours on a processor.
    "accelerator": (
        "flops_per_step",
        [by(BASE, size=s, dtype="bfloat16", rows=32, inputs=512, steps=5) for s in ("xl", "xxl")],
    ),
    "superglue": ("", []),  # made of the files of --superglue
}
# Name, file, and the fields that T5's text is made of.
TASKS = {
    "boolq": ("BoolQ/val.jsonl", ("passage", "question")),
    "rte": ("RTE/train.jsonl", ("hypothesis", "premise")),
    "cb": ("CB/train.jsonl", ("hypothesis", "premise")),
}


def measured(suite: list[Workload], dtypes: Sequence[str]) -> list[Workload]:
    """Every workload of a suite on every engine, in those of its dtypes that are asked for."""
    return [one for w in suite for one in engines(w) if one.dtype in dtypes]


def engines(workload: Workload) -> list[Workload]:
    """Every engine that is installed, in the dtypes that it is run in."""
    if workload.engine:
        return [workload]
    if workload.method != "prompt_tuning":
        has_peft = workload.method in IN_PEFT and importlib.util.find_spec("peft")
        return [by(workload, engine=e) for e in ("ours", *(["peft"] if has_peft else []))]
    found = [by(workload, engine="ours")]
    if workload.devices == 1 and workload.dtype == "bfloat16" and shutil.which("nvidia-smi"):
        found.append(by(workload, engine="ours-cudnn"))
    has_peft = workload.devices == 1 and importlib.util.find_spec("peft")
    if workload.devices > 1 or workload.dtype != "float32":
        return [*found, by(workload, engine="peft")] if has_peft else found
    found.append(by(workload, engine="ours", dtype="bfloat16"))
    if workload.lengths:
        found.append(by(workload, engine="ours-512"))
    if has_peft:
        found += [by(workload, engine="peft", dtype=d) for d in ("float32", "bfloat16")]
    if importlib.util.find_spec("t5x") and not workload.lengths:
        found.append(by(workload, engine="t5x"))
    return found


def real_rows(superglue: Path, vocabulary: Path, out: Path) -> list[Workload]:
    """A workload for each task that is there: batches of 32 of its rows, by their lengths."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary))
    workloads = []
    for name, (file, fields) in TASKS.items():
        if not (superglue / file).exists():
            continue
        rows = [json.loads(line) for line in (superglue / file).read_text().splitlines()]
        texts = [" ".join([name, *(f"{key}: {row[key]}" for key in fields)]) for row in rows]
        lengths = np.minimum([len(ids) + 1 for ids in processor.encode(texts)], 512)
        order = np.random.default_rng(0).permutation(len(lengths))[: 32 * (len(lengths) // 32)]
        path = (out / f"{name}.json").resolve()
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(lengths[order].reshape(-1, 32).tolist()))
        workloads.append(by(BASE, rows=32, inputs=512, targets=4, lengths=str(path), steps=2))
    return workloads
