"""Makes the bundled backbone: `python -m prompt_tuning.world.pretrain --out=DIR`.

From the world's seed to everything under `world/tiny/`: vocabulary, span corruption, prefix-LM
adaptation, the T5X checkpoint, a log of the losses, and the probe. It sees reviews only, never a
label of a demo task. About ten minutes on two cores; docs/tiny_backbone.md has the numbers.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import io
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import sentencepiece
import tqdm
from jaxtyping import Array, Float, Int

from prompt_tuning.checkpoint.t5x import write_t5x
from prompt_tuning.config import ModelConfig
from prompt_tuning.model import loss, t5
from prompt_tuning.world import assets, generator, objectives, probe

Rows = Sequence[Int[np.ndarray, "T"]]
Batch = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """One stretch of pre-training with its own objective and learning-rate schedule."""

    name: str
    steps: int
    lengths: tuple[int, int]  # inputs, targets
    peak_lr: float
    batch_size: int = 32
    warmup: int = 100
    ends: tuple[int, ...] = ()  # ids that end sentences, for prefix_lm


PHASES = (
    Phase(name="span_corruption", steps=3000, lengths=(48, 16), peak_lr=3e-2),
    Phase(name="prefix_lm", steps=3000, lengths=(48, 16), peak_lr=2e-2),
)
HELD_OUT_REVIEWS = 512
LOG_EVERY = 100


def train_vocabulary(texts: Sequence[str]) -> bytes:
    """A SentencePiece model in which every word of the world is one piece.

    Printable ASCII is covered character by character, so that a user's own English words have
    ids as well. One thread and no sampling: the same text gives the same file.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=assets.VOCABULARY_PIECES,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        character_coverage=1.0,
        required_chars="".join(chr(code) for code in range(33, 127)),
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def make_pair(phase: Phase, tokens: np.ndarray, rng: np.random.Generator) -> objectives.Pair:
    """The row under the phase's objective."""
    if phase.name == "span_corruption":
        return objectives.span_corruption(tokens, rng, vocab_size=assets.TINY_CONFIG.num_embeddings)
    return objectives.prefix_lm(tokens, rng, longest=phase.lengths[1], ends=phase.ends)


def make_phase_batch(phase: Phase, rows: Rows, seed: Sequence[int]) -> dict[str, np.ndarray]:
    """The batch of one step: which rows, and how they are corrupted, follow from the seed."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(rows), size=phase.batch_size)
    pairs = [make_pair(phase, rows[i], rng) for i in chosen]
    return objectives.make_batch(pairs, phase.lengths)


def loss_sums(config: ModelConfig, params: t5.Params, batch: Mapping[str, Array]) -> loss.Metrics:
    """Summed loss and token counts of the plain backbone, without a prompt."""
    no_prompt = jnp.zeros((0, config.embed_dim))
    logits = loss.forward(config, params, no_prompt, batch)
    return loss.loss_fn(logits, batch)[1]


def make_step(config: ModelConfig, phase: Phase) -> tuple[optax.GradientTransformation, Callable]:
    """Adam with updates relative to each parameter's size, and the jitted step of all of them.

    Relative, because T5's initial values differ in size by a factor of 60 between queries and
    embeddings: a plain Adam step is too long for the one and too short for the other. (In 400
    steps from scratch: held-out loss 1.67 relative, 1.96 plain, each at its best rate.)
    """
    schedule = optax.warmup_cosine_decay_schedule(0.0, phase.peak_lr, phase.warmup, phase.steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b2=0.99),
        optax.scale_by_param_block_rms(),
        optax.scale_by_learning_rate(schedule),
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: t5.Params, state: optax.OptState, batch: Mapping[str, Array]):
        def mean_loss(params: t5.Params) -> Float[Array, ""]:
            sums = loss_sums(config, params, batch)
            return sums["loss"] / sums["tokens"]

        value, gradients = jax.value_and_grad(mean_loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    return optimizer, step


def run_phase(
    phase: Phase, params: t5.Params, rows: Rows, held_out: Rows, *, seed: int
) -> tuple[t5.Params, list[dict[str, float | str]]]:
    """The parameters after the phase, and its log: mean training loss, held-out cross entropy."""
    config = assets.TINY_CONFIG
    optimizer, step = make_step(config, phase)
    state = optimizer.init(params)
    phase_id = [p.name for p in PHASES].index(phase.name)
    records, losses = [], []
    bar = tqdm.trange(phase.steps, desc=phase.name, mininterval=1.0)
    for i in bar:
        batch = make_phase_batch(phase, rows, (seed, phase_id, i))
        params, state, value = step(params, state, batch)
        losses.append(value)
        if (i + 1) % LOG_EVERY == 0:
            mean = float(np.mean(jax.device_get(losses)))
            losses = []
            record: dict[str, float | str] = {"phase": phase.name, "step": i + 1, "loss": mean}
            if (i + 1) % (5 * LOG_EVERY) == 0 or i + 1 == phase.steps:
                record["held_out"] = held_out_loss(phase, params, held_out)
            records.append(record)
            bar.set_postfix({k: f"{v:.3f}" for k, v in record.items() if k in _SHOWN})
    return params, records


_SHOWN = ("loss", "held_out")


def held_out_loss(phase: Phase, params: t5.Params, rows: Rows) -> float:
    """Cross entropy per token, in nats, on reviews that training never sees."""
    evaluate = jax.jit(functools.partial(loss_sums, assets.TINY_CONFIG))
    rng = np.random.default_rng(0)
    pairs = [make_pair(phase, row, rng) for row in rows]
    batch = objectives.make_batch(pairs, phase.lengths)
    sums = evaluate(params, batch)
    return float(sums["cross_entropy"] / sums["tokens"])


def unigram_loss(phase: Phase, rows: Rows, held_out: Rows) -> float:
    """What knowing only how often each token occurs would cost on the same targets."""
    counts = Counter(int(token) for row in rows for token in row)
    total = sum(counts.values()) + assets.TINY_CONFIG.num_embeddings
    rng = np.random.default_rng(0)
    targets = [make_pair(phase, row, rng)[1][:-1] for row in held_out]
    tokens = np.concatenate(targets)
    return float(-np.mean([np.log((counts[int(token)] + 1) / total) for token in tokens]))


def make_phases(
    tokenizer: sentencepiece.SentencePieceProcessor, *, speedup: int = 1
) -> list[Phase]:
    """The phases, which know the ids that end sentences in this vocabulary."""
    pieces = [tokenizer.id_to_piece(i) for i in range(tokenizer.get_piece_size())]
    ends = tuple(i for i, piece in enumerate(pieces) if piece.endswith((".", "!")))
    return [dataclasses.replace(p, steps=p.steps // speedup, ends=ends) for p in PHASES]


def round_to_bfloat16(params: t5.Params) -> dict[str, Array]:
    """The parameters as the file will hold them: half the size, and exact when read again."""
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), dict(params))
    return {name: jnp.asarray(value, jnp.float32) for name, value in rounded.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Pre-trains and writes everything to `--out`."""
    parser = argparse.ArgumentParser(description="Pre-trains the bundled backbone.")
    parser.add_argument("--out", required=True, help="folder to write, e.g. /tmp/tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--speedup", type=int, default=1, help="divide the steps by this (trial)")
    args = parser.parse_args(argv)
    out, started = Path(args.out), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)

    texts = list(generator.corpus())
    (out / "sentencepiece.model").write_bytes(train_vocabulary(texts))
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(out / "sentencepiece.model"))

    def tokenize(texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(ids, np.int32) for ids in tokenizer.encode(list(texts))]

    phases = make_phases(tokenizer, speedup=args.speedup)
    rows = tokenize(texts)
    unseen = generator.corpus(HELD_OUT_REVIEWS, seed=generator.HELD_OUT_SEED)
    held_out = tokenize(list(unseen))

    params: t5.Params = t5.init_params(assets.TINY_CONFIG, jax.random.key(args.seed))
    fresh = jax.device_get(params)
    log = []
    for phase in phases:
        params, records = run_phase(phase, params, rows, held_out, seed=args.seed)
        log += records
    final = round_to_bfloat16(params)
    step = sum(phase.steps for phase in phases)
    write_t5x(str(out / f"checkpoint_{step}"), final, step, dtype="bfloat16")

    summary = {
        "seed": args.seed,
        "steps": {phase.name: phase.steps for phase in phases},
        "parameters": sum(value.size for value in final.values()),
        "held_out": {p.name: held_out_loss(p, final, held_out) for p in phases},
        "unigram": {p.name: unigram_loss(p, rows, held_out) for p in phases},
        "probe": probe.report(assets.TINY_CONFIG, final, fresh, tokenize),
        "minutes": round((time.monotonic() - started) / 60, 1),
    }
    with (out / "losses.jsonl").open("w") as file:
        file.writelines(json.dumps(record) + "\n" for record in log)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
