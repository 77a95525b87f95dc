"""T5X checkpoints of every layout and year, local and in a bucket: exactly the tree, or an error.

The files that upstream T5X wrote are read where the reference data is present; the layouts that it
wrote in other years are made here from one checkpoint, by rewriting its index.
"""

import contextlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import serialization, traverse_util
from flax.linen.partitioning import AxisMetadata
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from prompt_tuning.api import model_config
from prompt_tuning.checkpoints import t5x
from prompt_tuning.checkpoints.t5x import (
    read_param,
    read_shapes,
    read_step,
    read_t5x,
    write_t5x,
)
from prompt_tuning.config import ConfigError, ModelConfig, to_dict
from prompt_tuning.model import t5
from prompt_tuning.model.t5 import param_shapes

MODEL = ModelConfig(
    num_encoder_layers=1,
    num_decoder_layers=1,
    num_heads=4,
    head_dim=8,
    embed_dim=16,
    mlp_dim=24,
    num_embeddings=48,
)
KERNEL = "encoder/layers_0/mlp/wi_0/kernel"
SCALE = "encoder/encoder_norm/scale"
Params = dict[str, np.ndarray]
Shapes = dict[str, jax.ShapeDtypeStruct]


def random_params(shapes: Shapes) -> Params:
    rng = np.random.default_rng(0)
    return {k: rng.standard_normal(s.shape).astype(np.float32) for k, s in shapes.items()}


@pytest.fixture(scope="module")
def shapes() -> Shapes:
    return param_shapes(MODEL)


@pytest.fixture(scope="module")
def params(shapes: Shapes) -> Params:
    return random_params(shapes)


@pytest.fixture
def written(tmp_path: Path, params: Params) -> Path:
    """A checkpoint of ours, step 7."""
    write_t5x(tmp_path / "checkpoint_7", params, 7)
    return tmp_path / "checkpoint_7"


def assert_equal(read: dict[str, jax.Array], params: Params) -> None:
    assert set(read) == set(params)
    for name, value in params.items():
        np.testing.assert_array_equal(np.asarray(read[name]), value, err_msg=name)


# ---- files that upstream T5X wrote


def load_npz(file: Path) -> Params:
    with np.load(file) as stored:
        return dict(stored)


def shapes_of(params: Params) -> Shapes:
    return {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in params.items()}


@pytest.mark.parametrize("layout", ["legacy", "orbax", "orbax_state"])
def test_reads_what_t5x_writes_today(shared_dir: Path, layout: str) -> None:
    reference = load_npz(shared_dir / "goldens/t5x/params.npz")
    folder = shared_dir / "goldens/t5x" / layout.removesuffix("_state") / "checkpoint_300"
    path = folder / "state" if layout.endswith("_state") else folder
    read, step = read_t5x(path, shapes_of(reference))
    assert step == 300
    assert_equal(read, reference)
    assert all(value.dtype == jnp.float32 for value in read.values())
    assert read_shapes(path) == {k: v.shape for k, v in reference.items()}


def test_reads_what_t5x_wrote_in_2021(shared_dir: Path) -> None:
    folder = shared_dir / "data/t5x_test_checkpoints/prompt_tuning"
    path = folder / "test_t5_1_1_tiny/checkpoint_3"
    shapes = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in read_shapes(path).items()}
    config = ModelConfig(
        num_encoder_layers=2,
        num_decoder_layers=2,
        num_heads=2,
        head_dim=2,
        embed_dim=4,
        mlp_dim=8,
        num_embeddings=32128,
        relative_attention_num_buckets=4,
    )
    assert {k: s.shape for k, s in shapes.items()} == {
        k: s.shape for k, s in param_shapes(config).items()
    }
    read, step = read_t5x(path, shapes)
    assert step == 3
    embedding = np.load(folder / "tiny_embeddings_32128x4.npy")  # exported by its authors
    np.testing.assert_array_equal(read["token_embedder/embedding"], embedding)
    np.testing.assert_array_equal(read_param(path, "token_embedder/embedding"), embedding)


def test_reads_a_single_msgpack_file(shared_dir: Path) -> None:
    path = shared_dir / "data/t5x_test_checkpoints/t5x/test_t5_tiny.checkpoint_0"
    shapes = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in read_shapes(path).items()}
    read, step = read_t5x(path, shapes)
    assert (step, len(read)) == (0, 52)
    assert read["token_embedder/embedding"].shape == (32128, 8)
    for name, value in read.items():  # the norms of an untrained T5 are one, nothing else is
        assert bool((value == 1).all()) == name.endswith("scale"), name


def test_says_what_the_toy_checkpoints_lack(shared_dir: Path) -> None:
    folder = shared_dir / "data/t5x_test_checkpoints/t5x"
    for toy in ("tiny_orbax/1", "tiny_t5/checkpoint_1"):
        with pytest.raises(ConfigError, match="no parameters"):
            read_step(folder / toy)


# ---- layouts of other years, made by rewriting an index


def edit_index(folder: Path, edit: Callable[[str, Any], Any]) -> None:
    """Applies `edit(name, leaf)` to every leaf of the `target` of a checkpoint's index."""
    index = serialization.msgpack_restore((folder / "checkpoint").read_bytes())
    is_spec = lambda _, value: "driver" in value  # noqa: E731
    flat = traverse_util.flatten_dict(index["optimizer"]["target"], sep="/", is_leaf=is_spec)
    edited = {name: edit(name, leaf) for name, leaf in flat.items()}
    index["optimizer"]["target"] = traverse_util.unflatten_dict(edited, sep="/")
    index["optimizer"]["state"]["param_states"] = {"encoder": {"m": np.zeros(1), "v": None}}
    index["flax_mutables"] = {"dropout": np.zeros(3)}
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(index))


def gfile_2021(name: str, leaf: Any) -> Any:
    if not isinstance(leaf, dict):
        return leaf
    path = leaf["kvstore"]["path"].rstrip("/")
    metadata = {**leaf["metadata"], "dtype": "<f4"}
    return {"driver": "zarr", "kvstore": {"driver": "gfile", "path": path}, "metadata": metadata}


def path_beside_kvstore(name: str, leaf: Any) -> Any:
    if not isinstance(leaf, dict):
        return leaf
    store = {"driver": "gcs", "bucket": "t5x-dummy-bucket"}
    return {**leaf, "kvstore": store, "path": leaf["kvstore"]["path"].rstrip("/")}


def placeholders(name: str, leaf: Any) -> Any:
    return f"PLACEHOLDER://target.{name.replace('/', '.')}" if isinstance(leaf, dict) else leaf


@pytest.mark.parametrize("edit", [gfile_2021, path_beside_kvstore, placeholders])
def test_reads_the_layouts_of_other_years(
    written: Path, shapes: Shapes, params: Params, edit: Callable[[str, Any], Any]
) -> None:
    edit_index(written, edit)
    read, step = read_t5x(written, shapes)
    assert step == 7
    assert_equal(read, params)


def test_reads_an_index_with_everything_inline(
    tmp_path: Path, shapes: Shapes, params: Params
) -> None:
    tree = {"target": traverse_util.unflatten_dict(params, sep="/"), "state": {"step": np.int32(9)}}
    (tmp_path / "one_file").write_bytes(serialization.msgpack_serialize(tree))  # version 0
    read, step = read_t5x(tmp_path / "one_file", shapes)
    assert step == 9
    assert_equal(read, params)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_ocdbt": False},
        {"use_zarr3": True},
        {"use_ocdbt": False, "use_zarr3": True},
    ],
    ids=str,
)
def test_reads_what_orbax_writes(
    tmp_path: Path, shapes: Shapes, params: Params, options: dict[str, bool]
) -> None:
    zero = {**params, SCALE: np.zeros_like(params[SCALE])}  # zeros are data too
    tree = {
        "target": traverse_util.unflatten_dict(zero, sep="/"),
        "state": {"step": np.asarray(12), "param_states": {"m": np.ones(3), "v": None}},
        "flax_mutables": {},
    }
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(tmp_path / "checkpoint_12" / "state", tree)
    read, step = read_t5x(tmp_path / "checkpoint_12", shapes)
    assert step == 12
    assert_equal(read, zero)


def test_reads_orbax_from_before_its_metadata(
    tmp_path: Path, shapes: Shapes, params: Params
) -> None:
    """Arrays in a database, and a msgpack tree of placeholders as their list."""
    tree = {
        "target": traverse_util.unflatten_dict(params, sep="/"),
        "state": {"step": np.asarray(5)},
    }
    state = tmp_path / "checkpoint_5" / "state"
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(state, tree)
    (state / "_METADATA").unlink()
    names = jax.tree_util.tree_map_with_path(
        lambda path, _: "PLACEHOLDER://" + jax.tree_util.keystr(path, simple=True, separator="."),
        tree,
    )
    (state / "checkpoint").write_bytes(serialization.msgpack_serialize(names))
    read, step = read_t5x(tmp_path / "checkpoint_5", shapes)
    assert step == 5
    assert_equal(read, params)


# ---- what we write


def test_writes_t5x_own_layout(written: Path, params: Params) -> None:
    index = serialization.msgpack_restore((written / "checkpoint").read_bytes())
    assert index["version"] == 3
    assert index["optimizer"]["state"]["step"] == np.int32(7)
    target = index["optimizer"]["target"]
    np.testing.assert_array_equal(target["encoder"]["encoder_norm"]["scale"], params[SCALE])
    assert target["encoder"]["layers_0"]["mlp"]["wi_0"]["kernel"] == {
        "driver": "zarr",
        "dtype": "float32",
        "kvstore": {"driver": "file", "path": "target.encoder.layers_0.mlp.wi_0.kernel/"},
        "metadata": {
            "shape": [16, 24],
            "chunks": [16, 24],
            "compressor": {"id": "gzip", "level": 1},
        },
    }
    zarray = json.loads((written / "target.token_embedder.embedding" / ".zarray").read_text())
    assert (zarray["dtype"], zarray["compressor"]) == ("<f4", {"id": "gzip", "level": 1})


def test_large_arrays_are_chunked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert t5x._chunks((32128, 4096), 4) == [2008, 2048]
    assert t5x._chunks((512, 1024), 4) == [512, 1024]
    monkeypatch.setattr(t5x, "CHUNK_BYTES", 100)
    params = {"a/kernel": np.arange(7 * 13, dtype=np.float32).reshape(7, 13)}
    write_t5x(tmp_path / "checkpoint_1", params, 1)
    assert len(list((tmp_path / "checkpoint_1/target.a.kernel").iterdir())) > 4
    assert_equal(read_t5x(tmp_path / "checkpoint_1", shapes_of(params))[0], params)


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("wanted", [None, "float32", "bfloat16"])
def test_casts_as_numpy_does(
    tmp_path: Path, shapes: Shapes, params: Params, stored: str, wanted: str | None
) -> None:
    write_t5x(tmp_path / "checkpoint_1", params, 1, dtype=stored)
    read, _ = read_t5x(tmp_path / "checkpoint_1", shapes, dtype=wanted)
    for name, value in params.items():
        assert read[name].dtype == np.dtype(wanted or "float32")
        expected = value.astype(stored).astype(wanted or "float32")
        np.testing.assert_array_equal(np.asarray(read[name]), expected, err_msg=name)
    assert read_param(tmp_path / "checkpoint_1", KERNEL).dtype == np.dtype(stored)


def test_a_failed_write_leaves_what_was_there(
    written: Path, shapes: Shapes, params: Params
) -> None:
    class Failing(dict):
        def items(self) -> Any:  # the last parameter cannot be fetched
            return [*super().items(), ("zz/kernel", object())]

    with pytest.raises(TypeError):
        write_t5x(written, Failing({KERNEL: params[KERNEL]}), 8)
    read, step = read_t5x(written, shapes)
    assert step == 7
    assert_equal(read, params)
    assert [p.name for p in written.parent.iterdir()] == ["checkpoint_7"]


def test_replaces_a_checkpoint_and_clears_leftovers(
    written: Path, shapes: Shapes, params: Params
) -> None:
    (written.parent / ".checkpoint_7.0123.tmp").mkdir()  # a writer was killed
    write_t5x(written, {name: value + 1 for name, value in params.items()}, 8)
    read, step = read_t5x(written, shapes)
    assert step == 8
    assert_equal(read, {name: value + 1 for name, value in params.items()})
    assert [p.name for p in written.parent.iterdir()] == ["checkpoint_7"]


def test_writes_only_to_local_folders(tmp_path: Path, params: Params) -> None:
    with pytest.raises(ConfigError, match="gs://b/checkpoint_1"):
        write_t5x("gs://b/checkpoint_1", params, 1)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="found a file"):
        write_t5x(tmp_path / "file", params, 1)


# ---- straight to the devices


@pytest.mark.parametrize("grid", [(8, 1), (4, 2), (1, 8)])
@pytest.mark.parametrize("budget", [t5x.BYTES_IN_FLIGHT, 1])
def test_restores_to_shardings(
    written: Path,
    shapes: Shapes,
    params: Params,
    grid: tuple[int, int],
    budget: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(t5x, "BYTES_IN_FLIGHT", budget)
    mesh = jax.make_mesh(grid, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    shardings = {
        name: NamedSharding(
            mesh, PartitionSpec(None, "model") if len(s.shape) == 2 else PartitionSpec()
        )
        for name, s in shapes.items()
    }
    read, _ = read_t5x(written, shapes, shardings=shardings)
    assert_equal(read, params)
    for name, value in read.items():
        assert value.sharding == shardings[name]
    assert read[KERNEL].addressable_shards[0].data.shape == (16, 24 // grid[1])


# ---- errors


def test_names_everything_that_does_not_fit(written: Path, shapes: Shapes) -> None:
    other = param_shapes(
        ModelConfig(
            num_encoder_layers=2,
            num_decoder_layers=1,
            num_heads=4,
            head_dim=8,
            embed_dim=16,
            mlp_dim=32,
            num_embeddings=48,
        )
    )
    del other[SCALE]
    with pytest.raises(ConfigError) as error:
        read_t5x(written, other)
    message = str(error.value)
    assert f"the checkpoint {written} does not fit the model" in message
    assert "missing in the checkpoint (9): encoder/layers_1/attention/key/kernel" in message
    assert "and 4 more" in message
    assert f"unknown to the model (1): {SCALE}\n" in message
    assert f"{KERNEL} has shape (16, 24), the model needs (16, 32)" in message
    assert "of another shape (6)" in message
    assert "models/" in message


def test_refuses_bfloat16_stored_as_integers(written: Path, shapes: Shapes) -> None:
    edit_index(written, lambda n, leaf: np.zeros((16, 24), np.uint16) if n == KERNEL else leaf)
    with pytest.raises(ConfigError, match=rf"{KERNEL}.*uint16"):
        read_t5x(written, shapes)


def test_an_absent_checkpoint_says_what_was_looked_for(
    tmp_path: Path, written: Path, shapes: Shapes, params: Params
) -> None:
    with pytest.raises(ConfigError, match="/nowhere") as e:
        read_t5x(tmp_path / "nowhere", shapes)
    assert "'checkpoint'" in str(e.value)
    assert "'state/_METADATA'" in str(e.value)
    write_t5x(tmp_path / "checkpoint_100", params, 100)
    (tmp_path / "checkpoint_8.tmp-1").mkdir()
    with pytest.raises(ConfigError, match="2 checkpoints") as e:
        read_t5x(tmp_path, shapes)
    assert str(e.value).endswith(f"{tmp_path}/checkpoint_7, {tmp_path}/checkpoint_100.")
    for path in ("", "s3://bucket/checkpoint_1"):
        with pytest.raises(ConfigError, match="gs://bucket/path"):
            read_t5x(path, shapes)


def test_a_relative_path_and_a_slash_at_the_end(
    written: Path, shapes: Shapes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(written.parent)
    assert read_step("checkpoint_7/") == read_step("./checkpoint_7") == read_step(written) == 7


def test_suggests_the_nearest_name(written: Path) -> None:
    with pytest.raises(ConfigError, match=f"Did you mean.*{KERNEL}"):
        read_param(written, KERNEL.replace("wi_0", "w_0"))


def truncate(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize("act", [truncate, Path.unlink, lambda file: file.write_bytes(b"")])
@pytest.mark.parametrize("file", ["0.0", ".zarray"])
def test_a_damaged_array_is_an_error(
    written: Path, shapes: Shapes, file: str, act: Callable[[Path], None]
) -> None:
    # A lost chunk in particular: zarr means zeros by that.
    act(written / "target.encoder.layers_0.mlp.wi_0.kernel" / file)
    message = rf"cannot read {KERNEL} of the checkpoint {written}: .* copied incompletely"
    with pytest.raises(ConfigError, match=message) as error:
        read_t5x(written, shapes)
    assert "tensorstore_spec" not in str(error.value)


@pytest.mark.parametrize("index", ["checkpoint", "state/_METADATA"])
@pytest.mark.parametrize("keep", [0, 1, 30, 0.5, 0.999])
def test_a_truncated_index_is_an_error(
    tmp_path: Path, shapes: Shapes, params: Params, index: str, keep: float
) -> None:
    folder = tmp_path / "checkpoint_1"
    if index == "checkpoint":
        write_t5x(folder, params, 1)
    else:
        tree = {"target": traverse_util.unflatten_dict(params, sep="/"), "state": {"step": 1}}
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(folder / "state", tree)
    data = (folder / index).read_bytes()
    (folder / index).write_bytes(data[: int(keep * len(data)) if 0 < keep < 1 else int(keep)])
    with pytest.raises(ConfigError, match="truncated"):
        read_t5x(folder, shapes)


def test_a_truncated_database_is_an_error(tmp_path: Path, shapes: Shapes, params: Params) -> None:
    tree = {"target": traverse_util.unflatten_dict(params, sep="/"), "state": {"step": 1}}
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint_1/state", tree)
    for file in sorted((tmp_path / "checkpoint_1/state").rglob("d/*")):
        truncate(file)
    with pytest.raises(ConfigError):
        read_t5x(tmp_path / "checkpoint_1", shapes)


@pytest.mark.parametrize("path", ["/etc", "../other/", "a/../../b", ""])
def test_an_index_may_not_point_elsewhere(written: Path, shapes: Shapes, path: str) -> None:
    def elsewhere(name: str, leaf: Any) -> Any:
        return {**leaf, "kvstore": {"driver": "file", "path": path}} if name == KERNEL else leaf

    edit_index(written, elsewhere)
    with pytest.raises(ConfigError, match=KERNEL):
        read_t5x(written, shapes)


def test_a_tensorflow_checkpoint_is_named_as_such(tmp_path: Path, shapes: Shapes) -> None:
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-1000000"')
    with pytest.raises(ConfigError, match="TensorFlow"):
        read_t5x(tmp_path, shapes)


@pytest.mark.parametrize("content", [b"\x80", b"hello", b"\x81\xa6target\x80", b"\x93\x01\x02\x03"])
def test_another_file_is_not_an_index(tmp_path: Path, shapes: Shapes, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ConfigError):
        read_t5x(tmp_path / "file", shapes)


# ---- in a bucket: a server that answers TensorStore as Google Cloud Storage does


class _Bucket(http.server.BaseHTTPRequestHandler):
    """Objects and listings of a folder, by the JSON API: all that a reader asks for."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1

    def do_GET(self) -> None:
        server: Any = self.server
        url = urllib.parse.urlsplit(self.path)
        *_, bucket, _, name = [*url.path.split("/"), ""][:7]
        name = urllib.parse.unquote(name)
        root = server.root / bucket
        server.requests[name] += 1
        if not name:
            self._list(root, urllib.parse.parse_qs(url.query))
        elif (root / name).is_file():
            self._send_object((root / name).read_bytes())
        else:
            self._send(404, b"{}")

    def _list(self, root: Path, query: dict[str, list[str]]) -> None:
        first, last = query.get("startOffset", [""])[0], query.get("endOffset", ["\uffff"])[0]
        names = sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())
        items = [{"name": n, "generation": "1", "size": "1"} for n in names if first <= n < last]
        self._send(200, json.dumps({"kind": "storage#objects", "items": items}).encode())

    def _send_object(self, data: bytes) -> None:
        if asked := self.headers.get("Range"):
            first, last = asked.removeprefix("bytes=").split("-")
            start = int(first) if first else len(data) - int(last)
            stop = min(int(last) + 1 if first and last else len(data), len(data))
            headers = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
            self._send(206, data[start:stop], headers)
        else:
            self._send(200, data)

    def _send(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        sizes = {"Content-Length": str(len(body)), "x-goog-generation": "1"}
        for key, value in (sizes | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def serve(root: Path) -> Iterator[Any]:
    """A stand-in for the bucket gs://pretrained, kept in `root / "pretrained"`."""
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Bucket)
    server.root, server.requests = root, Counter()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with serve(tmp_path) as server:
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_port}")
        yield server


def test_reads_t5x_from_a_bucket(
    bucket: Any, tmp_path: Path, shapes: Shapes, params: Params
) -> None:
    folder = tmp_path / "pretrained/t5 base/checkpoint_7"
    write_t5x(folder, params, 7)
    edit_index(folder, path_beside_kvstore)
    read, step = read_t5x("gs://pretrained/t5 base/checkpoint_7", shapes, dtype="bfloat16")
    assert step == 7
    assert_equal(read, {k: v.astype("bfloat16") for k, v in params.items()})
    assert max(bucket.requests.values()) == 1  # nothing is fetched twice
    assert not any("param_states" in name for name in bucket.requests)
    with pytest.raises(ConfigError, match="gs://pretrained/t5 base/checkpoint_7"):
        read_t5x("gs://pretrained/t5 base", shapes)
    (folder / "target.encoder.layers_0.mlp.wi_0.kernel/0.0").unlink()
    with pytest.raises(ConfigError, match=f"{KERNEL}.*gs://"):
        read_t5x("gs://pretrained/t5 base/checkpoint_7", shapes)


def test_reads_orbax_from_a_bucket(
    bucket: Any, tmp_path: Path, shapes: Shapes, params: Params
) -> None:
    tree = {"target": traverse_util.unflatten_dict(params, sep="/"), "state": {"step": 7}}
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "pretrained/checkpoint_7/state", tree)
    read, step = read_t5x("gs://pretrained/checkpoint_7/", shapes)
    assert step == 7
    assert_equal(read, params)


def test_shards_share_their_chunks(bucket: Any, tmp_path: Path) -> None:
    """Eight devices that each need a part of every chunk: each comes over the net once."""
    params = {"a/kernel": np.random.default_rng(0).random((2048, 4096), np.float32)}
    folder = tmp_path / "pretrained/checkpoint_1"
    write_t5x(folder, params, 1)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    for spec in (PartitionSpec("model", None), PartitionSpec("model", "data"), PartitionSpec()):
        bucket.requests.clear()
        shardings = {"a/kernel": NamedSharding(mesh, spec)}
        read, _ = read_t5x("gs://pretrained/checkpoint_1", shapes_of(params), shardings=shardings)
        assert_equal(read, params)
        chunks = {name: n for name, n in bucket.requests.items() if name[-3:] in ("0.0", "0.1")}
        assert list(chunks.values()) == [1, 1]


@pytest.mark.slow
def test_a_process_reads_the_chunks_of_its_own_shards(tmp_path: Path) -> None:
    """Two processes with four devices each; each is served by a bucket of its own, which counts."""
    whole = np.random.default_rng(0).random((2048, 4096), np.float32)
    write_t5x(tmp_path / "pretrained/checkpoint_1", {"a/kernel": whole}, 1)
    np.save(tmp_path / "whole.npy", whole)
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{one.getsockname()[1]}"
    script = Path(__file__).parent / "read_shards.py"
    with serve(tmp_path) as first, serve(tmp_path) as second:
        started = []
        for index, server in enumerate((first, second)):
            given = (coordinator, "2", str(index), "gs://pretrained/checkpoint_1")
            started.append(
                subprocess.Popen(
                    [sys.executable, str(script), *given, str(tmp_path / "whole.npy")],
                    env={
                        **os.environ,
                        "PYTHONPATH": str(script.parents[1]),
                        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
                        "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{server.server_port}",
                    },
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        said = [process.communicate(timeout=200)[0] for process in started]
        assert [process.returncode for process in started] == [0, 0], said
        assert all("4 shards" in text for text in said)
        for server, name in ((first, "0.0"), (second, "0.1")):
            chunks = {path[-3:]: n for path, n in server.requests.items() if path[-3:-1] == "0."}
            assert chunks == {name: 1}


def test_an_unreachable_bucket_says_how_to_copy(
    shapes: Shapes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(ConfigError, match="gs://") as error:
        read_t5x("gs://t5-data/t5x/checkpoint_1100000", shapes)
    assert "gsutil -m cp -r gs://t5-data/t5x/checkpoint_1100000 ." in str(error.value)
    assert time.monotonic() - start < 20  # not TensorStore's 32 patient attempts


# ---- upstream


@pytest.mark.t5x
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_upstream_reads_what_we_write(tmp_path: Path, params: Params, dtype: str) -> None:
    checkpoints = pytest.importorskip("t5x.checkpoints", reason="upstream T5X is not installed")
    from t5x import partitioning, train_state

    write_t5x(tmp_path / "checkpoint_7", params, 7, dtype=dtype)
    expected = {k: v.astype(dtype).astype(np.float32) for k, v in params.items()}
    plain = checkpoints.load_t5x_checkpoint(str(tmp_path / "checkpoint_7"))
    assert plain["state"]["step"] == 7
    assert_equal(traverse_util.flatten_dict(plain["target"], sep="/"), expected)

    names = {k: AxisMetadata((None,) * v.ndim) for k, v in params.items()}
    zeros = {k: np.zeros_like(v) for k, v in params.items()}
    model = {
        "params": traverse_util.unflatten_dict(zeros, sep="/"),
        "params_axes": traverse_util.unflatten_dict(
            {f"{k}_axes": name for k, name in names.items()}, sep="/"
        ),
    }
    state = train_state.InferenceState.create(flax.core.freeze(model))
    partitioner = partitioning.PjitPartitioner(num_partitions=1)
    settings = {"train_state": state, "partitioner": partitioner, "restore_dtype": jnp.float32}
    for loader in (
        checkpoints.Checkpointer(checkpoints_dir=str(tmp_path), **settings),
        checkpoints.OrbaxCheckpointManagerInterface(directory=str(tmp_path), **settings),
    ):
        restored = loader.restore(path=str(tmp_path / "checkpoint_7"))
        assert int(restored.step) == 7
        read = flax.core.unfreeze(restored.params)
        assert_equal(traverse_util.flatten_dict(read, sep="/"), expected)


# ---- memory


@pytest.mark.weekly
@pytest.mark.parametrize("size", ["large", "xl"])
def test_a_restore_needs_little_more_than_the_backbone(size: str, tmp_path: Path) -> None:
    """Over eight devices in bfloat16: its size and twice its largest parameter, at the peak."""
    config = model_config(size)  # type: ignore[arg-type]
    shapes = t5.param_shapes(config)
    random = np.random.default_rng(0)
    rows = {n: random.standard_normal(s.shape[-1]).astype(np.float32) for n, s in shapes.items()}
    params = {name: np.broadcast_to(row, shapes[name].shape) for name, row in rows.items()}
    write_t5x(tmp_path / "checkpoint_1", params, 1)
    script = Path(__file__).parent / "restore_peak.py"
    settings = json.dumps(to_dict(config))
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "checkpoint_1"), settings],
        env={**os.environ, "PYTHONPATH": str(script.parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    whole, largest = (2 * f(s.size for s in shapes.values()) for f in (sum, max))
    assert json.loads(done.stdout)["peak"] <= whole + 2 * largest
