"""Hugging Face folders: the same numbers as transformers', or one message that says what is wrong.

The stored outputs are transformers' own (golden/make_hf_outputs.py). Where torch and transformers
are installed, other sizes are compared alive.
"""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from prompt_tuning.checkpoints import huggingface, load, names
from prompt_tuning.config import ConfigError, ModelConfig
from prompt_tuning.decoding import beam, sample
from prompt_tuning.model import sharding, t5

GOLDEN = Path(__file__).parent / "golden" / "hf"
FAMILIES = ("t5_1_0", "t5_1_1", "flan_t5", "mt5", "byt5")
BEAMS = 3


def compute(model, params, inputs, targets, length):
    """Logits, greedy outputs, and the best beams with their scores."""
    tokens = jnp.asarray(inputs)
    valid = tokens > 0
    encoded = t5.apply(
        t5.T5(model), params, "encode", t5.apply(t5.T5(model), params, "embed", tokens), valid
    )
    logits = t5.apply(t5.T5(model), params, "decode", jnp.asarray(targets), encoded, valid)
    cache = t5.apply(t5.T5(model), params, "init_cache", encoded, valid, length)

    def step(last, cache, index):
        return t5.apply(t5.T5(model), params, "decode_step", last, cache, index)

    greedy, _ = sample.greedy(step, cache, len(tokens), length=length)
    beams, scores = beam.beam_search(
        step, cache, len(tokens), beams=BEAMS, length=length, rules=beam.transformers_rules()
    )
    return logits, greedy, beams[:, -1], scores[:, -1]


compute = jax.jit(compute, static_argnums=(0, 4))


def assert_same(found, expected):
    logits, greedy, beams, scores = found
    scale = np.abs(expected["logits"]).max()
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-5 * scale, rtol=0)
    np.testing.assert_array_equal(greedy, expected["greedy"])
    np.testing.assert_array_equal(beams, expected["beams"])
    np.testing.assert_allclose(scores, expected["beam_scores"], rtol=1e-5)


@pytest.fixture
def folder(tmp_path):
    """A copy of a stored model, to be damaged."""

    def copy(family: str = "t5_1_1") -> Path:
        return Path(shutil.copytree(GOLDEN / family, tmp_path / family))

    return copy


def edit_config(path: Path, **changes) -> None:
    raw = json.loads((path / "config.json").read_text())
    raw = {k: v for k, v in {**raw, **changes}.items() if v != "absent"}
    (path / "config.json").write_text(json.dumps(raw))


def edit_tensors(path: Path, change) -> None:
    file = path / "model.safetensors"
    tensors = dict(load_file(file))
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def refusal(path, model: ModelConfig | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        huggingface.open_folder(path, model)
    return str(error.value)


# The same numbers


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_what_transformers_does(family):
    model = huggingface.open_folder(GOLDEN / family).model
    params, step = load.read_backbone(GOLDEN / family, model)
    assert step == load.read_step(GOLDEN / family) == 0
    expected = dict(np.load(GOLDEN / f"{family}.npz"))
    lengths = {int((row > 0).sum()) for row in expected["greedy"]}
    assert len(lengths) > 1  # some outputs end, and not all at once
    inputs, targets = expected["inputs"], expected["targets"]
    assert_same(compute(model, params, inputs, targets, targets.shape[1]), expected)


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("t5_1_0", {"d_model": 20, "d_kv": 7, "num_heads": 3, "vocab_size": 131}),
        (
            "mt5",
            {"relative_attention_num_buckets": 12, "relative_attention_max_distance": 9},
        ),
    ],
)
def test_transformers_alive(family, sizes, tmp_path):
    pytest.importorskip("torch", reason="torch is not installed: nothing to compare with")
    pytest.importorskip("transformers", reason="transformers is not installed")
    import huggingface_models as theirs

    made = theirs.make_model(family, seed=3, **sizes)
    inputs, targets = theirs.make_tokens(
        np.random.default_rng(3), vocabulary=made.shared.num_embeddings
    )
    expected = theirs.run(made, inputs, targets)
    made.save_pretrained(tmp_path / "model")
    model = huggingface.open_folder(tmp_path / "model").model
    params, _ = load.read_backbone(tmp_path / "model", model)
    found = compute(model, params, inputs, targets, targets.shape[1])
    assert_same(found, expected)


# Other forms of the same model


def params_of(path):
    model = huggingface.open_folder(path).model
    return load.read_backbone(path, model)[0]


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(np.asarray(one[name]), np.asarray(other[name]), err_msg=name)


def test_copies_and_unused_tensors_change_nothing(folder):
    path = folder("t5_1_0")
    expected = params_of(path)

    def add(tensors):
        for name in (names.LM_HEAD, *names.COPIES_OF_SHARED):
            tensors[name] = tensors[names.SHARED].copy()
        tensors[names.UNUSED] = np.ones((32, 2), np.float32)

    edit_tensors(path, add)
    assert_equal(params_of(path), expected)
    edit_tensors(path, lambda tensors: tensors.pop(names.SHARED))
    assert_equal(params_of(path), expected)


def test_a_copy_that_differs_is_refused(folder):
    path = folder("t5_1_0")
    edit_tensors(path, lambda t: t.update({names.LM_HEAD: t[names.SHARED] + 1}))
    assert "lm_head.weight differs from shared.weight" in refusal(path)
    path = folder("t5_1_1")
    copy = names.COPIES_OF_SHARED[1]
    edit_tensors(path, lambda t: t.update({copy: t[names.SHARED] + 1}))
    assert f"{copy} differs from shared.weight" in refusal(path)


def test_a_config_of_before_transformers_5_says_untied_in_another_way(folder):
    path = folder("t5_1_1")
    expected = params_of(path)
    edit_config(path, tie_word_embeddings=False, scale_decoder_outputs="absent")
    assert_equal(params_of(path), expected)
    edit_config(
        path, tie_word_embeddings="absent"
    )  # tied by default, and the tensors say otherwise
    assert "set tie_word_embeddings to false" in refusal(path)
    edit_config(path, tie_word_embeddings=False)
    edit_tensors(path, lambda tensors: tensors.pop(names.LM_HEAD))
    assert "there is no lm_head.weight" in refusal(path)


def test_a_tied_model_without_scaling_has_its_table_as_output(folder):
    path = folder("mt5")
    edit_tensors(path, lambda tensors: tensors.pop(names.LM_HEAD))
    edit_config(path, tie_word_embeddings=True)
    params = params_of(path)
    np.testing.assert_array_equal(params[names.HEAD], params[names.EMBEDDING].T)


@pytest.mark.parametrize("shape", [(8, 1), (4, 2), (1, 8)])
def test_devices_get_their_shares(shape):
    model = huggingface.open_folder(GOLDEN / "flan_t5").model
    whole, _ = load.read_backbone(GOLDEN / "flan_t5", model)
    mesh = sharding.make_mesh(shape[1])
    shardings = sharding.param_shardings(t5.param_shapes(model), mesh)
    split, _ = load.read_backbone(GOLDEN / "flan_t5", model, dtype="bfloat16", mesh=mesh)
    for name, param in split.items():
        assert param.sharding == shardings[name]
        np.testing.assert_array_equal(np.asarray(param, np.float32), whole[name])


# What is refused


def test_every_field_that_differs_is_named():
    model = huggingface.open_folder(GOLDEN / "t5_1_0").model
    other = dataclasses.replace(
        model, num_heads=4, num_embeddings=64, mlp_activations=("gelu", "linear")
    )
    message = refusal(GOLDEN / "t5_1_0", other)
    assert "NUM_HEADS: found 2, expected 4" in message
    assert "NUM_EMBEDDINGS: found 61, expected 64" in message
    assert "MLP_ACTIVATIONS: found ('relu',), expected ('gelu', 'linear')" in message
    assert "EMBED_DIM" not in message
    # What is the run's own is not compared.
    huggingface.open_folder(GOLDEN / "t5_1_0", dataclasses.replace(model, dropout_rate=0.3))


def test_every_tensor_that_is_wrong_is_listed(folder):
    path = folder()
    first = "encoder.block.0.layer.0.SelfAttention.q.weight"

    def damage(tensors):
        del tensors["decoder.final_layer_norm.weight"]
        tensors["qa_outputs.weight"] = np.ones(3, np.float32)
        tensors[first] = tensors[first][:, 1:]
        tensors["shared.weight"] = tensors["shared.weight"].astype(np.int32)

    edit_tensors(path, damage)
    message = refusal(path)
    assert "missing in the checkpoint (1): decoder.final_layer_norm.weight" in message
    assert "unknown to the model (1): qa_outputs.weight" in message
    assert f"{first} has shape (10, 11), the model needs (10, 12)" in message
    assert "not floating point (1): shared.weight is I32" in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "umt5"}, "model_type = 'umt5'"),
        ({"model_type": "absent"}, "model_type = None"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder is false"),
        ({"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon = 1e-05, expected 1e-06"),
        ({"feed_forward_proj": "gelu"}, "feed_forward_proj = 'gelu', expected one of"),
        ({"decoder_start_token_id": 7}, "decoder_start_token_id = 7, expected 0"),
        ({"vocab_size": 10**12}, "vocab_size = 1000000000000, expected"),
        ({"num_heads": "2"}, "num_heads = '2', expected a positive integer"),
        ({"num_layers": 10**9}, "encoder has 1000000000 layers"),
        (
            {"vocab_size": 10**9},
            "shared.weight has shape (61, 12), the model needs (1000000000",
        ),
        ({"t5x_step": -1}, "t5x_step = -1"),
    ],
)
def test_a_config_of_something_else_is_refused(folder, changes, expected):
    path = folder()
    edit_config(path, **changes)
    assert expected in refusal(path)


def test_damaged_and_absent_files_are_named(folder):
    path = folder("flan_t5")
    second = path / "model-00002-of-00002.safetensors"
    whole = second.read_bytes()
    for damaged in (whole[:-1], whole[:100], whole[:4], b"", b"x" * 200, whole + b"0"):
        second.write_bytes(damaged)
        message = refusal(path)
        assert f"{second} cannot be read as safetensors" in message
        assert "copy it again" in message
    second.unlink()
    assert f"not in the folder: {second.name}" in refusal(path)
    (path / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    assert "cannot be read as the index" in refusal(path)
    (path / "config.json").write_text('{"model_type":')
    assert "config.json cannot be read" in refusal(path)
    (path / "config.json").write_text("[" * 100_000)
    assert "config.json cannot be read" in refusal(path)
    (path / "config.json").unlink()
    assert "has no config.json" in refusal(path)


def test_one_file_of_a_model_is_not_the_model(folder):
    file = folder() / "model.safetensors"
    assert huggingface.is_huggingface(file)
    assert f"Give its folder, {file.parent}" in refusal(file)


def test_weights_in_pickles_only_say_what_to_do(folder):
    path = folder()
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    assert huggingface.is_huggingface(path)
    message = refusal(path)
    assert "pytorch_model.bin" in message
    assert "save_pretrained" in message
    (path / "pytorch_model.bin").unlink()
    assert "has no weights" in refusal(path)


def test_addresses_need_huggingface_hub(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="hf://organisation/name"):
        huggingface.local_folder("hf://t5-small")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match="huggingface_hub"):
        huggingface.local_folder("hf://google-t5/t5-small@main")
    assert huggingface.is_huggingface("hf://google-t5/t5-small")
    assert not huggingface.is_huggingface("gs://bucket/checkpoint_1")
    assert not huggingface.is_huggingface(tmp_path)
