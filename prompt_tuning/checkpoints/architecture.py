"""The architecture of a checkpoint as a `ModelConfig`: from Hugging Face's config.json, and back.

`huggingface.py` checks it against the tensors; `load.py` infers it from T5X's parameters.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prompt_tuning.config import Activation, ConfigError, ModelConfig
from prompt_tuning.runtime.storage import describe_lfs_pointer

CONFIG = "config.json"
_ADAPTER = "adapter_config.json"  # of Hugging Face PEFT
STEP = "t5x_step"  # a key of this project in config.json: the step of a converted T5X checkpoint
# config.json's feed_forward_proj <-> T5X's mlp_activations. gated-gelu is the tanh approximation.
ACTIVATIONS: Mapping[str, tuple[Activation, ...]] = {
    "relu": ("relu",),
    "gated-gelu": ("gelu", "linear"),
    "gated-silu": ("silu", "linear"),
    "gated-relu": ("relu", "linear"),
    "gelu_new": ("gelu",),
    "silu": ("silu",),
}
# ModelConfig's field -> config.json's key.
SIZES: Mapping[str, str] = {
    "num_encoder_layers": "num_layers",
    "num_decoder_layers": "num_decoder_layers",
    "num_heads": "num_heads",
    "head_dim": "d_kv",
    "embed_dim": "d_model",
    "mlp_dim": "d_ff",
    "num_embeddings": "vocab_size",
    "relative_attention_num_buckets": "relative_attention_num_buckets",
    "relative_attention_max_distance": "relative_attention_max_distance",
}
FORM = ("mlp_activations", "logits_via_embedding")  # fields that differ between families
# transformers' defaults of keys that older files do not have.
_DEFAULTS = {
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
_FIXED = {"layer_norm_epsilon": 1e-6, "pad_token_id": 0, "eos_token_id": 1}
_FIXED |= {"decoder_start_token_id": 0}


def read_json(folder: Path) -> dict[str, Any]:
    """The contents of config.json.

    Raises:
      ConfigError: it is missing or malformed.
    """
    path = folder / CONFIG
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(
            describe_adapter(folder)
            or f"{folder} has no {CONFIG}, which describes the model. Copy it from the model's "
            "page."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            describe_lfs_pointer(path) or f"{path} cannot be read ({error}). Copy it again."
        ) from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(raw).__name__}.")
    return raw


def describe_adapter(folder: Path) -> str:
    """A message on a folder of Hugging Face PEFT's, which is no model; "" for other folders."""
    if not (folder / _ADAPTER).is_file():
        return ""
    try:
        config = json.loads((folder / _ADAPTER).read_bytes())
        method, base = str(config["peft_type"]), config.get("base_model_name_or_path")
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        method, base = "unknown", None
    model = f"its base model ({base})" if base else "the model that it was trained for"
    cure = (
        f"Give {model} as the checkpoint and this folder as PROMPT_FILE."
        if method == "PROMPT_TUNING"
        else f"Give {model}, or merge the adapter into it (PEFT's merge_and_unload), save the "
        "result with save_pretrained and give that folder."
    )
    return (
        f"{folder} is an adapter of Hugging Face PEFT (peft_type {method}), not a model: expected "
        f"the folder of a whole T5. {cure}"
    )


def is_scaled(raw: Mapping[str, Any]) -> bool:
    """Whether the logits use the embedding table, scaled by d_model^-0.5, as in T5 1.0.

    An mT5 never scales. A T5 does if `scale_decoder_outputs` is true or, in files of transformers
    before version 5, which lack that key, if `tie_word_embeddings` is not false.
    """
    if raw.get("model_type") == "mt5":
        return False
    return bool(raw.get("scale_decoder_outputs", raw.get("tie_word_embeddings") is not False))


def parse_config(raw: Mapping[str, Any], where: str) -> ModelConfig:
    """The architecture that a config.json describes.

    Raises:
      ConfigError: it is no T5, or has a property that T5X's T5 does not have.
    """
    kind = raw.get("model_type")
    if kind not in ("t5", "mt5"):
        raise ConfigError(
            f"{where}: model_type = {kind!r}. Expected 't5' (T5, Flan-T5 and ByT5) or 'mt5' (mT5)."
        )
    if not raw.get("is_encoder_decoder", True):
        raise ConfigError(
            f"{where}: is_encoder_decoder is false; encoder-only T5 models are not supported."
        )
    known = {**_DEFAULTS, **{k: v for k, v in raw.items() if v is not None}}
    known.setdefault("num_decoder_layers", known.get("num_layers"))
    wrong = [
        f"{key} = {known[key]!r}, expected {value}"
        for key, value in _FIXED.items()
        if known[key] not in (value, [value])
    ]
    sizes = {field: known.get(key) for field, key in SIZES.items()}
    wrong += [
        f"{SIZES[field]} = {size!r}, expected a positive integer (32 bits)"
        for field, size in sizes.items()
        if type(size) is not int or not 0 < size < 2**31
    ]
    activation = str(known.get("feed_forward_proj", "relu" if kind == "t5" else "gated-gelu"))
    if activation not in ACTIVATIONS:
        wrong.append(
            f"feed_forward_proj = {activation!r}, expected one of {', '.join(ACTIVATIONS)}"
        )
    if wrong:
        raise ConfigError(f"{where}: T5X has no such T5:\n  " + "\n  ".join(wrong))
    return ModelConfig(
        **sizes,  # type: ignore[arg-type]
        mlp_activations=ACTIVATIONS[activation],
        logits_via_embedding=is_scaled(raw),
    )


def infer_model(
    shapes: Mapping[str, tuple[int, ...]], raw: Mapping[str, Any] | None, where: str
) -> ModelConfig:
    """The architecture of a T5X checkpoint, from the shapes of its parameters.

    Shapes do not determine the activations and the maximal relative distance. They are taken from
    `raw`, a config.json in the same folder. Without it they are T5's: ReLU for one input matrix,
    gated GELU for two, and 128.

    Raises:
      ConfigError: these are not the parameters of a T5, or `raw` describes another model.
    """
    try:
        num_embeddings, embed_dim = shapes["token_embedder/embedding"]
        num_heads, num_buckets = shapes["encoder/relpos_bias/rel_embedding"]
        joined = shapes["encoder/layers_0/attention/query/kernel"][1]
        mlp_dim = shapes["encoder/layers_0/mlp/wo/kernel"][0]
    except (KeyError, ValueError, IndexError) as error:
        reason = f"no {error.args[0]}" if isinstance(error, KeyError) else "wrong shapes"
        raise ConfigError(
            f"{where} does not contain the parameters of a T5 ({reason}). Copy the checkpoint "
            "again."
        ) from error
    from_file = None if raw is None else parse_config(raw, f"{where}/{CONFIG}")
    gated = "encoder/layers_0/mlp/wi_0/kernel" in shapes
    model = ModelConfig(
        num_encoder_layers=_count_layers(shapes, "encoder"),
        num_decoder_layers=_count_layers(shapes, "decoder"),
        num_heads=num_heads,
        head_dim=max(1, joined // num_heads),
        embed_dim=embed_dim,
        mlp_dim=mlp_dim,
        num_embeddings=num_embeddings,
        mlp_activations=("gelu", "linear") if gated else ("relu",),
        logits_via_embedding="decoder/logits_dense/kernel" not in shapes,
        relative_attention_num_buckets=num_buckets,
    )
    if from_file is None:
        return model
    fields = ("mlp_activations", "relative_attention_max_distance")
    model = dataclasses.replace(model, **{name: getattr(from_file, name) for name in fields})
    tied = model.logits_via_embedding  # an unscaled tied table is stored as a separate matrix
    check_sizes(
        dataclasses.replace(from_file, logits_via_embedding=tied), model, f"{where}/{CONFIG}"
    )
    return model


def _count_layers(shapes: Mapping[str, tuple[int, ...]], stack: str) -> int:
    matches = (re.match(rf"{stack}/layers_(\d+)/", name) for name in shapes)
    return max((int(match.group(1)) + 1 for match in matches if match), default=0)


def make_json(model: ModelConfig, dtype: str | None, step: int) -> dict[str, Any]:
    """The contents of config.json for a model of T5X.

    Raises:
      ConfigError: transformers does not have its activations.
    """
    names_of = {activations: name for name, activations in ACTIVATIONS.items()}
    if model.mlp_activations not in names_of:
        raise ConfigError(
            f"transformers' T5 has no MLP with the activations {model.mlp_activations}; it has "
            f"{', '.join(map(str, names_of))}."
        )
    raw: dict[str, Any] = {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        **{key: getattr(model, field) for field, key in SIZES.items()},
        "feed_forward_proj": names_of[model.mlp_activations],
        "dropout_rate": model.dropout_rate,
        "layer_norm_epsilon": 1e-6,
        "tie_word_embeddings": model.logits_via_embedding,
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
        STEP: step,
    }
    return raw if dtype is None else {**raw, "torch_dtype": dtype}


def read_saved_step(raw: Mapping[str, Any], where: str) -> int:
    """The step of the T5X checkpoint that a folder was converted from; 0 for any other folder.

    Raises:
      ConfigError: it is not a valid step.
    """
    step = raw.get(STEP, 0)
    if type(step) is not int or not 0 <= step < 2**31:
        raise ConfigError(f"{where}: {STEP} = {step!r}. Expected a step.")
    return step


def check_sizes(stored: ModelConfig, expected: ModelConfig, where: str) -> None:
    """Checks that a checkpoint has the architecture of the settings.

    Raises:
      ConfigError: with every field that differs.
    """
    of_run = ("dropout_rate", "dtype", "attention")  # settings of the run, not of the checkpoint
    wrong = [
        f"{field.name.upper()}: found {getattr(stored, field.name)!r}, "
        f"expected {getattr(expected, field.name)!r}"
        for field in dataclasses.fields(ModelConfig)
        if field.name not in of_run and getattr(stored, field.name) != getattr(expected, field.name)
    ]
    if wrong:
        raise ConfigError(
            f"{where} is of another model than the settings (expected):\n  "
            + "\n  ".join(wrong)
            + "\nChoose the gin file in models/ of this checkpoint, or models/from_checkpoint.gin, "
            "which takes the sizes from it."
        )
