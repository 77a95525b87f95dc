"""Pre-training and LM adaptation: the objective of a run on a corpus.

`training/loop.py` calls its methods. The score is the loss on held-out documents. The saved states
are complete T5X checkpoints with the optimiser's state: this project resumes from the newest bit
for bit, and upstream T5X can resume from it too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from prompt_tuning.batches.groups import check_microbatches
from prompt_tuning.checkpoints import load, t5x_states
from prompt_tuning.config import ConfigError, Experiment
from prompt_tuning.evaluation.pictures import draw_losses
from prompt_tuning.evaluation.records import read_points
from prompt_tuning.model import loss, sharding, t5
from prompt_tuning.model.prompt import no_prompt
from prompt_tuning.pretraining import corpus as corpora
from prompt_tuning.pretraining import examples
from prompt_tuning.runtime import processes, signals
from prompt_tuning.session import setup
from prompt_tuning.session.session import Backbone, Session
from prompt_tuning.training import step as steps
from prompt_tuning.training.run import EvalStatus, LoopState, Objective, Run, TrainResult
from prompt_tuning.training.tasks import Tasks

HELD_OUT = "held_out"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretraining(Objective):
    """The corpus of a run, and its compiled score."""

    corpus: corpora.Corpus
    score: Any  # compiled: (params, batch) -> sums of the loss
    has_small_states = False

    # ---- before the corpus is read

    @staticmethod
    def check(experiment: Experiment, mesh: Mesh) -> None:
        if experiment.train.trainable != "model" or experiment.prompt.length:
            raise ConfigError(
                f"OBJECTIVE = {experiment.corpus.objective!r} trains the model itself. Set "
                "TRAINABLE = 'model' and PROMPT_LENGTH = 0, as runs/pretrain.gin does."
            )
        if experiment.optimizer.name != "adafactor":
            raise ConfigError(
                f"OPTIMIZER = {experiment.optimizer.name!r}: pre-training needs Adafactor, because "
                "a T5X checkpoint stores only its state. Set OPTIMIZER = 'adafactor'."
            )
        if experiment.from_scratch and experiment.train.restore_optimizer:
            raise ConfigError(
                "RESTORE_OPTIMIZER = True, but INITIAL_CHECKPOINT_PATH names no checkpoint: random "
                "weights have no optimizer state. Name a checkpoint, or set RESTORE_OPTIMIZER = "
                "False."
            )
        size, parts = experiment.data.batch_size, experiment.train.microbatches
        check_microbatches(size, parts, mesh.shape["data"])

    @staticmethod
    def open_store(
        experiment: Experiment, shared: Path, own: Path, start: int
    ) -> t5x_states.CheckpointStore:
        keep = experiment.train.keep_checkpoints
        return t5x_states.CheckpointStore(shared, own, start=start, keep=keep)

    @staticmethod
    def describe_saved(model_dir: Path) -> str:
        return t5x_states.describe_saved(model_dir)

    @classmethod
    def load(
        cls, experiment: Experiment, session: Session, model_dir: Path, meta: Any
    ) -> Pretraining:
        model = session.model

        def score(params: t5.Params, batch: Mapping[str, Array]) -> loss.Metrics:
            logits = loss.forward(model, params, no_prompt(model.config), batch)
            return loss.loss_fn(logits, batch, z_loss=0.0)[1]

        corpus = corpora.load_corpus(experiment, model_dir)
        vocabulary = setup.vocabulary_identity(experiment.data.vocabulary)
        return cls(
            experiment=experiment,
            mesh=session.mesh,
            name=corpus.name,
            description=corpus.description,
            identities={"vocabulary": vocabulary, "corpus": corpus.identity},
            corpus=corpus,
            score=jax.jit(score),
        )

    def fingerprint(self) -> str:
        return self.corpus.identity

    def first_params(self, backbone: Backbone) -> tuple[dict[str, np.ndarray], str]:
        return setup.no_first_params(self.experiment.model)

    def restore_optimizer(self, state: steps.TrainState) -> steps.TrainState:
        if not self.experiment.train.restore_optimizer:
            return state
        path = load.find_path(self.experiment.checkpoint)
        return state._replace(opt_state=t5x_states.read_optimizer(path, state.opt_state, count=0))

    def batches(self, numbers: range) -> Iterator[list[dict[str, jax.Array]]]:
        for number in numbers:
            batch = self.corpus.train.batch(number, self.experiment.data.batch_size)
            parts = split_batch(batch, self.experiment.train.microbatches)
            yield [sharding.shard_batch(part, self.mesh) for part in parts]

    def name_rows(self, number: int) -> str:
        rows = self.corpus.train.sources(number - 1, self.experiment.data.batch_size)
        documents = "; ".join(", ".join(map(str, row)) for row in rows)
        return f"documents of {self.name}, from 0: {documents}"

    # ---- during the run

    def begin(self, run: Run, loop: LoopState) -> None:
        self._score(run, loop)

    def evaluate(self, run: Run, loop: LoopState) -> tuple[EvalStatus, list[str]]:
        line = self._score(run, loop)
        return dataclasses.replace(loop.status, evaluation_due=False), [line]

    def _score(self, run: Run, loop: LoopState) -> str:
        with signals.current().allowed():  # this block writes no file
            values = self.held_out(loop.state.trainable)
        run.log.scores(loop.step, values, task=self.name, split=HELD_OUT)
        return ", ".join(f"{name} {value:.3f}" for name, value in values.items())

    def held_out(self, params: t5.Params) -> dict[str, float]:
        """Cross entropy per token in nats and accuracy in per cent, on the held-out documents.

        The corruption is the same each time. EVALUATOR_NUM_EXAMPLES limits the rows.
        """
        config = self.experiment.eval
        size = config.batch_size or self.experiment.data.batch_size
        totals = {"cross_entropy": 0.0, "correct": 0.0, "tokens": 0.0}
        for batch in self.corpus.held_out.batches(0, size, limit=config.num_examples):
            sums = jax.device_get(self.score(params, sharding.shard_batch(batch, self.mesh)))
            totals = {name: value + float(sums[name]) for name, value in totals.items()}
        return {
            "cross_entropy/held_out": totals["cross_entropy"] / totals["tokens"],
            "token_accuracy/held_out": 100.0 * totals["correct"] / totals["tokens"],
        }

    def save_last_good(self, run: Run, state: steps.TrainState, step: int) -> str:
        folder = Path(self.experiment.model_dir).expanduser()
        return t5x_states.describe_saved(folder, resumable=False)

    # ---- at the end

    def finish(self, run: Run, loop: LoopState, model_dir: Path) -> TrainResult:
        folder = run.log.model_dir
        points = read_points(folder, f"cross_entropy/{HELD_OUT}")
        training = read_points(folder, "cross_entropy")
        picture = draw_losses(folder, training, points) if processes.is_first() else None
        checkpoint = model_dir / f"checkpoint_{loop.step}"
        # There may be no record, if it was damaged.
        step, value = points[-1] if points else (loop.step, float("nan"))
        first = f", {points[0][1]:.3f} at {points[0][0]}" if len(points) > 1 else ""
        lines = [f"held-out cross entropy: {value:.3f} at step {step}{first}"]
        lines += [f"checkpoint: {checkpoint}", *([f"curves: {picture}"] if picture else [])]
        return TrainResult(
            model_dir,
            loop.step,
            "\n".join(lines),
            checkpoint=checkpoint,
            held_out_loss=value,
        )


def split_batch(batch: examples.Batch, parts: int) -> list[examples.Batch]:
    """The batch in `parts` parts of equal size.

    >>> [part["x"].tolist() for part in split_batch({"x": np.arange(4)}, 2)]
    [[0, 1], [2, 3]]
    """
    cut = {name: np.split(array, parts) for name, array in batch.items()}
    return [{name: arrays[i] for name, arrays in cut.items()} for i in range(parts)]


def find_objective(experiment: Experiment) -> type[Objective]:
    """What an experiment trains on: its tasks, or with OBJECTIVE its corpus."""
    return Tasks if experiment.corpus.objective == "task" else Pretraining
