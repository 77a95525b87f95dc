"""Makes peft_outputs.npz: PEFT and transformers on the bundled backbone, with two prompts.

`tuned` is a prompt that PEFT made and tuned (2 P rows, as PEFT saves them); `ours` is a prompt of
random rows in our own folder, loaded by PEFT. Made with torch 2.13, transformers 5.24, peft 0.21.2
on CPU:

    PYTHONPATH=.:tests/golden python tests/golden/make_peft_outputs.py
"""

import tempfile
from pathlib import Path

import numpy as np
import peft
import peft_t5
import safetensors.numpy

from prompt_tuning.model.prompt import Prompt
from prompt_tuning.prompts.prompt_file import PromptMetadata, save_prompt
from prompt_tuning.vocabularies.vocabulary import load_vocabulary


def padded(texts: tuple[str, ...]) -> np.ndarray:
    vocabulary = load_vocabulary("tiny")
    rows = [[*vocabulary.encode(text), vocabulary.eos_id] for text in texts]
    width = max(map(len, rows))
    return np.array([row + [0] * (width - len(row)) for row in rows])


def main() -> None:
    inputs, targets = padded(peft_t5.TEXTS), padded(peft_t5.TARGETS)
    stored = {"inputs": inputs.astype(np.int32), "targets": targets.astype(np.int32)}
    model = peft_t5.new_adapter()
    peft_t5.tune(model, inputs, targets)
    ours = 15 * np.random.default_rng(7).standard_normal((peft_t5.P, 128)).astype(np.float32)
    with tempfile.TemporaryDirectory() as work:
        model.save_pretrained(work)
        file = Path(work) / "adapter_model.safetensors"
        stored["tuned/prompt"] = safetensors.numpy.load_file(file)["prompt_embeddings"]
        save_prompt(Path(work) / "ours", Prompt(ours), PromptMetadata())
        loaded = peft.PeftModel.from_pretrained(peft_t5.make_t5(), f"{work}/ours").eval()
    stored["ours/prompt"] = ours
    for name, adapter in (("tuned", model.eval()), ("ours", loaded)):
        for key, array in peft_t5.outputs(adapter, inputs, targets).items():
            stored[f"{name}/{key}"] = array.astype(np.int32) if key == "greedy" else array
    np.savez_compressed(Path(__file__).with_name("peft_outputs.npz"), **stored)
    for name, array in stored.items():
        print(name, array.shape, array.dtype)


if __name__ == "__main__":
    main()
