"""Makes t5x_samples.npz: what upstream T5X's sampling and beam search make of random logits.

Run where T5X can be imported (docs/t5x.md). Made with google-research/t5x at
cc342d419ec3e3e9c4bf1df33c82330cafdc1e16, jax 0.10.2, on CPU in float32. The language is one with a
memory of one token: the logits are the row of a table that the last token names.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from t5x import decoding

ROWS, VOCABULARY, LENGTH, SEED = 3, 23, 7, 5
CASES = {
    "plain": {"temperature": 1.0, "topk": 0},
    "hot": {"temperature": 2.5, "topk": 0, "num_decodes": 4},
    "cold": {"temperature": 0.3, "topk": 0, "rescale_log_probs": False},
    "topk": {"temperature": 1.0, "topk": 3, "num_decodes": 4},
    "topk_ties": {"temperature": 1.5, "topk": 2, "num_decodes": 4, "rescale_log_probs": False},
    "topp": {"temperature": 1.0, "topk": 0, "topp": 0.6, "num_decodes": 4},
    "topp_hot": {"temperature": 2.0, "topk": 0, "topp": 0.9, "rescale_log_probs": False},
    "zero": {"temperature": 0.0, "topk": 0, "rescale_log_probs": False},
    "zero_rescaled": {"temperature": 0.0, "topk": 4, "num_decodes": 2},
}
ALPHAS = (0.0, 0.6, 1.0, 2.0)


def step(state):
    table = state.cache["table"]
    return table[jnp.arange(len(table)), state.cur_token[:, 0]], state.cache


def main():
    rng = np.random.default_rng(0)
    # Rounded, so that some logits are equal and the file is small.
    table = np.round(rng.normal(size=(ROWS, VOCABULARY, VOCABULARY)) * 6).astype(np.float32) / 4
    out = {"table": table, "cases": np.frombuffer(json.dumps(CASES).encode(), np.uint8)}
    key = jax.random.PRNGKey(SEED)

    def run(rows, search, **options):
        inputs = jnp.zeros((len(rows), LENGTH), jnp.int32)
        return search(inputs, {"table": jnp.asarray(table[rows])}, step, 1, **options)

    for name, options in CASES.items():
        sample = decoding.temperature_sample
        found = run(list(range(ROWS)), sample, decode_rng=key, **options)
        out[f"{name}/joint/tokens"], out[f"{name}/joint/scores"] = found
        alone = [
            run([row], sample, decode_rng=jax.random.fold_in(key, row), **options)
            for row in range(ROWS)
        ]
        out[f"{name}/alone/tokens"] = np.concatenate([tokens for tokens, _ in alone])
        out[f"{name}/alone/scores"] = np.concatenate([scores for _, scores in alone])
    for alpha in ALPHAS:
        found = run(list(range(ROWS)), decoding.beam_search, num_decodes=3, alpha=alpha)
        out[f"beam_{alpha}/tokens"], out[f"beam_{alpha}/scores"] = found
    path = Path(__file__).with_name("t5x_samples.npz")
    small = {k: np.asarray(v, np.int8) if k.endswith("tokens") else v for k, v in out.items()}
    np.savez_compressed(path, **{name: np.asarray(value) for name, value in small.items()})


if __name__ == "__main__":
    main()
