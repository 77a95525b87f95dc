"""A prompt folder: what is written is read, by us and by PEFT, and nothing else is accepted."""

import dataclasses
import io
import json
import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.numpy import bfloat16
from tiny_models import CONFIG, as_prompt, random_params

from prompt_tuning.config import ConfigError
from prompt_tuning.methods.method import Frozen
from prompt_tuning.methods.table import METHODS
from prompt_tuning.model.prompt import Prompt, no_prompt, stack_prompts
from prompt_tuning.prompts import prompt_file
from prompt_tuning.prompts.convert import convert_prompt
from prompt_tuning.prompts.prompt_file import (
    PromptMetadata,
    check_prompt,
    load_prompt,
    save_prompt,
)

METADATA = PromptMetadata(
    task="super_glue_boolq_v102",
    label_words=("True", "False"),
    method="residual",
    settings={"hidden": 3},
    backbone="ab" * 32,
    vocabulary="cd" * 32,
    init="class_labels True, False",
    step=1_130_000,
    score=82.5,
    score_name="accuracy/generate",
    config_hash="ef" * 32,
    prompt_tuning_version="1.0",
)
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def prompt() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((20, 32)).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path, prompt: np.ndarray) -> Path:
    save_prompt(tmp_path / "prompts" / "best", as_prompt(prompt), METADATA)
    return tmp_path / "prompts" / "best"


# ---- the folder


def test_what_is_saved_is_loaded(folder: Path, prompt: np.ndarray) -> None:
    loaded, metadata = load_prompt(folder)
    np.testing.assert_array_equal(loaded.rows, prompt)
    assert loaded.rows.dtype == np.float32
    assert metadata == METADATA


def test_metadata_may_be_empty(tmp_path: Path, prompt: np.ndarray) -> None:
    save_prompt(tmp_path / "p", as_prompt(prompt), PromptMetadata())
    assert load_prompt(str(tmp_path / "p"))[1] == PromptMetadata()


def test_holds_what_peft_needs(folder: Path, prompt: np.ndarray) -> None:
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter_config.json",
        WEIGHTS,
        "prompt_tuning.json",
    ]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "PROMPT_TUNING"
    assert config["task_type"] == "SEQ_2_SEQ_LM"
    assert (config["num_virtual_tokens"], config["token_dim"]) == (20, 32)
    assert config["num_transformer_submodules"] == 1
    assert config["base_model_name_or_path"] is None
    (tensor,) = safetensors.numpy.load_file(folder / WEIGHTS).items()
    assert tensor[0] == "prompt_embeddings"
    np.testing.assert_array_equal(tensor[1], prompt)


def test_the_same_prompt_gives_the_same_bytes(folder: Path, prompt: np.ndarray) -> None:
    save_prompt(folder.parent / "again", as_prompt(prompt), METADATA)
    for file in folder.iterdir():
        assert file.read_bytes() == (folder.parent / "again" / file.name).read_bytes()


def test_names_the_base_model_for_peft(tmp_path: Path, prompt: np.ndarray) -> None:
    save_prompt(tmp_path / "p", as_prompt(prompt), METADATA, base_model="google/t5-base-lm-adapt")
    config = json.loads((tmp_path / "p/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "google/t5-base-lm-adapt"


def test_replaces_a_folder_whole(folder: Path, prompt: np.ndarray) -> None:
    (folder / "stray").touch()
    save_prompt(folder, as_prompt(prompt + 1), dataclasses.replace(METADATA, step=5))
    loaded, metadata = load_prompt(folder)
    np.testing.assert_array_equal(loaded.rows, prompt + 1)
    assert metadata is not None
    assert metadata.step == 5
    assert not (folder / "stray").exists()
    assert [p.name for p in folder.parent.iterdir()] == ["best"]


def test_a_refused_prompt_leaves_what_was_there(folder: Path, prompt: np.ndarray) -> None:
    prompt = prompt.copy()
    prompt[3, 4] = np.nan
    with pytest.raises(ConfigError, match=r"1 values .*not finite"):
        save_prompt(folder, as_prompt(prompt), METADATA)
    assert load_prompt(folder)[1] == METADATA


def test_a_float64_prompt_is_saved_in_float32(tmp_path: Path) -> None:
    save_prompt(tmp_path / "p", Prompt(np.full((2, 3), 0.1)), METADATA)
    loaded, _ = load_prompt(tmp_path / "p")
    np.testing.assert_array_equal(loaded.rows, np.full((2, 3), np.float32(0.1)))


FIELDS = {
    "encoder": np.arange(2 * 2 * 3 * 4 * 8, dtype=np.float32).reshape(2, 2, 3, 4, 8),
    "cross": np.ones((2, 2, 1, 4, 8), np.float32),
    "memory": np.ones((5, 32), np.float32),
}


@pytest.mark.parametrize("rows", [0, 3])
def test_keys_values_and_memory_are_loaded_as_saved(tmp_path: Path, rows: int) -> None:
    given = Prompt(np.ones((rows, 32), np.float32), **FIELDS)
    save_prompt(tmp_path / "p", given, METADATA)
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == [
        "prompt.safetensors",
        "prompt_tuning.json",
    ]
    loaded, metadata = load_prompt(tmp_path / "p")
    assert metadata == METADATA
    for field in ("rows", *FIELDS):
        np.testing.assert_array_equal(getattr(loaded, field), getattr(given, field))
    assert loaded.decoder is None
    save_prompt(tmp_path / "again", loaded, METADATA)
    for file in (tmp_path / "p").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    prompt_file.check_prompt(loaded, metadata, shape=(None, 32), model=CONFIG, where="p")
    deeper = dataclasses.replace(CONFIG, num_encoder_layers=3)
    with pytest.raises(ConfigError, match=r"encoder of shape \(2, 2, 3, 4, 8\)"):
        prompt_file.check_prompt(loaded, metadata, shape=(None, 32), model=deeper, where="p")
    with pytest.raises(ConfigError, match=r"encoder, cross, memory.*rows alone"):
        prompt_file.check_prompt(loaded, metadata, shape=(None, 32), where="p")
    data = bytearray((tmp_path / "p/prompt.safetensors").read_bytes())
    data[-3] ^= 1
    (tmp_path / "p/prompt.safetensors").write_bytes(data)
    with pytest.raises(ConfigError, match=r"prompt\.safetensors"):
        load_prompt(tmp_path / "p")
    (tmp_path / "p/prompt.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"prompt\.safetensors"):
        load_prompt(tmp_path / "p")


def test_members_are_saved_one_by_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="members"):
        save_prompt(tmp_path / "p", Prompt(np.ones((2, 3, 32)), lengths=np.ones((2, 5))), METADATA)
    assert not (tmp_path / "p").exists()


def test_a_saved_prefix_can_stand_beside_prompts_of_rows(tmp_path: Path) -> None:
    """Its file has no rows; the model says how wide none are."""
    shape = (CONFIG.num_decoder_layers, 2, 3, CONFIG.num_heads, CONFIG.head_dim)
    no_rows = jnp.zeros((0, CONFIG.embed_dim))
    save_prompt(tmp_path / "p", Prompt(no_rows, decoder=jnp.ones(shape)), METADATA)
    frozen = Frozen(CONFIG, {})
    prompt, _ = prompt_file.load_fitting_prompt(
        tmp_path / "p", (None, CONFIG.embed_dim), frozen=frozen
    )
    assert prompt.rows.shape == (0, CONFIG.embed_dim)
    stack_prompts([prompt, no_prompt(CONFIG), Prompt(jnp.ones((2, CONFIG.embed_dim)))])


def test_a_shared_prompt_is_never_read_as_a_plain_one(tmp_path: Path, prompt: np.ndarray) -> None:
    metadata = dataclasses.replace(METADATA, method="shared_prompt", visibility="prompt")
    save_prompt(tmp_path / "p", as_prompt(prompt), metadata)
    assert not (tmp_path / "p" / WEIGHTS).exists()  # PEFT would load it
    with pytest.raises(ConfigError, match="shared prompt: its rows do not see the input"):
        load_prompt(tmp_path / "p")
    frozen = Frozen(CONFIG, random_params())
    loaded, found = load_prompt(tmp_path / "p", frozen)
    assert found == metadata
    expected = METHODS["shared_prompt"].fold(None, {"prompt": prompt}, frozen, None)
    for one, other in zip(jax.tree.leaves(loaded), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6 * np.abs(other).max(initial=0))
    with pytest.raises(ConfigError, match="shared prompt"):
        convert_prompt(tmp_path / "p", tmp_path / "q", "npy")
    convert_prompt(tmp_path / "p", tmp_path / "q", "ours")
    np.testing.assert_array_equal(prompt_file.read_prompt(tmp_path / "q").prompt.rows, prompt)
    described = tmp_path / "p/prompt_tuning.json"
    values = {**json.loads(described.read_text()), "visibility": "input"}
    values.pop("sha256")  # as after an edit
    described.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="visibility"):
        load_prompt(tmp_path / "p")
    cudnn = dataclasses.replace(frozen.model, attention="cudnn", dtype="bfloat16")
    prompt_file.check_stored_prompt(tmp_path / "q", frozen.model)
    with pytest.raises(ConfigError, match="ATTENTION"):
        prompt_file.check_stored_prompt(tmp_path / "q", cudnn)  # before weights are read


# ---- files of others


def test_loads_the_original_release(shared_dir: Path, tmp_path: Path) -> None:
    file = shared_dir / "data/t5x_test_checkpoints/prompt_tuning/prompt_5x256.npy"
    loaded, metadata = load_prompt(file)
    np.testing.assert_array_equal(loaded.rows, np.load(file).astype(np.float32))
    assert (loaded.rows.shape, loaded.rows.dtype, metadata) == ((5, 256), np.float32, None)


def test_loads_npy_under_any_name(tmp_path: Path, prompt: np.ndarray) -> None:
    file = tmp_path / "encoder.prompt.prompt.prompt"  # as the original's checkpoints hold it
    for array in (prompt, np.asfortranarray(prompt), prompt.astype(np.float16)):
        with file.open("wb") as stream:
            np.save(stream, array)
        np.testing.assert_array_equal(load_prompt(file)[0].rows, array.astype(np.float32))


def test_takes_the_half_of_a_peft_prompt_that_peft_uses(folder: Path, prompt: np.ndarray) -> None:
    """PEFT's default for an encoder-decoder saves 2 P rows, of which the first P reach it."""
    (folder / "prompt_tuning.json").unlink()
    doubled = np.concatenate([prompt, np.zeros_like(prompt)])
    safetensors.numpy.save_file({"prompt_embeddings": doubled}, folder / WEIGHTS)
    loaded, metadata = load_prompt(folder)
    np.testing.assert_array_equal(loaded.rows, prompt)
    assert metadata is None


def test_loads_a_half_precision_peft_prompt(folder: Path, prompt: np.ndarray) -> None:
    (folder / "prompt_tuning.json").unlink()
    for dtype in (np.float16, bfloat16):
        tensors = {"prompt_embeddings": prompt.astype(dtype)}
        safetensors.numpy.save_file(tensors, folder / WEIGHTS)
        expected = prompt.astype(dtype).astype(np.float32)
        np.testing.assert_array_equal(load_prompt(folder)[0].rows, expected)


# ---- errors


def test_nothing_there(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        load_prompt(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"1 prompts.*/prompts/best"):
        load_prompt(tmp_path)  # a MODEL_DIR
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ConfigError, match=r"notes\.txt"):
        load_prompt(tmp_path / "notes.txt")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(5, np.float32), r"\(5,\)"),
        (np.zeros((0, 5), np.float32), r"\(0, 5\)"),
        (np.full((2, 5), np.inf, np.float32), "10 values"),
        (np.full((2, 5), 1e300), "10 values"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_an_impossible_prompt_is_refused(
    tmp_path: Path, folder: Path, array: np.ndarray, message: str
) -> None:
    np.save(tmp_path / "prompt.npy", array)
    safetensors.numpy.save_file({"prompt_embeddings": array}, folder / WEIGHTS)
    for path in (tmp_path / "prompt.npy", folder):
        with pytest.raises(ConfigError, match=message):
            load_prompt(path)


def test_integers_are_refused(tmp_path: Path, folder: Path) -> None:
    np.save(tmp_path / "prompt.npy", np.zeros((2, 5), np.int32))
    with pytest.raises(ConfigError, match="int32"):
        load_prompt(tmp_path / "prompt.npy")
    safetensors.numpy.save_file({"prompt_embeddings": np.zeros((2, 5), np.int8)}, folder / WEIGHTS)
    with pytest.raises(ConfigError, match=r"F64, F32, F16, BF16.*'I8'"):
        load_prompt(folder)


class Trap:
    """Unpickling it would create a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    file, trap = tmp_path / "prompt.npy", tmp_path / "executed"
    np.save(file, np.array([[Trap(trap)]], dtype=object), allow_pickle=True)
    with pytest.raises(ConfigError, match="is damaged"):
        load_prompt(file)
    file.write_bytes(pickle.dumps(Trap(trap)))
    with pytest.raises(ConfigError, match="neither"):
        load_prompt(file)
    assert not trap.exists()


@pytest.mark.parametrize("shape", [(2**40, 2**20), (10**30, 10**30), (4, 33)])
def test_declared_sizes_are_checked_before_memory_is_taken(
    tmp_path: Path, folder: Path, shape: tuple[int, int]
) -> None:
    stream = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    (tmp_path / "prompt.npy").write_bytes(stream.getvalue() + bytes(512))
    with pytest.raises(ConfigError, match=r"prompt\.npy is damaged"):
        load_prompt(tmp_path / "prompt.npy")

    tensor = {"dtype": "F32", "shape": shape, "data_offsets": [0, shape[0] * shape[1] * 4]}
    text = json.dumps({"prompt_embeddings": tensor}).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + bytes(512))
    with pytest.raises(ConfigError, match="safetensors is damaged"):
        load_prompt(folder)
    (folder / WEIGHTS).write_bytes((2**62).to_bytes(8, "little") + text)
    with pytest.raises(ConfigError, match="safetensors is damaged"):
        load_prompt(folder)


def damage(data: bytes, draw: st.DrawFn) -> bytes:
    """The bytes cut off somewhere, or with one of them changed."""
    place = draw(st.integers(0, len(data) - 1))
    if draw(st.booleans()):
        return data[:place]
    changed = bytearray(data)
    changed[place] ^= draw(st.integers(1, 255))
    return bytes(changed)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_a_damaged_folder_is_refused_or_harmless(
    tmp_path: Path, prompt: np.ndarray, data: st.DataObject
) -> None:
    """Whatever single change happens to one file: an error of ours, or the very same prompt."""
    folder = tmp_path / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    save_prompt(folder, as_prompt(prompt), METADATA)
    name = data.draw(st.sampled_from(sorted(p.name for p in folder.iterdir())))
    original = (folder / name).read_bytes()
    (folder / name).write_bytes(data.draw(st.composite(lambda draw: damage(original, draw))()))
    try:
        loaded, _ = load_prompt(folder)
    except ConfigError:
        return
    np.testing.assert_array_equal(loaded.rows, prompt)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_a_damaged_npy_is_an_error_of_ours(
    tmp_path: Path, prompt: np.ndarray, data: st.DataObject
) -> None:
    file = tmp_path / "prompt.npy"
    np.save(file, prompt)
    header = file.read_bytes()[:128]  # a change after it is a change of a number: undetectable
    changed = data.draw(st.composite(lambda draw: damage(header, draw))())
    file.write_bytes(changed + file.read_bytes()[128:] if len(changed) == 128 else changed)
    try:
        assert load_prompt(file)[0].rows.size == prompt.size
    except ConfigError:
        return


def test_any_bit_that_flips_in_a_folder_is_noticed(folder: Path) -> None:
    draw = random.Random(0)
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        for _ in range(40):
            data = bytearray(whole)
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            file.write_bytes(data)
            with pytest.raises(ConfigError, match=file.name.split(".")[0]):
                load_prompt(folder)
        for length in (0, 1, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:length])
            with pytest.raises(ConfigError, match=file.name.split(".")[0]):
                load_prompt(folder)
        file.write_bytes(whole)
    load_prompt(folder)


def test_metadata_in_another_encoding_is_refused(folder: Path) -> None:
    file = folder / "prompt_tuning.json"
    file.write_text(file.read_text(encoding="utf-8"), encoding="utf-16")
    with pytest.raises(ConfigError):
        load_prompt(folder)


def test_metadata_of_another_prompt_is_refused(folder: Path, prompt: np.ndarray) -> None:
    safetensors.numpy.save_file({"prompt_embeddings": prompt + 1}, folder / WEIGHTS)
    with pytest.raises(ConfigError, match=r"prompt_tuning\.json"):
        load_prompt(folder)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("step", "many", "step"), ("label_words", [1, 2], "label_words"), ("colour", 1, "colour")],
)
def test_metadata_of_another_form_is_refused(
    folder: Path, field: str, value: Any, message: str
) -> None:
    values = json.loads((folder / "prompt_tuning.json").read_text())
    del values["sha256"]
    (folder / "prompt_tuning.json").write_text(json.dumps({**values, field: value}))
    with pytest.raises(ConfigError, match=message):
        load_prompt(folder)


def test_an_adapter_of_another_kind_is_refused(folder: Path, prompt: np.ndarray) -> None:
    safetensors.numpy.save_file({"lora_A": prompt, "lora_B": prompt}, folder / WEIGHTS)
    with pytest.raises(ConfigError, match="lora_A"):
        load_prompt(folder)


@pytest.mark.parametrize(("field", "value"), [("token_dim", 31), ("num_virtual_tokens", 3)])
def test_an_adapter_of_other_sizes_than_its_weights_is_refused(
    folder: Path, field: str, value: int
) -> None:
    (folder / "prompt_tuning.json").unlink()  # its checksums would tell first
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(ConfigError, match=f"{field} = {value}"):
        load_prompt(folder)


def test_check_prompt(prompt: np.ndarray) -> None:
    def check(metadata: PromptMetadata | None = METADATA, **model: Any) -> None:
        check_prompt(as_prompt(prompt), metadata, where="p/best", **{"shape": (20, 32), **model})

    check()
    check(shape=(None, 32), backbone="ab" * 32, vocabulary="cd" * 32)
    check(None, backbone="00" * 32)
    check(PromptMetadata(), backbone="00" * 32, vocabulary="00" * 32)
    with pytest.raises(ConfigError, match=r"p/best .*\(20, 32\).*\(20, 64"):
        check(shape=(20, 64))
    with pytest.raises(ConfigError, match=r"\(any, 64\)"):
        check(shape=(None, 64))
    with pytest.raises(ConfigError, match=r"\(100, 32\).*PROMPT_LENGTH = 20"):
        check(shape=(100, 32))
    with pytest.raises(ConfigError, match=r"another backbone .*abababababab.*0000"):
        check(backbone="00" * 32)
    with pytest.raises(ConfigError, match=r"another vocabulary .*cdcd"):
        check(vocabulary="00" * 32)


# ---- Hugging Face PEFT


def test_peft_loads_the_folder_as_it_is(tmp_path: Path, prompt: np.ndarray) -> None:
    """The prompt reaches the encoder unchanged: as if its rows were embedded tokens."""
    reason = "needs torch, transformers and peft"
    torch = pytest.importorskip("torch", reason=reason)
    transformers = pytest.importorskip("transformers", reason=reason)
    peft = pytest.importorskip("peft", reason=reason)
    config = transformers.T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    tokens, targets = torch.tensor([[5, 6, 7, 1]]), torch.tensor([[9, 8, 1]])
    with torch.no_grad():
        embedded = model.get_input_embeddings()(tokens)
        rows = torch.cat([torch.tensor(prompt)[None], embedded], dim=1)
        expected = model(inputs_embeds=rows, labels=targets).logits

    save_prompt(tmp_path / "prompt", as_prompt(prompt), METADATA)
    tuned = peft.PeftModel.from_pretrained(model, str(tmp_path / "prompt")).eval()
    seen = []
    hook = tuned.base_model.encoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        logits = tuned(input_ids=tokens, labels=targets).logits
        generated = tuned.generate(input_ids=tokens, max_new_tokens=3)
    hook.remove()
    np.testing.assert_array_equal(tuned.get_prompt(1)[0].detach().numpy(), prompt)
    np.testing.assert_array_equal(seen[0][0, :20].numpy(), prompt)
    np.testing.assert_allclose(logits.numpy(), expected.numpy(), atol=1e-6)
    assert generated.shape[0] == 1

    tuned.save_pretrained(str(tmp_path / "saved_by_peft"))
    np.testing.assert_array_equal(load_prompt(tmp_path / "saved_by_peft")[0].rows, prompt)
