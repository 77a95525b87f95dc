"""Converts Hugging Face folders to T5X checkpoints and back, bit for bit.

It needs the memory of some chunks of one array. `commands/conversions.py` calls it.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
import tqdm

from prompt_tuning.checkpoints import architecture, huggingface, layouts, names, t5x
from prompt_tuning.checkpoints import safetensors_files as files
from prompt_tuning.checkpoints.load import find_path
from prompt_tuning.checkpoints.t5x_prompt import is_prompt_leaf
from prompt_tuning.config import ConfigError, ModelConfig
from prompt_tuning.model import t5
from prompt_tuning.runtime.replace_folder import local_folder, replace_folder, writing
from prompt_tuning.runtime.storage import explain

# Files that are copied in both directions, so that a conversion back has them.
OTHER_FILES = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "spiece.model"),
    *("special_tokens_map.json", "added_tokens.json"),
)
GENERATION = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
PIECE_BYTES = 2**25
Advance = Callable[[int], Any]


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A description of the checkpoint that was written."""

    output: Path
    format: str
    model: ModelConfig
    dtypes: tuple[str, ...]
    num_arrays: int
    num_bytes: int
    step: int
    left_out: str = ""  # the checkpoint, if it has a prompt, which is not converted

    def __str__(self) -> str:
        kinds = " and ".join(self.dtypes)
        summary = (
            f"{self.output}: {self.format}, {self.num_arrays} arrays, {kinds}, "
            f"{self.num_bytes:,} bytes, step {self.step}"
        )
        if not self.left_out:
            return summary
        return (
            f"{summary}\nleft out: its prompt; convert it with t5x convert-prompt "
            f"--input={self.left_out} --format=peft --output=..."
        )


def convert(
    source: str,
    output: str,
    *,
    dtype: str | None = None,
    step: int | None = None,
    max_file_bytes: int = 5 * 10**9,
) -> Conversion:
    """A description of the checkpoint in the other format, which is written atomically.

    Every array keeps its dtype unless `dtype` is given. The step is `step`, else that of the T5X
    checkpoint, or 0 for a Hugging Face folder.

    Raises:
      ConfigError: the source is damaged or no T5, the output exists, or a value is too large for
        `dtype`.
    """
    path = find_path(source)
    place = local_folder(output, "--output")
    if place.exists():
        raise ConfigError(f"--output {place} exists already. Choose another, or remove it.")
    wanted = None if dtype is None else np.dtype(dtype)
    with writing(f"--output {place}"):
        if huggingface.is_huggingface(path):
            return _to_t5x(path, place, wanted, step)
        return _to_huggingface(path, place, wanted, (step, max_file_bytes))


def _cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        cast = array.astype(dtype)
    if dtype == np.float16 and (np.isinf(cast) & np.isfinite(array)).any():
        raise ConfigError(
            f"{name} has values that are too large for float16 (65504). Choose bfloat16 or float32."
        )
    return cast


def _progress(total: int) -> tqdm.tqdm:
    return tqdm.tqdm(total=total, unit="B", unit_scale=True, desc="converting")


# Hugging Face -> T5X ----------------------------------------------------------------------------


def _to_t5x(path: str, place: Path, dtype: np.dtype | None, step: int | None) -> Conversion:
    folder = huggingface.open_folder(path)
    step = folder.step if step is None else step
    kinds = {name: dtype or source.dtype for name, source in folder.sources.items()}
    sizes = {n: int(np.prod(s.shape)) * kinds[n].itemsize for n, s in folder.sources.items()}
    with replace_folder(place) as new, _progress(sum(sizes.values())) as bar:
        writer = t5x.Writer(new)
        for name, source in sorted(folder.sources.items()):

            def read(
                index: files.Index, name: str = name, source: huggingface.Source = source
            ) -> np.ndarray:
                piece = np.ascontiguousarray(_cast(source.read(index), kinds[name], name))
                bar.update(piece.nbytes)
                return piece

            writer.add(name, source.shape, kinds[name], read)
        writer.close(step)
        raw = architecture.read_json(folder.path)
        _write_json(new / architecture.CONFIG, _with_dtype(raw, dtype and [dtype]))
        _copy_other_files(folder.path, new)
    return Conversion(
        output=place,
        format="a T5X checkpoint",
        model=folder.model,
        dtypes=tuple(sorted({kind.name for kind in kinds.values()})),
        num_arrays=len(kinds),
        num_bytes=sum(sizes.values()),
        step=step,
    )


# T5X -> Hugging Face ----------------------------------------------------------------------------


def _to_huggingface(
    path: str, place: Path, dtype: np.dtype | None, choices: tuple[int | None, int]
) -> Conversion:
    checkpoint = layouts.find_checkpoint(path)
    params = {n: leaf for n, leaf in checkpoint.params.items() if not is_prompt_leaf(n)}
    stores = layouts.open_leaves(params, ts.Context())
    folder = Path(path).expanduser()
    source_folder = folder if folder.is_dir() else None
    raw, model = _describe(checkpoint.folder.url, source_folder, stores)
    step = t5x.read_step(path) if choices[0] is None else choices[0]
    wanted = {name: names.to_huggingface(name) for name in t5.param_shapes(model)}
    plan = files.plan_files(
        (
            files.PlannedTensor(
                tensor.name,
                tensor.shape(tuple(stores[name].shape)),
                dtype or stores[name].dtype.numpy_dtype,
            )
            for name, tensor in wanted.items()
        ),
        choices[1],
    )
    planned = [tensor for group in plan.values() for tensor in group]
    t5x_names = {tensor.name: name for name, tensor in wanted.items()}
    kinds = sorted({tensor.dtype for tensor in planned}, key=str)
    total = sum(tensor.nbytes for tensor in planned)
    with replace_folder(place) as new, _progress(total) as bar:
        for file, tensors in plan.items():
            pieces = (
                piece
                for tensor in tensors
                for piece in _read_pieces(
                    stores[t5x_names[tensor.name]],
                    checkpoint.params[t5x_names[tensor.name]],
                    tensor,
                )
            )
            files.write_file(new / file, tensors, _counted(pieces, bar.update))
        files.write_index(new, plan)
        raw = raw or architecture.make_json(model, None, step)
        _write_json(new / architecture.CONFIG, _with_dtype(_as_tied(raw, model, step), kinds))
        if source_folder is not None:
            _copy_other_files(source_folder, new)
        if not (new / "generation_config.json").exists():
            _write_json(new / "generation_config.json", GENERATION)
    return Conversion(
        output=place,
        format="a Hugging Face folder",
        model=model,
        dtypes=tuple(kind.name for kind in kinds),
        num_arrays=len(planned),
        num_bytes=total,
        step=step,
        left_out=path if len(params) < len(checkpoint.params) else "",
    )


def _describe(
    where: str, source_folder: Path | None, stores: Mapping[str, ts.TensorStore]
) -> tuple[dict[str, Any] | None, ModelConfig]:
    """The config.json in a T5X checkpoint, if any, and the model, checked against all arrays."""
    has_config = source_folder is not None and (source_folder / architecture.CONFIG).is_file()
    raw = (
        architecture.read_json(source_folder) if source_folder is not None and has_config else None
    )
    shapes = {name: tuple(store.shape) for name, store in stores.items()}
    model = architecture.infer_model(shapes, raw, where)
    t5x.check_tree(
        where,
        {name: (shape, stores[name].dtype.numpy_dtype) for name, shape in shapes.items()},
        {name: tuple(shape.shape) for name, shape in t5.param_shapes(model).items()},
    )
    return raw, model


def _read_pieces(
    store: ts.TensorStore, leaf: layouts.Leaf, tensor: files.PlannedTensor
) -> Iterator[np.ndarray]:
    """Blocks of rows of a Hugging Face tensor, from T5X's array; each chunk is decoded once."""
    transposed = names.is_transposed(tensor.name)
    axis = store.rank - 1 if transposed else 0
    chunk = (store.chunk_layout.read_chunk.shape or store.shape)[axis] or store.shape[axis]
    row = int(np.prod(tensor.shape[1:])) * tensor.dtype.itemsize
    rows = chunk * max(1, PIECE_BYTES // max(1, chunk * row))
    for start in range(0, tensor.shape[0], rows):
        part = slice(start, min(start + rows, tensor.shape[0]))
        view = store[:, part] if transposed else store[part]
        piece = explain(lambda view=view: np.asarray(view.read().result()), leaf.folder, leaf.what)
        whole = _cast(piece.T if transposed else piece, tensor.dtype, tensor.name)
        for index in files.row_blocks(whole.shape, whole.dtype.itemsize, PIECE_BYTES):
            yield whole[index]


def _counted(pieces: Iterator[np.ndarray], advance: Advance) -> Iterator[np.ndarray]:
    for piece in pieces:
        yield piece
        advance(piece.nbytes)


# Other files ------------------------------------------------------------------------------------


def _as_tied(raw: Mapping[str, Any], model: ModelConfig, step: int) -> dict[str, Any]:
    """The config.json of the written tensors, which are both tied and scaled, or neither."""
    tied = model.logits_via_embedding
    changed = {**raw, "tie_word_embeddings": tied, architecture.STEP: step}
    if "scale_decoder_outputs" in raw:
        changed["scale_decoder_outputs"] = tied
    if tied:
        changed["model_type"] = "t5"  # an mT5 does not scale
    return changed


def _with_dtype(raw: Mapping[str, Any], dtypes: list[np.dtype] | None) -> dict[str, Any]:
    """The config.json with the dtype that transformers loads; without it if there are several."""
    if not dtypes:
        return dict(raw)
    key = "torch_dtype" if "torch_dtype" in raw or "dtype" not in raw else "dtype"
    others = {k: v for k, v in raw.items() if k != key}
    return {**others, key: dtypes[0].name} if len(dtypes) == 1 else others


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy_other_files(old: Path, new: Path) -> None:
    for name in OTHER_FILES:
        if (old / name).is_file():
            shutil.copyfile(old / name, new / name)
