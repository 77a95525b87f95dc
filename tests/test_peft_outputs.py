"""A prompt tuned here says the same in PEFT and transformers, and one tuned there says it here."""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import as_prompt

from prompt_tuning import Predictor, load_prompt
from prompt_tuning.checkpoints.t5x import read_t5x
from prompt_tuning.decoding import decode
from prompt_tuning.model import loss, t5
from prompt_tuning.model.prompt import Prompt
from prompt_tuning.prompts.convert import convert_prompt
from prompt_tuning.prompts.peft import read_peft, write_peft
from prompt_tuning.prompts.prompt_file import PromptMetadata, save_prompt
from prompt_tuning.world.assets import TINY_CONFIG, tiny_checkpoint

GOLDEN = Path(__file__).parent / "golden"
STORED = np.load(GOLDEN / "peft_outputs.npz")
INPUTS, TARGETS = STORED["inputs"], STORED["targets"]
LENGTH = STORED["ours/greedy"].shape[1]
MODEL = t5.T5(TINY_CONFIG)
forward = jax.jit(loss.forward, static_argnums=0)
generate = jax.jit(decode.generate, static_argnums=0, static_argnames=("length", "num_decodes"))


@pytest.fixture(scope="module")
def backbone() -> dict[str, Any]:
    return read_t5x(tiny_checkpoint(), t5.param_shapes(TINY_CONFIG), dtype="float32")[0]


def assert_says_the_same(backbone, prompt: np.ndarray, theirs: dict[str, np.ndarray]) -> None:
    """Logits within 1e-5 of their scale where there are targets; the very same tokens."""
    batch = {
        "encoder_input_tokens": jnp.asarray(INPUTS),
        "decoder_input_tokens": jnp.asarray(np.pad(TARGETS, ((0, 0), (1, 0)))[:, :-1]),
        "decoder_target_tokens": jnp.asarray(TARGETS),
    }
    logits = np.asarray(forward(MODEL, backbone, Prompt(jnp.asarray(prompt)), batch))
    valid, scale = TARGETS > 0, np.abs(theirs["logits"]).max()
    np.testing.assert_allclose(logits[valid], theirs["logits"][valid], atol=1e-5 * scale, rtol=0)
    tokens, _ = generate(
        MODEL, backbone, Prompt(jnp.asarray(prompt)), jnp.asarray(INPUTS), length=LENGTH
    )
    np.testing.assert_array_equal(tokens, theirs["greedy"])


def stored(name: str) -> dict[str, np.ndarray]:
    return {key: STORED[f"{name}/{key}"] for key in ("logits", "greedy")}


def test_as_peft_and_transformers_computed_it(backbone, tmp_path: Path) -> None:
    assert_says_the_same(backbone, STORED["ours/prompt"], stored("ours"))
    saved = STORED["tuned/prompt"]
    length = len(saved) // 2
    write_peft(tmp_path, as_prompt(saved[:length]), submodules=2)
    assert_says_the_same(backbone, load_prompt(tmp_path)[0], stored("tuned"))


def test_the_stored_outputs_can_tell_prompts_apart() -> None:
    """Both prompts matter, and the second half of PEFT's does not."""
    assert not np.allclose(STORED["ours/logits"], STORED["tuned/logits"], atol=1)
    assert len({row.tobytes() for row in STORED["ours/greedy"]}) > 1


# Live


@pytest.fixture(scope="module")
def peft_t5() -> Any:
    for name in ("torch", "transformers", "peft"):
        pytest.importorskip(name, reason="needs torch, transformers and peft")
    sys.path.insert(0, str(GOLDEN))
    try:
        import peft_t5
    finally:
        sys.path.remove(str(GOLDEN))
    return peft_t5


def test_a_prompt_tuned_by_peft(backbone, peft_t5: Any, tmp_path: Path) -> None:
    model = peft_t5.new_adapter(seed=1)
    peft_t5.tune(model, INPUTS.astype(np.int64), TARGETS.astype(np.int64))
    model.save_pretrained(str(tmp_path / "peft"))
    theirs = peft_t5.outputs(model.eval(), INPUTS.astype(np.int64), TARGETS.astype(np.int64))
    adapter = read_peft(tmp_path / "peft")
    assert adapter.unused_rows == len(adapter.prompt.rows) == peft_t5.P
    assert_says_the_same(backbone, load_prompt(tmp_path / "peft")[0], theirs)
    convert_prompt(tmp_path / "peft", tmp_path / "ours", "ours")
    np.testing.assert_array_equal(load_prompt(tmp_path / "ours")[0], adapter.prompt.rows)


@pytest.mark.parametrize("form", ["ours", "peft", "dead half"])
def test_a_prompt_of_ours_in_peft(backbone, peft_t5: Any, tmp_path: Path, form: str) -> None:
    import peft

    prompt = STORED["ours/prompt"]
    save_prompt(tmp_path / "ours", as_prompt(prompt), PromptMetadata(task="tiny_mood"))
    if form != "ours":
        convert_prompt(tmp_path / "ours", tmp_path / form, "peft", dead_half=form == "dead half")
    loaded = peft.PeftModel.from_pretrained(peft_t5.make_t5(), str(tmp_path / form)).eval()
    theirs = peft_t5.outputs(loaded, INPUTS.astype(np.int64), TARGETS.astype(np.int64))
    assert_says_the_same(backbone, prompt, theirs)
    loaded.save_pretrained(str(tmp_path / "saved again"))
    np.testing.assert_array_equal(load_prompt(tmp_path / "saved again")[0], prompt)


def test_the_same_text(peft_t5: Any, tmp_path: Path) -> None:
    """From text to text: the predictor here, PEFT's generate there."""
    import peft

    save_prompt(tmp_path / "ours", as_prompt(STORED["ours/prompt"]), PromptMetadata())
    names = {"p": tmp_path / "ours"}
    limits = {"max_target_length": LENGTH, "max_input_length": 16}
    predictor = Predictor.from_checkpoint("tiny", TINY_CONFIG, "tiny", names, **limits)
    said = predictor.generate(peft_t5.TEXTS, ["p"] * len(peft_t5.TEXTS))
    loaded = peft.PeftModel.from_pretrained(peft_t5.make_t5(), str(tmp_path / "ours")).eval()
    theirs = peft_t5.outputs(loaded, INPUTS.astype(np.int64), TARGETS.astype(np.int64))
    assert said == [predictor.vocabulary.decode(row.tolist()) for row in theirs["greedy"]]
    assert len(set(said)) > 1
