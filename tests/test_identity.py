"""The identity of a backbone: a function of its values, and of nothing else."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from prompt_tuning.checkpoints.identity import backbone_identity
from prompt_tuning.checkpoints.t5x import read_t5x, write_t5x
from prompt_tuning.vocabularies.identity import vocabulary_identity
from prompt_tuning.vocabularies.tokenizer_json import ModelProto

SHAPES = {
    "token_embedder/embedding": (384, 32),
    "encoder/layers_0/mlp/wi_0/kernel": (32, 256),
    "encoder/encoder_norm/scale": (32,),
    "stacked/kernel": (2, 3, 128),
    "scalar": (),
}


@pytest.fixture
def params() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {k: rng.standard_normal(s).astype(np.float32) for k, s in SHAPES.items()}


def test_is_a_fixed_function_of_the_values() -> None:
    values = {"b/scale": np.arange(4, dtype=np.float32), "a/kernel": np.ones((2, 3), np.float32)}
    ones, counted = b"\x80\x3f", b"\x00\x00\x80\x3f\x00\x40\x40\x40"  # 1.0; 0.0 1.0 2.0 3.0
    # Each parameter: name and shape, the start of the first row, the end of the last.
    by_hand = b"a/kernel (2, 3)\n" + ones * 6 + b"b/scale (4,)\n" + counted * 2
    assert backbone_identity(values) == hashlib.sha256(by_hand).hexdigest()


def test_does_not_depend_on_dtype_place_or_order(params: dict[str, np.ndarray]) -> None:
    identity = backbone_identity(params)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    spread = {
        name: jax.device_put(
            value,
            NamedSharding(
                mesh, PartitionSpec("data", "model") if value.ndim == 2 else PartitionSpec()
            ),
        )
        for name, value in params.items()
    }
    assert backbone_identity(dict(reversed(params.items()))) == identity
    assert backbone_identity({k: jnp.asarray(v) for k, v in params.items()}) == identity
    assert backbone_identity({k: v.astype(jnp.bfloat16) for k, v in params.items()}) == identity
    assert backbone_identity({k: jnp.asarray(v, "bfloat16") for k, v in params.items()}) == identity
    assert backbone_identity(spread) == identity


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_does_not_depend_on_the_file(params: dict, tmp_path, dtype: str) -> None:
    write_t5x(tmp_path / "checkpoint_1", params, 1, dtype=dtype)
    shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in params.items()}
    for run_dtype in ("float32", "bfloat16"):
        read, _ = read_t5x(tmp_path / "checkpoint_1", shapes, dtype=run_dtype)
        assert backbone_identity(read) == backbone_identity(params)


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_every_parameter_counts(params: dict[str, np.ndarray], name: str) -> None:
    for place in (0, -1):
        changed = {k: v.copy() for k, v in params.items()}
        changed[name].reshape(-1)[place] += 1
        assert backbone_identity(changed) != backbone_identity(params)


def test_names_and_shapes_count(params: dict[str, np.ndarray]) -> None:
    renamed = {k.replace("encoder/layers_0", "encoder/layers_1"): v for k, v in params.items()}
    assert backbone_identity(renamed) != backbone_identity(params)
    name = "encoder/layers_0/mlp/wi_0/kernel"
    taller = params | {name: np.concatenate([params[name][:1], params[name]])}
    assert backbone_identity(taller) != backbone_identity(params)


def test_reads_little() -> None:
    class Counted:
        """An array that counts what is taken from it, as a lazily read file would."""

        def __init__(self) -> None:
            self.shape, self.ndim, self.taken = (10_000, 10_000), 2, 0

        def __getitem__(self, index: tuple[int, ...]) -> np.ndarray:
            self.taken += 10_000
            return np.zeros(10_000, np.float32)

    array = Counted()
    backbone_identity({"kernel": array})  # type: ignore[dict-item]
    assert array.taken == 20_000  # the first and the last row


def test_the_algorithm_of_a_vocabulary_counts_where_it_is_not_t5s() -> None:
    model = ModelProto()
    for number, piece in enumerate(("<pad>", "</s>", "<unk>", "\u2581a", "b", "\u2581ab")):
        kind = {0: 3, 1: 3, 2: 2}.get(number, 1)  # control, unknown, normal
        model.pieces.add(piece=piece, score=-float(number), type=kind)
    model.trainer_spec.pad_id, model.trainer_spec.eos_id, model.trainer_spec.unk_id = 0, 1, 2
    known = vocabulary_identity(model.SerializeToString())  # Unigram is protobuf's default
    assert known == "20c226d0f5e9d5c2dd4e98e76e7afe92b39548a28c8f8bc2ef4f9195fe30d9a7"
    model.trainer_spec.model_type = model.trainer_spec.UNIGRAM
    assert vocabulary_identity(model.SerializeToString()) == known
    model.trainer_spec.model_type = model.trainer_spec.BPE
    assert vocabulary_identity(model.SerializeToString()) != known
