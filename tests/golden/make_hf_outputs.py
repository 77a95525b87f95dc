"""Makes hf/: a tiny random model of each family as transformers writes it, and what it computes.

Made with transformers 5.24.0 and torch 2.13.0 on CPU. The weights are stored in float32, bfloat16
(Flan-T5, in several files) and float16 (ByT5), and run in float32.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from huggingface_models import FAMILIES, make_model, make_tokens, run

SEEDS = {"t5_1_0": 7, "t5_1_1": 4, "flan_t5": 0, "mt5": 11, "byt5": 11}
DTYPES = {"flan_t5": torch.bfloat16, "byt5": torch.float16}


def main():
    root = Path(__file__).parent / "hf"
    shutil.rmtree(root, ignore_errors=True)
    for family in FAMILIES:
        model = make_model(family, seed=SEEDS[family]).to(DTYPES.get(family, torch.float32))
        limit = "8KB" if family == "flan_t5" else "5GB"
        model.save_pretrained(root / family, max_shard_size=limit)
        (root / family / "generation_config.json").unlink()
        inputs, targets = make_tokens(np.random.default_rng(SEEDS[family]))
        outputs = run(model, inputs, targets)
        np.savez_compressed(root / f"{family}.npz", inputs=inputs, targets=targets, **outputs)
        print(family, json.loads((root / family / "config.json").read_text())["dtype"])


if __name__ == "__main__":
    main()
