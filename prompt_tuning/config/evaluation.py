"""The settings of evaluation and of generated answers."""

from __future__ import annotations

from typing import Literal

from prompt_tuning.config.setting import check, own_settings, setting, settings

EvalMethod = Literal["generate", "rank", "both"]
RankScore = Literal["sum", "mean"]


@settings
class Decoding:
    """How answers are generated, but for their number; the names are those of T5X's functions."""

    method: Literal["beam", "transformers_beam", "sample"] = setting(
        "DECODING",
        "'beam' (of one: greedy), 'sample', or 'transformers_beam': by Hugging Face's rules",
        default="beam",
    )
    alpha: float = setting("ALPHA", "beam: exponent of the length penalty", default=0.6, at_least=0)
    temperature: float = setting(
        "TEMPERATURE",
        "sample: logits are divided by it; 0 takes the most probable token",
        default=1.0,
        at_least=0,
    )
    topk: int = setting(
        "TOPK", "sample: only from so many most probable tokens; 0: from all", default=0, at_least=0
    )
    topp: float = setting(
        "TOPP",
        "sample: only from the most probable tokens that have this share; 0: from all",
        default=0.0,
        at_least=0,
        at_most=1,
    )
    rescale_log_probs: bool = setting(
        "RESCALE_LOG_PROBS",
        "sample: scores of the distribution drawn from, not of the model",
        default=False,
    )
    seed: int = setting(
        "DECODE_SEED",
        "sample: with it and its number, a row always draws the same",
        default=0,
        at_least=0,
        below=2**32,
    )

    def __post_init__(self) -> None:
        check(
            not (self.topk and self.topp),
            f"TOPK ({self.topk}) and TOPP ({self.topp}) are both set: give at most one, as in T5X.",
        )
        of_samples = ("temperature", "topk", "topp", "rescale_log_probs", "seed")
        unread = ("alpha",) if self.method == "sample" else of_samples
        other = "beam" if self.method == "sample" else "sample"
        for leaf in own_settings(type(self)):
            value = getattr(self, leaf.name)
            check(
                leaf.name not in unread or value == leaf.default,
                f"{leaf.macro.name} is set ({value}), but DECODING is {self.method!r}, which "
                f"does not read it. Set DECODING = {other!r}, or leave it out.",
            )


BEAM = Decoding()


@settings
class EvalConfig:
    """Evaluation: when and how the tasks are scored."""

    period: int = setting("EVAL_PERIOD", "steps between evaluations", default=1000, at_least=1)
    method: EvalMethod = setting(
        "EVAL_METHOD", "'generate', 'rank' (the most likely label) or 'both'", default="generate"
    )
    metric: str = setting(
        "TASK_METRIC",
        "the metric that chooses the best prompt, e.g. 'f1'; empty: the mean of a task's metrics",
        default="",
    )
    rank_score: RankScore = setting(
        "RANK_SCORE",
        "what ranks: 'sum' of log p over a word's tokens, or the 'mean' over them",
        default="sum",
    )
    early_stopping_evals: int | None = setting(
        "EARLY_STOPPING_EVALS",
        "stop after so many evaluations without a new best; None: never",
        default=None,
        at_least=1,
    )
    num_decodes: int = setting(
        "NUM_DECODES",
        "beams or samples, of which the best is the answer; a beam of 1 is greedy",
        default=1,
        at_least=1,
    )
    decoding: Decoding = BEAM
    batch_size: int | None = setting(
        "EVAL_BATCH_SIZE", "None: BATCH_SIZE", default=None, at_least=1
    )
    num_examples: int | None = setting(
        "EVALUATOR_NUM_EXAMPLES",
        "score only the first rows of the split; None: all",
        default=None,
        at_least=1,
    )
    baselines: bool = setting(
        "EVAL_BASELINES",
        "also score the majority class and the model without a prompt",
        default=True,
    )
    bootstrap: int = setting(
        "EVAL_BOOTSTRAP",
        "resamples behind the 95 % interval of a metric; 0: no intervals",
        default=1000,
        at_least=0,
    )
