"""Makes a backbone like the bundled one: `python benchmarks/world/tiny.py --out=DIR`.

The reviews of `prompt_tuning/world/generator.py`, a vocabulary, span corruption, LM adaptation, the
checkpoint in bfloat16, and what a probe finds in it. All of it is the pre-training run of
`prompt_tuning/pretraining/run.py`; this file is its settings.
docs/tiny_backbone.md says how the files that are shipped were made.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import numpy as np
import probe
import sentencepiece

from prompt_tuning.checkpoints.t5x import read_t5x, write_t5x
from prompt_tuning.config import (
    CorpusConfig,
    DataConfig,
    EvalConfig,
    Experiment,
    OptimizerConfig,
    PromptConfig,
    TrainConfig,
)
from prompt_tuning.model import t5
from prompt_tuning.pretraining.run import Pretraining
from prompt_tuning.pretraining.train_vocabulary import write_vocabulary
from prompt_tuning.training.loop import train
from prompt_tuning.world import assets, generator

INPUTS = 48  # the longest review
STEPS = 3000  # of each objective
HELD_OUT_REVIEWS = 512


def make_experiment(out: Path, objective: str, start: str | None, *, steps: int) -> Experiment:
    """The settings of one of the two phases."""
    adapts = objective == "prefix_lm"
    return Experiment(
        model_dir=str(out / objective),
        initial_checkpoint_path=start,
        model=assets.TINY_CONFIG,
        data=DataConfig(
            mixture_or_task_name=(),
            task_feature_lengths={"inputs": INPUTS} | ({"targets": INPUTS} if adapts else {}),
            vocabulary=str(out / "sentencepiece.model"),
        ),
        corpus=CorpusConfig(
            objective="prefix_lm" if adapts else "span_corruption",
            files=str(out / "corpus.txt"),
            eval_files=str(out / "held_out.txt"),
            documents="line",
            merge_documents=False,
        ),
        prompt=PromptConfig(length=0),
        optimizer=OptimizerConfig(
            learning_rate=1.0,
            schedule="rsqrt",
            warmup_steps=1000,
            weight_decay=0.0,
            multiply_by_parameter_scale=True,
        ),
        train=TrainConfig(
            trainable="model", train_steps_relative=steps, restore_optimizer=start is not None
        ),
        eval=EvalConfig(period=min(500, steps)),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Pre-trains and writes everything to `--out`."""
    parser = argparse.ArgumentParser(description="Pre-trains a backbone like the bundled one.")
    parser.add_argument("--out", required=True, help="folder to write, e.g. /tmp/tiny")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each objective")
    args = parser.parse_args(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    _write_lines(out / "corpus.txt", generator.corpus())
    unseen = generator.corpus(HELD_OUT_REVIEWS, seed=generator.HELD_OUT_SEED)
    _write_lines(out / "held_out.txt", unseen)
    model = str(out / "sentencepiece.model")
    pieces = assets.VOCABULARY_PIECES
    write_vocabulary(generator.corpus(), model, pieces, model_type="bpe")

    pretraining = functools.partial(make_experiment, out, steps=args.steps)
    first = train(pretraining("span_corruption", None), objective=Pretraining)
    start = str(first.checkpoint)
    last = train(pretraining("prefix_lm", start), objective=Pretraining)

    params, step = read_t5x(str(last.checkpoint), t5.param_shapes(assets.TINY_CONFIG))
    checkpoint = str(out / f"checkpoint_{step}")
    write_t5x(checkpoint, params, step, dtype="bfloat16")
    rounded, _ = read_t5x(checkpoint, t5.param_shapes(assets.TINY_CONFIG))
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=model)

    def tokenize(texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(ids, np.int32) for ids in tokenizer.encode(list(texts))]

    fresh = t5.init_params(assets.TINY_CONFIG, jax.random.key(0))
    summary = {
        "held_out": {"span_corruption": first.held_out_loss, "prefix_lm": last.held_out_loss},
        "probe": probe.report(assets.TINY_CONFIG, rounded, fresh, tokenize),
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
