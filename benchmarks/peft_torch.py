"""One measurement of Hugging Face PEFT's prompt tuning of the same T5, in PyTorch."""

from __future__ import annotations

import time
from typing import Any

STARTED = time.perf_counter()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from peft import (  # noqa: E402
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from transformers import T5Config, T5ForConditionalGeneration  # noqa: E402
from workload import Workload, main, measure  # noqa: E402

from prompt_tuning.api import model_config  # noqa: E402


def run(workload: Workload) -> dict[str, Any]:
    """Steps on a random T5 1.1 of the same size; every batch is padded to its longest row."""
    sizes = model_config(workload.size)  # type: ignore[arg-type]
    config = T5Config(
        vocab_size=sizes.num_embeddings,
        d_model=sizes.embed_dim,
        d_kv=sizes.head_dim,
        d_ff=sizes.mlp_dim,
        num_layers=sizes.num_encoder_layers,
        num_decoder_layers=sizes.num_decoder_layers,
        num_heads=sizes.num_heads,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    dtype, device = getattr(torch, workload.dtype), "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_dtype(dtype)  # xxl in float32 would not fit everywhere
    with torch.device(device):
        base = T5ForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)  # of the prompt, as its users have it
    method: Any = {
        "prompt_tuning": PromptTuningConfig,
        "p_tuning": PromptEncoderConfig,
        "prefix_tuning": PrefixTuningConfig,
    }[workload.method]
    settings = {"encoder_hidden_size": 128} if workload.method == "p_tuning" else {}
    config_of_method = method(
        task_type=TaskType.SEQ_2_SEQ_LM,
        num_virtual_tokens=workload.prompt,
        num_transformer_submodules=1,
        **settings,
    )
    model = get_peft_model(base, config_of_method).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.3)

    def one(number: int) -> None:
        inputs, targets = workload.tokens(number)
        width = max(map(len, inputs))
        padded = np.stack([np.pad(x, (0, width - len(x))) for x in inputs])
        ids, labels = (torch.tensor(x).long().to(device) for x in (padded, np.stack(targets)))
        model(input_ids=ids, attention_mask=(ids > 0).long(), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    found = measure(workload, one, STARTED)
    if device == "cuda":
        found["device_memory_bytes"] = float(torch.cuda.max_memory_allocated())
    return found


if __name__ == "__main__":
    main(run)
