"""`t5x convert`: there and back to the bit, loadable on either side, whole or not at all."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from prompt_tuning import cli
from prompt_tuning.checkpoints import conversion, huggingface, load, names, t5x
from prompt_tuning.checkpoints.conversion import convert
from prompt_tuning.config import ConfigError, ModelConfig
from prompt_tuning.model import t5

GOLDEN = Path(__file__).parent / "golden" / "hf"
FAMILIES = ("t5_1_0", "t5_1_1", "flan_t5", "mt5", "byt5")


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name in one:
        first, second = np.asarray(one[name]), np.asarray(other[name])
        assert (first.dtype, first.shape) == (second.dtype, second.shape), name
        assert first.tobytes() == second.tobytes(), name


def write_random(path: Path, model: ModelConfig, dtype: str = "float32") -> Path:
    params = t5.init_params(model, jax.random.key(0))
    t5x.write_t5x(path, params, step=12, dtype=dtype)
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_huggingface_to_t5x_and_back(family, tmp_path):
    there = convert(str(GOLDEN / family), str(tmp_path / "t5x"), step=7)
    model = huggingface.open_folder(GOLDEN / family).model
    assert (there.model, there.step) == (model, 7)
    expected, _ = load.read_backbone(GOLDEN / family, model)
    found, step = load.read_backbone(tmp_path / "t5x", model)
    assert step == 7
    assert_same_bits(found, expected)
    back = convert(str(tmp_path / "t5x"), str(tmp_path / "back"), max_file_bytes=8000)
    assert back.step == load.read_step(tmp_path / "back") == 7
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 1
    assert_same_bits(tensors_of(tmp_path / "back"), tensors_of(GOLDEN / family))
    assert huggingface.open_folder(tmp_path / "back").model == model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_t5x_to_huggingface_and_back(tied, dtype, tmp_path):
    model = ModelConfig(
        num_encoder_layers=1,
        num_decoder_layers=3,
        num_heads=3,
        head_dim=5,
        embed_dim=8,
        mlp_dim=11,
        num_embeddings=37,
        relative_attention_num_buckets=10,
        mlp_activations=("relu",) if tied else ("gelu", "linear"),
        logits_via_embedding=tied,
    )
    source = write_random(tmp_path / "source", model, dtype)
    convert(str(source), str(tmp_path / "hf"))
    again = convert(str(tmp_path / "hf"), str(tmp_path / "t5x"))
    assert (again.model, again.step, again.dtypes) == (model, 12, (dtype,))
    shapes = t5.param_shapes(model)
    expected, _ = t5x.read_t5x(source, shapes, dtype=dtype)
    found, step = t5x.read_t5x(tmp_path / "t5x", shapes, dtype=dtype)
    assert step == 12
    assert_same_bits(found, expected)


def test_arrays_of_several_chunks_and_pieces(tmp_path, monkeypatch):
    model = ModelConfig(
        num_encoder_layers=1,
        num_decoder_layers=1,
        num_heads=2,
        head_dim=3,
        embed_dim=24,
        mlp_dim=50,
        num_embeddings=301,
    )
    monkeypatch.setattr(t5x, "CHUNK_BYTES", 900)
    monkeypatch.setattr(conversion, "PIECE_BYTES", 700)
    source = write_random(tmp_path / "source", model)
    assert (source / "target.token_embedder.embedding" / "3.1").exists()  # 19 rows of 12 a chunk
    convert(str(source), str(tmp_path / "hf"))
    convert(str(tmp_path / "hf"), str(tmp_path / "t5x"))
    shapes = t5.param_shapes(model)
    assert_same_bits(t5x.read_t5x(tmp_path / "t5x", shapes)[0], t5x.read_t5x(source, shapes)[0])


def test_what_lies_beside_the_weights_goes_along(tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "mt5", tmp_path / "hf"))
    (folder / "spiece.model").write_bytes(b"pieces")
    (folder / "tokenizer_config.json").write_text("{}")
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"relative_attention_max_distance": 77, "task_specific_params": {"a": 1}}
    (folder / "config.json").write_text(json.dumps(raw))
    convert(str(folder), str(tmp_path / "t5x"), dtype="bfloat16")
    convert(str(tmp_path / "t5x"), str(tmp_path / "back"))
    assert (tmp_path / "back" / "spiece.model").read_bytes() == b"pieces"
    assert (tmp_path / "back" / "tokenizer_config.json").exists()
    there = json.loads((tmp_path / "back" / "config.json").read_text())
    assert there.pop("t5x_step") == 0
    assert there == {**raw, "tie_word_embeddings": False, "dtype": "bfloat16"}
    generation = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert generation == {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}


def test_a_dtype_is_rounded_to_and_float16_may_be_too_small(tmp_path):
    folder = GOLDEN / "t5_1_1"
    convert(str(folder), str(tmp_path / "half"), dtype="bfloat16")
    model = huggingface.open_folder(folder).model
    found, _ = t5x.read_t5x(tmp_path / "half", t5.param_shapes(model), dtype="bfloat16")
    (name,) = (n for n in found if n.endswith("logits_dense/kernel"))
    expected = tensors_of(folder)[names.LM_HEAD].T.astype(ml_dtypes.bfloat16)
    assert np.asarray(found[name]).tobytes() == np.ascontiguousarray(expected).tobytes()
    params = dict(t5.init_params(model, jax.random.key(0)))
    params["encoder/encoder_norm/scale"] = params["encoder/encoder_norm/scale"].at[3].set(7e4)
    t5x.write_t5x(tmp_path / "large", params, step=1)
    with pytest.raises(ConfigError, match="too large"):
        convert(str(tmp_path / "large"), str(tmp_path / "out"), dtype="float16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["half", "large"]  # nothing half written


def run(capsys, *flags: str) -> tuple[int, str]:
    code = cli.main(["convert", *flags])
    said = capsys.readouterr()
    return code, said.out + said.err


def test_the_command(tmp_path, capsys):
    flags = f"--input={GOLDEN / 't5_1_0'}", f"--output={tmp_path / 'checkpoint_3'}"
    code, said = run(capsys, *flags, "--step=3")
    assert code == 0
    assert f"{tmp_path / 'checkpoint_3'}: a T5X checkpoint, 47 arrays, float32" in said
    assert "step 3" in said
    assert "converting" in said  # the progress
    code, said = run(capsys, *flags)
    assert code == 2
    assert "--output" in said


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--step=-1"], "--step must be between 0 and 2147483647"),
        (["--step=2147483648"], "found 2147483648"),
        (["--max_shard_size=5"], "--max_shard_size must be like 5GB"),
        (["--dtype=int8"], "invalid choice"),
        (["--output=gs://bucket/x"], "--output must be a local folder"),
        (["--input=/nowhere/at/all"], "there is no T5X checkpoint at /nowhere/at/all"),
    ],
)
def test_mistakes_are_one_message(flags, expected, tmp_path, capsys):
    base = [f"--input={GOLDEN / 't5_1_0'}", f"--output={tmp_path / 'out'}"]
    code, said = run(capsys, *base, *flags)
    assert code == 2
    assert expected in said
    assert list(tmp_path.iterdir()) == []


def test_damaged_t5x_checkpoints_are_refused(tmp_path):
    model = huggingface.open_folder(GOLDEN / "t5_1_1").model
    source = write_random(tmp_path / "source", model)
    output = tmp_path / "out"
    chunk = source / "target.decoder.logits_dense.kernel" / "0.0"
    whole = chunk.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", None):
        chunk.unlink() if damage is None else chunk.write_bytes(damage)
        with pytest.raises(ConfigError, match="logits_dense"):
            convert(str(source), str(output))
    chunk.write_bytes(whole)
    shutil.rmtree(source / "target.decoder.layers_0.self_attention.out.kernel")
    with pytest.raises(ConfigError, match="self_attention/out/kernel"):
        convert(str(source), str(output))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_a_t5x_tree_that_is_no_t5_is_listed(tmp_path):
    model = huggingface.open_folder(GOLDEN / "t5_1_1").model
    params = dict(t5.init_params(model, jax.random.key(0)))
    del params["decoder/layers_0/mlp/wo/kernel"]
    params["encoder/adapter/scale"] = params["encoder/encoder_norm/scale"]
    params["encoder/layers_1/mlp/wi_0/kernel"] = params["encoder/layers_1/mlp/wi_0/kernel"][1:]
    t5x.write_t5x(tmp_path / "source", params, step=1)
    with pytest.raises(ConfigError) as error:
        convert(str(tmp_path / "source"), str(tmp_path / "out"))
    assert "decoder/layers_0/mlp/wo/kernel" in str(error.value)
    assert "encoder/adapter/scale" in str(error.value)
    assert "encoder/layers_1/mlp/wi_0/kernel has shape (11, 14)" in str(error.value)


def test_transformers_loads_what_was_written(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers import AutoModelForSeq2SeqLM

    for tied in (True, False):
        model = huggingface.open_folder(GOLDEN / ("t5_1_0" if tied else "t5_1_1")).model
        model = dataclasses.replace(model, relative_attention_max_distance=128)
        source = write_random(tmp_path / f"source_{tied}", model, "bfloat16")
        convert(str(source), str(tmp_path / f"hf_{tied}"))
        loaded, told = AutoModelForSeq2SeqLM.from_pretrained(
            tmp_path / f"hf_{tied}", output_loading_info=True
        )
        assert not any(told.values())
        assert loaded.dtype == torch.bfloat16
        assert loaded.config.scale_decoder_outputs is tied
        expected = tensors_of(tmp_path / f"hf_{tied}")
        for name, tensor in loaded.state_dict().items():
            kept = names.SHARED if "embed_tokens" in name or (tied and "lm_head" in name) else name
            bits = tensor.view(torch.int16).numpy().tobytes()
            assert bits == expected[kept].tobytes(), name
