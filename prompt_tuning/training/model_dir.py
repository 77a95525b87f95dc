"""MODEL_DIR: checks that it is of the same run, files written at the start, the closing table.

`loop.py` calls these. `evaluation/records.py` writes the records in MODEL_DIR, `checkpoints/` the
states, `prompts/` the prompts.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from prompt_tuning.checkpoints import run_state
from prompt_tuning.config import ConfigError, Experiment, flatten, to_dict
from prompt_tuning.evaluation.records import METRICS, is_score, read_records
from prompt_tuning.evaluation.score_table import Interval, score_table
from prompt_tuning.model import sharding
from prompt_tuning.prompts import prompt_file
from prompt_tuning.runtime.replace_folder import replace_text

TaskReport = tuple[Mapping[str, Interval], str]  # intervals of the metrics, error analysis as text
NOTHING: Mapping[str, TaskReport] = types.MappingProxyType({})

# Settings that may change when a run is resumed: its length, how often it saves, paths, devices.
_MAY_CHANGE = frozenset(
    {
        "model_dir",
        "num_model_partitions",
        "verify_checkpoint",
        "train.train_steps",
        "train.train_steps_relative",
        "train.checkpoint_period",
        "train.keep_checkpoints",
        "eval.period",
        "eval.early_stopping_evals",
        "eval.bootstrap",
    }
)
# Settings with another default than in an older version, whose runs go on with today's.
_FORMER_DEFAULTS = {"data.files.quote_char": '"'}


def refuse_other_experiment(
    meta: Mapping[str, Any] | None, experiment: Experiment, model_dir: Path
) -> None:
    """Checks that MODEL_DIR has no state, or that its metadata `meta` is of this experiment.

    Raises:
      ConfigError: it contains another experiment, or a run of upstream T5X.
    """
    if meta is None:
        if (model_dir / "t5x.gin").exists() and list(model_dir.glob("checkpoint_*")):
            raise ConfigError(
                f"MODEL_DIR {model_dir} contains a run of upstream T5X. Continue it with "
                "--engine=t5x, or choose another MODEL_DIR."
            )
        _refuse_damaged(model_dir / "checkpoints")
        return
    new = flatten(to_dict(experiment))
    # An older version did not save settings that it did not have: they were at today's default.
    old = flatten(meta["experiment"])
    known = {key[:end] for key in old for end in _ends(key)}  # "x.label_words" of ".label_words.1"
    defaults = _defaults(experiment)
    old |= {key: value for key, value in defaults.items() if key not in known}
    old |= {
        key: defaults[key]
        for key, former in _FORMER_DEFAULTS.items()
        if old[key] == former and new[key] == defaults[key]
    }
    changed = [
        f"{key}: {old.get(key)!r} there, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in _MAY_CHANGE
    ]
    if changed:
        raise ConfigError(
            f"MODEL_DIR {model_dir} contains a different experiment:\n  "
            + "\n  ".join(changed)
            + "\nChoose another MODEL_DIR, or remove that one."
        )


def _ends(key: str) -> list[int]:
    """The index of each dot, and the length: the ends of all prefixes of a dotted name."""
    return [*(place for place, letter in enumerate(key) if letter == "."), len(key)]


def _defaults(config: Any, prefix: str = "") -> dict[str, Any]:
    """The default of each setting that has one, by dotted name."""
    defaults: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            defaults |= _defaults(value, f"{prefix}{field.name}.")
        elif field.default is not dataclasses.MISSING:
            defaults |= flatten(to_dict({f"{prefix}{field.name}": field.default}))
    return defaults


def _refuse_damaged(states: Path) -> None:
    """Raises ConfigError if all saved states were moved aside as damaged."""
    aside = sorted(path.name for path in states.glob("damaged_*"))
    if aside and not run_state.saved_steps(states):
        raise ConfigError(
            f"no saved state in {states} can be read: there are only {', '.join(aside)}. Restore a "
            "state from a copy, or delete the folder to start the run from the beginning."
        )


def refuse_other_contents(
    meta: Mapping[str, Any] | None, identities: Mapping[str, str], model_dir: Path
) -> None:
    """Checks the fingerprints of backbone, vocabulary and files against those of the saved run.

    Raises:
      ConfigError: a file has other contents than when the run began.
    """
    named = {"files": "training or evaluation file"}
    for what, identity in identities.items():
        if meta is not None and meta.get(what, identity) != identity:
            raise ConfigError(
                f"the {named.get(what, what)} has changed since the run in MODEL_DIR {model_dir} "
                f"began: its fingerprint is {identity[:12]}..., expected {meta[what][:12]}.... "
                "Restore the old file, or choose another MODEL_DIR."
            )


def write_info(
    model_dir: Path, params: Mapping[str, jax.Array], mesh: Mesh, config_text: str
) -> None:
    """Writes config.gin, which can be passed as --gin_file, and T5X's list of variables."""
    if config_text:
        replace_text(model_dir / "config.gin", config_text)
    lines = []
    for name, value in sorted(params.items()):
        axes = zip(sharding.logical_axes(name, value.shape), value.shape, strict=True)
        shape = ", ".join(f"{axis}={size}" for axis, size in axes)
        spec = sharding.partition_spec(name, value.shape, mesh)
        lines.append(f"Variable {name:<70} size {value.size:<12} shape ({shape}) spec {spec}")
    total = sum(value.size for value in params.values())
    lines.append(f"Total number of parameters: {total}")
    replace_text(model_dir / "model-info.txt", "\n".join(lines) + "\n")


def repair_best(model_dir: Path, best_step: int | None, name: str = "") -> None:
    """Copies the best step's prompt to `prompts/best` if that was damaged or removed.

    `name` is that of the folder in both, if a step has several prompts.
    """
    folders = ("best", f"step_{best_step or 0:06d}")
    best, source = (model_dir / "prompts" / folder / name for folder in folders)
    if best_step is None or not (best.exists() or source.exists()):  # a run that has no prompt
        return
    try:
        prompt_file.read_prompt(best)
    except ConfigError as error:
        stored = prompt_file.read_prompt(source)
        if stored.metadata is None:  # no checksum shows that it is undamaged
            raise
        prompt_file.save_prompt(best, stored.prompt, stored.metadata)
        print(f"{best} was restored from {source.name}, since it was damaged: {error}", flush=True)


def describe_result(
    model_dir: Path,
    best_step: int | None,
    curves: Path | None,
    reports: Mapping[str, TaskReport] = NOTHING,
) -> str:
    """The closing table, scores of baselines, best and last prompt, and the path of the prompt.

    `reports` are the best prompt's, by task; the table shows its 95 % intervals.
    """
    records = [r for r in read_records(model_dir / METRICS) if is_score(r)]
    last = max((r["step"] for r in records if "prompt" not in r), default=None)
    tables: dict[str, dict[str, dict[str, float]]] = {}
    for r in records:
        if r.get("prompt") == "majority":
            name = "majority class"
        elif r.get("prompt") == "none":
            name = "no prompt"
        elif r["step"] == best_step:
            name = f"tuned, best (step {r['step']})"
        elif r["step"] == last:
            name = f"tuned, last (step {r['step']})"
        else:
            continue
        tables.setdefault(r["task"], {}).setdefault(name, {})[r["name"]] = r["value"]
    text = []
    for task, rows in tables.items():
        intervals, description = reports.get(task, ({}, ""))
        best_row = f"tuned, best (step {best_step})"
        text.append(score_table(task, rows, {best_row: intervals}))
        text += [description] if description else []
        if not _is_above(rows.get(best_row, {}), rows.get("majority class", {})):
            text.append(
                f"note: no score of the best prompt on {task} is above the majority class: it has "
                "not learned the task. Label words of one or two tokens, more steps, another "
                "LEARNING_RATE or a larger backbone may help."
            )
    best = model_dir / "prompts" / "best"
    if best.exists():
        prompts = prompt_file.list_prompts(best)
        text += [f"prompt: {prompt}" for prompt in prompts]
    if curves:
        text.append(f"curves: {curves}")
    return "\n".join(text)


def _is_above(scores: Mapping[str, float], baseline: Mapping[str, float]) -> bool:
    """Whether any score is above the baseline's, or there is nothing to compare."""
    both = scores.keys() & baseline.keys()
    return not both or any(scores[name] > baseline[name] for name in both)
