"""`--engine=t5x`: the same settings, run by upstream T5X's own program.

After `cli.py`; writes one resolved gin file on top of `gin/t5x/` and becomes `python -m t5x.main`.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from prompt_tuning.config import (
    TINY,
    ConfigError,
    EvalConfig,
    EvalRun,
    Experiment,
    InferRun,
    ModelConfig,
    gin_reader,
)
from prompt_tuning.config.gin_files import gin_folder
from prompt_tuning.methods.table import find_method
from prompt_tuning.prompts import prompt_file
from prompt_tuning.runtime.replace_folder import local_folder
from prompt_tuning.session import checks

Run = Experiment | EvalRun | InferRun
FILES: Mapping[str, str] = {
    "train": "t5x/prompt_tune.gin",
    "eval": "t5x/eval.gin",
    "infer": "t5x/infer.gin",
}
RESOLVED = "t5x.gin"  # in the output folder; `config.gin` there is T5X's own
# What T5X's network has fixed.
_BUCKETS, _DISTANCE = 32, 128
# What may change when a run is continued: how long, how often, on what devices.
_MAY_CHANGE = re.compile(r"(TRAIN_STEPS|TRAIN_STEPS_RELATIVE|\w*_PERIOD|NUM_MODEL_PARTITIONS) = ")


def run(mode: str, loaded: gin_reader.Loaded[Any], flags: Sequence[str] = ()) -> NoReturn:
    """Replaces this process by T5X, whose output and exit code the user gets.

    Raises:
      ConfigError: T5X is not installed, or cannot do this run.
    """
    _require_t5x()
    command = prepare(mode, loaded, flags)
    print(f"running {' '.join(command)}", flush=True)
    sys.stderr.flush()
    os.execv(command[0], command)


def prepare(mode: str, loaded: gin_reader.Loaded[Any], flags: Sequence[str] = ()) -> list[str]:
    """The command that runs T5X on the settings, which are checked and written to a file.

    Raises:
      ConfigError: T5X has no such setting, or the run lacks something that it needs.
    """
    folder = _output_dir(loaded.run)
    _refuse_unknown_to_t5x(loaded.run)
    resolved = make_absolute(loaded.run)
    _try_inputs(resolved)
    if resolved.eval.method == "both":
        print("EVAL_METHOD = 'both': upstream T5X generates; it does not rank.", flush=True)
    own = {name: loaded.macros[name] for name in gin_reader.T5X_MACROS if name in loaded.macros}
    text = "".join(
        [
            f"# `--engine=t5x` ran this file. Search path: {gin_folder()}\n",
            f"include './{FILES[mode]}'\n",
            gin_reader.to_gin(resolved),
            *(f"{name} = {value!r}\n" for name, value in own.items()),
        ]
    )
    file = folder / RESOLVED
    if isinstance(resolved, Experiment):
        _refuse_other_experiment(file, text)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return [
        sys.executable,
        *("-m", "t5x.main", f"--run_mode={mode}", "--logtostderr"),
        f"--gin_search_paths={gin_folder()}",
        f"--gin_file={file}",
        *flags,
    ]


def make_absolute(run: Any) -> Any:
    """The run with absolute paths, as T5X and Orbax need them; addresses and names stay."""

    def absolute(path: Any) -> Any:
        if isinstance(path, tuple):
            return tuple(map(absolute, path))
        if "://" in path or path in ("", TINY, "bytes"):
            return path
        return os.path.abspath(os.path.expanduser(path))

    names = ("model_dir", "initial_checkpoint_path", "checkpoint_path", "eval_output_dir")
    names += ("infer_output_dir", "prompt_file")
    paths = {name: absolute(getattr(run, name)) for name in names if hasattr(run, name)}
    folder, files = run.data.tfds_data_dir, run.data.files
    data = dataclasses.replace(
        run.data,
        files=dataclasses.replace(
            files, train_file=absolute(files.train_file), eval_file=absolute(files.eval_file)
        ),
        vocabulary=absolute(run.data.vocabulary),
        tfds_data_dir=None if folder is None else absolute(folder),
    )
    if isinstance(run, Experiment):
        prompt = dataclasses.replace(run.prompt, file=absolute(run.prompt.file))
        return dataclasses.replace(run, **paths, data=data, prompt=prompt)
    return dataclasses.replace(run, **paths, data=data)


def _output_dir(run: Run) -> Path:
    if isinstance(run, Experiment):
        return local_folder(run.model_dir, "MODEL_DIR")
    if isinstance(run, EvalRun):
        return local_folder(run.eval_output_dir, "EVAL_OUTPUT_DIR")
    return local_folder(run.infer_output_dir, "INFER_OUTPUT_DIR")


def _require_t5x() -> None:
    try:
        importlib.import_module("prompt_tuning.upstream.plugin")
        importlib.import_module("t5x.train")
    except ImportError as error:
        raise ConfigError(f"--engine=t5x: {error}") from error


def _compare_targets(run: Run) -> list[str]:
    """Targets that only the embedded engine can train on."""
    problems = []
    if isinstance(run, Experiment) and run.corpus.objective != "task":
        problems.append(f"OBJECTIVE = {run.corpus.objective!r}: it trains on tasks here")
    if run.data.sentinel_targets:
        problems.append("SENTINEL_TARGETS: its targets have the vocabulary of the inputs")
    return problems


def _refuse_unknown_to_t5x(run: Run) -> None:
    """Stops at settings that would have no effect under T5X."""
    config, model = run.eval, run.model
    default = EvalConfig()
    problems = _compare_scoring(run) + _compare_targets(run) + _compare_prompt(run)
    if isinstance(run, InferRun) and config.num_examples != default.num_examples:
        problems.append("EVALUATOR_NUM_EXAMPLES: it answers whole splits, or EVAL_SPLIT's slice")
    if isinstance(run, InferRun) and run.return_all_decodes:
        problems.append("RETURN_ALL_DECODES: its infer writes one answer")
    if isinstance(run, Experiment):
        problems += _compare_periods(config.period, run.train.checkpoint_period)
        if run.train.prompt_average:
            problems.append("PROMPT_AVERAGE: it averages nothing")
        if run.train.input_noise:
            problems.append("INPUT_NOISE: its loss has no such term")
    if config.early_stopping_evals != default.early_stopping_evals:
        problems.append("EARLY_STOPPING_EVALS: it trains to the last step")
    if config.metric != default.metric:
        problems.append("TASK_METRIC: it chooses no best prompt")
    if run.data.truncate != "end":
        problems.append("TRUNCATE: seqio cuts the end of its inputs")
    if run.verify_checkpoint:
        problems.append("VERIFY_CHECKPOINT: hold it against its manifest with `t5x verify`")
    problems += _compare_attention(model)
    if isinstance(run, InferRun) and not (run.data.names and run.infer_output_dir):
        problems.append("--input and --output: it answers the rows of a task, in INFER_OUTPUT_DIR")
    if problems:
        raise ConfigError(
            "upstream T5X cannot do this:\n  "
            + "\n  ".join(problems)
            + "\nLeave it out, or use --engine=embedded (docs/t5x.md)."
        )


def _compare_prompt(run: Run) -> list[str]:
    """What of the prompt its network, which takes rows in front of the input, cannot have."""
    takes = "its network takes rows that see the input, and no more"
    if isinstance(run, Experiment):
        checks.check_method(run)
        name, method = run.prompt.method, find_method(run.prompt.method)
        if method.members:
            lacks = "its batches do not say of which task a row is"
            return [f"PROMPT_METHOD = {name!r}, a prompt for each task: {lacks}"]
        if run.train.trainable == "model" or method.fields == ("rows",):
            return []
        return [f"PROMPT_METHOD = {name!r}, a prompt of {', '.join(method.fields)}: {takes}"]
    problems = []
    for file in (run.prompt_file,) if isinstance(run.prompt_file, str) else run.prompt_file:
        if file and (what := prompt_file.describe_more_than_rows(prompt_file.read_prompt(file))):
            problems.append(f"PROMPT_FILE = {file!r}, {what}: {takes}")
    return problems


def _compare_attention(model: ModelConfig) -> list[str]:
    problems = []
    if model.attention != "xla":
        problems.append("ATTENTION: its network has one of its own")
    if model.relative_attention_num_buckets != _BUCKETS:
        problems.append(f"RELATIVE_ATTENTION_NUM_BUCKETS: its network has {_BUCKETS}")
    if model.relative_attention_max_distance != _DISTANCE:
        problems.append(f"RELATIVE_ATTENTION_MAX_DISTANCE: its network has {_DISTANCE}")
    return problems


def _compare_scoring(run: Run) -> list[str]:
    default, problems = EvalConfig(), []
    if run.eval.method == "rank":
        problems.append("EVAL_METHOD = 'rank': it generates only")
    if run.eval.rank_score != default.rank_score:
        problems.append("RANK_SCORE: it generates only")
    if run.eval.decoding.method == "transformers_beam":
        problems.append("DECODING = 'transformers_beam': its beam search has rules of its own")
    if run.eval.bootstrap != default.bootstrap:
        problems.append("EVAL_BOOTSTRAP: it gives no intervals")
    if isinstance(run, EvalRun) and run.pairs != "all":
        problems.append("EVAL_PAIRS: it scores one prompt")
    return problems


def _compare_periods(evaluation: int, checkpoint: int | None) -> list[str]:
    periods = sorted((evaluation, checkpoint or evaluation))
    if periods[1] % periods[0] == 0:
        return []
    settings = f"EVAL_PERIOD = {evaluation} and CHECKPOINT_PERIOD = {checkpoint}"
    return [f"{settings}: one must be a multiple of the other"]


def _try_inputs(run: Run) -> None:
    """Makes the objects that T5X will make, so that a mistake is one message, not gin's trace."""
    from prompt_tuning.session import overview, setup
    from prompt_tuning.upstream import inputs

    inputs.register_task(run.data)
    inputs.find_checkpoint(run)
    if isinstance(run, Experiment):
        inputs.last_step(run)
    if not isinstance(run, InferRun):
        trains = isinstance(run, Experiment)
        labels = run.prompt.class_labels if isinstance(run, Experiment) else run.class_labels
        data = setup.load_data(run.data, run.eval, run.model, class_labels=labels, train=trains)
        if data.train:
            lengths, split = run.data.task_feature_lengths, run.data.eval_split
            print(overview.describe_data(data, lengths, split), flush=True)
    inputs.starting_prompt(run)


def _refuse_other_experiment(file: Path, text: str) -> None:
    """Raises ConfigError if MODEL_DIR holds another experiment: T5X would resume from its state."""
    if list((file.parent / "checkpoints").glob("[0-9]*")):
        raise ConfigError(
            f"MODEL_DIR {file.parent} holds a run of the embedded engine. Choose another MODEL_DIR."
        )
    if not list(file.parent.glob("checkpoint_[0-9]*")):
        return  # nothing was trained yet
    old, new = (
        {line for line in lines.splitlines() if " = " in line and not _MAY_CHANGE.match(line)}
        for lines in (file.read_text(encoding="utf-8"), text)
    )
    # A setting that is newer than that file had its default.
    shipped = (gin_folder() / gin_reader.DEFAULTS).read_text(encoding="utf-8").splitlines()
    defaults = {line.split("  #")[0] for line in shipped}
    macros = {line.split(" = ")[0] for line in old}
    new -= {line for line in new & defaults if line.split(" = ")[0] not in macros}
    if old != new:
        raise ConfigError(
            f"MODEL_DIR {file.parent} holds a different experiment:\n  there: "
            + "\n  there: ".join(sorted(old - new))
            + "\n  now: "
            + "\n  now: ".join(sorted(new - old))
            + "\nChoose another MODEL_DIR, or remove that one."
        )
