"""The compiled step of a base T5, and what `t5x plan` says of a run before it starts."""

import dataclasses
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import hlo_text
import jax
import numpy as np
import pytest
from tiny_models import CONFIG, ONE_LAYER

from prompt_tuning import cli
from prompt_tuning.api import model_config
from prompt_tuning.config import (
    ConfigError,
    CorpusConfig,
    DataConfig,
    Experiment,
    ModelConfig,
    PromptConfig,
    TrainConfig,
)
from prompt_tuning.model import sharding, t5
from prompt_tuning.planning import chips, devices, fit, flops, hlo, plan, program

ROOT = Path(__file__).parents[1]


def experiment(
    model: ModelConfig, *, inputs=64, targets=8, rows=8, partitions=2, **train
) -> Experiment:
    return Experiment(
        model_dir="",
        initial_checkpoint_path="",
        model=model,
        data=DataConfig(
            mixture_or_task_name="any",
            task_feature_lengths={"inputs": inputs, "targets": targets},
            batch_size=rows,
        ),
        prompt=PromptConfig(length=20),
        train=TrainConfig(train_steps_relative=100, **train),
        num_model_partitions=partitions,
    )


def matrices(model: ModelConfig, parts: int) -> set[tuple[int, ...]]:
    """The shapes of all frozen matrices, whole and as one device's share."""
    shapes = set()
    for name, leaf in t5.param_shapes(model).items():
        if leaf.ndim == 2 and not name.endswith("rel_embedding"):
            shapes |= {leaf.shape}
            shapes |= {
                tuple(n // parts if i == axis else n for i, n in enumerate(leaf.shape))
                for axis in (0, 1)
            }
    return shapes


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("base", 2), marks=pytest.mark.slow),
        pytest.param(("xl", 4), marks=pytest.mark.weekly),
        pytest.param(("xxl", 8), marks=pytest.mark.weekly),
    ],
    ids=lambda p: p[0],
)
def compiled(request):
    """The step in bfloat16 on eight devices, from shapes alone: settings, program, its text."""
    size, parts = request.param
    model = dataclasses.replace(model_config(size), dtype="bfloat16", dropout_rate=0.0)
    settings = experiment(model, partitions=parts)
    lowered = program.lower_step(settings, sharding.make_mesh(parts))
    return settings, lowered, lowered.compile()


def test_a_step_costs_what_its_sizes_say(compiled):
    settings, _, program_ = compiled
    cost = flops.count(settings.model, rows=8, prompt=20, inputs=64, targets=8)
    assert 8 * hlo_text.dot_flops(program_.as_text()) == pytest.approx(cost.step, rel=0.001)
    # Two forward passes, and what the attention products cost beside (they need two gradients).
    twice = 2 * cost.forward + cost.attention
    assert cost.step == pytest.approx(twice, rel=0.02)


def test_no_weight_is_gathered_and_none_is_copied_to_float32(compiled):
    settings, lowered, program_ = compiled
    text = program_.as_text()
    found = hlo.collectives(text)
    assert found["all-reduce"]
    smallest = settings.model.embed_dim * settings.model.head_dim
    assert not hlo.gathers_a_weight(text, smallest)
    shapes = matrices(settings.model, settings.num_model_partitions)
    assert hlo_text.float32_copies(lowered.as_text(dialect="hlo"), shapes) == []


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_accelerators_are_given_frozen_weights_as_they_are(platform):
    """Lowered for them: the products are not those of a processor, which sums to float32."""
    depth = {"num_encoder_layers": 2, "num_decoder_layers": 2}
    model = dataclasses.replace(model_config("small"), dtype="bfloat16", dropout_rate=0.0, **depth)
    settings = experiment(model, partitions=1)
    mesh = sharding.make_mesh(1, jax.devices()[:1])
    traced = program.trace_step(settings, mesh)
    text = traced.lower(lowering_platforms=(platform,)).as_text(dialect="hlo")
    products = [i for i in hlo_text.instructions(text) if i.operation == "dot"]
    assert len(products) > 50
    assert {i.dtype for i in products} == {"bf16", "f32"}, "softmax's and the logits' are float32"
    assert hlo_text.float32_copies(text, matrices(model, 1)) == []
    on_cpu = traced.lower().as_text(dialect="hlo")
    assert not [
        i for i in hlo_text.instructions(on_cpu) if i.operation == "dot" and i.dtype == "bf16"
    ]


def test_prompt_and_state_are_donated_and_a_device_holds_its_share(compiled):
    settings, _, program_ = compiled
    # step, prompt, and Adafactor's count and moment; arguments are numbered in this order.
    assert hlo.donated(program_.as_text()) == {0, 1, 2, 3}
    memory = program_.memory_analysis()
    total = 2 * sum(leaf.size for leaf in t5.param_shapes(settings.model).values())
    share = total / settings.num_model_partitions
    assert memory.argument_size_in_bytes == pytest.approx(share, rel=0.01)
    assert memory.output_size_in_bytes < 4 * 20 * settings.model.embed_dim * 4


@pytest.mark.slow
def test_dropout_moves_nothing_between_devices():
    """Its masks are drawn where they are used: the collectives are those without it."""
    found = []
    for rate in (0.0, 0.1):
        settings = experiment(dataclasses.replace(CONFIG, dropout_rate=rate), partitions=4)
        program_ = program.lower_step(settings, sharding.make_mesh(4)).compile()
        collectives = hlo.collectives(program_.as_text())
        found.append({kind: len(all_of_it) for kind, all_of_it in collectives.items()})
    assert found[0] == found[1]
    assert found[0]["all-reduce"] > 0


def test_what_the_checks_look_for_is_found():
    """A program that gathers a weight, keeps its state and copies a weight to float32."""
    mesh = sharding.make_mesh(2)
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model"))
    weight = jax.ShapeDtypeStruct((64, 32), "bfloat16", sharding=split)
    x = jax.ShapeDtypeStruct((8, 64), "float32", sharding=sharding.replicated(mesh))
    whole = jax.jit(lambda w: w + 1, out_shardings=sharding.replicated(mesh)).lower(weight)
    assert hlo.gathers_a_weight(whole.compile().as_text(), 64 * 32)
    lowered = jax.jit(lambda w, x: x @ w.astype("float32")).lower(weight, x)
    assert hlo_text.float32_copies(lowered.as_text(dialect="hlo"), {(64, 32)})
    assert hlo.donated(lowered.compile().as_text()) == set()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mlp_activations": ("relu",), "logits_via_embedding": True},
        {"num_encoder_layers": 3, "num_decoder_layers": 1},
    ],
    ids=["1.1", "1.0", "uneven"],
)
@pytest.mark.parametrize(
    "targets", [8, pytest.param(24, marks=pytest.mark.slow)]
)  # without the encoder's keys and values, and with
def test_the_count_is_exact_for_every_family(changes, targets):
    model = dataclasses.replace(CONFIG, **changes)
    lowered = program.lower_step(
        experiment(model, targets=targets, partitions=1), sharding.make_mesh(1, jax.devices()[:1])
    )
    cost = flops.count(model, rows=8, prompt=20, inputs=64, targets=targets)
    assert hlo_text.dot_flops(lowered.compile().as_text()) == cost.step


BEFORE = flops.Prefixes(20, 20, 20)
COUNTED = [
    ("prefix_tuning", {}, BEFORE),
    ("prefix_tuning", {"encoder": False}, BEFORE._replace(encoder=0)),
    ("prefix_tuning", {"encoder": False, "decoder": False}, flops.Prefixes(cross=20)),
    ("prefix_tuning", {"encoder": False, "cross": False}, flops.Prefixes(decoder=20)),
    ("p_tuning_v2", {}, flops.Prefixes(encoder=20)),
    ("shared_prompt", {}, BEFORE._replace(decoder=0)),
]
FAST = [COUNTED[0], COUNTED[-1]]


@pytest.mark.parametrize("targets", [8, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "values", "prefixes"),
    [pytest.param(*c, id=f"{c}", marks=[pytest.mark.slow] * (c not in FAST)) for c in COUNTED],
)
def test_the_count_is_exact_for_keys_and_values(name, values, prefixes, targets):
    settings = experiment(CONFIG, targets=targets, partitions=1)
    config = dataclasses.replace(settings.prompt, method=name, settings=values)
    settings = dataclasses.replace(settings, prompt=config)
    lowered = program.lower_step(settings, sharding.make_mesh(1, jax.devices()[:1]))
    cost = flops.count(CONFIG, rows=8, prompt=0, inputs=64, targets=targets, prefixes=prefixes)
    fold = flops.count_fold(CONFIG, 20) if name == "shared_prompt" else 0
    assert hlo_text.dot_flops(lowered.compile().as_text()) == cost.step + fold


def test_a_shared_prompt_takes_about_half_of_a_steps_operations():
    """T5 1.1 base, 100 rows of prompt, 32 of text, targets of 2 tokens."""
    base = model_config("t5_1_1_base")
    prefixes = flops.Prefixes(encoder=100, cross=100)
    for inputs, most in ((128, 0.60), (64, 0.45)):
        sizes = {"rows": 32, "inputs": inputs, "targets": 2}
        plain = flops.count(base, prompt=100, **sizes).step
        shared = flops.count(base, prompt=0, prefixes=prefixes, **sizes).step
        assert (shared + flops.count_fold(base, 100)) / plain <= most


def test_a_gpu_is_planned_for_with_the_attention_it_will_have():
    """One processor computes attention in parts, whatever it stands for; a GPU does not."""
    one, settings = sharding.make_mesh(1, jax.devices()[:1]), experiment(ONE_LAYER, partitions=1)

    def products_of(mesh, platform):
        lowered = program.lower_step(settings, mesh, platform=platform)
        return lowered.as_text().count("dot_general")

    products = {name: products_of(one, name) for name in ("", "cpu", "gpu", "tpu")}
    many = products_of(sharding.make_mesh(1), "")
    assert products[""] == products["cpu"] > many
    assert products["gpu"] == products["tpu"] == many


def test_a_gpu_has_the_memory_that_jax_takes_of_it():
    one, tpu = (chips.parse_topology(name) for name in ("h100:1", "v5e:2x2"))
    assert plan.usable_share(one, {}) == 0.75
    assert plan.usable_share(one, {"XLA_CLIENT_MEM_FRACTION": ".9"}) == 0.9
    assert plan.usable_share(one, {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".8"}) == 0.8
    assert plan.usable_share(tpu, {}) == plan.HEADROOM
    with pytest.raises(ConfigError, match="XLA_CLIENT_MEM_FRACTION=most"):
        plan.usable_share(one, {"XLA_CLIENT_MEM_FRACTION": "most"})


def test_a_plan_names_mesh_memory_and_time():
    found = plan.make_plan(experiment(ONE_LAYER), chips.parse_topology("h100:8"), utilisation=0.5)
    assert found.mesh == {"data": 4, "model": 2}
    assert found.devices == 8
    assert found.fits
    assert found.donates
    assert not found.gathers_a_weight
    cost = flops.count(ONE_LAYER, rows=8, prompt=20, inputs=64, targets=8)
    assert found.seconds_per_step == pytest.approx(cost.step / (494e12 * 8 * 0.5))
    assert found.hours == pytest.approx(100 * found.seconds_per_step / 3600)
    text = plan.describe(found)
    assert "data 4 x model 2 on h100:8" in text
    assert ("upper bound" in text) == found.overstates_memory
    assert "2 a data-parallel device" in text
    # The same run in parts needs less memory.
    parts = plan.make_plan(experiment(ONE_LAYER, microbatches=2), chips.parse_topology("cpu:8"))
    assert parts.temporary_bytes < found.temporary_bytes
    assert parts.batch["rows"] == 4
    assert parts.fits is parts.seconds_per_step is None
    assert parts.step_flops == found.step_flops


def test_a_dry_run_names_mesh_memory_and_batch(capsys):
    assert cli.main(["train", "--gin_file=demo.gin", "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    said = [line for line in lines if line.startswith("# ")][-3:]
    assert "mesh: data 8 x model 1 on 8 cpu, 1 process(es)" in said[0]
    assert "GiB a device in float32" in said[1]
    assert "32 rows, 4 a data-parallel device, 32 of this host; 1 to 4 parts" in said[2]


@pytest.mark.parametrize("recipe", ["pretrain", "lm_adapt"])
def test_a_dry_run_of_pretraining(capsys, tmp_path, recipe):
    """Targets may follow from the inputs; the parts are MICROBATCHES, not groups by length."""
    (tmp_path / "text.txt").write_text("some words\n")
    flags = [
        *("--gin_file=models/t5_1_1_tiny.gin", f"--gin_file=runs/{recipe}.gin"),
        *("--gin.INITIAL_CHECKPOINT_PATH='tiny'", "--gin.VOCABULARY='tiny'"),
        *(f"--gin.MODEL_DIR='{tmp_path}/run'", f"--gin.TEXT_FILES=['{tmp_path}/text.txt']"),
        *("--gin.TRAIN_STEPS_RELATIVE=2", "--gin.BATCH_SIZE=32", "--gin.MICROBATCHES=2"),
    ]
    assert cli.main(["train", *flags, "--dry_run"]) == 0
    assert "2 equal part(s) of one shape" in capsys.readouterr().out
    assert cli.main(["train", *flags, "--gin.MICROBATCHES=5", "--dry_run"]) == 2
    assert "MICROBATCHES = 5" in capsys.readouterr().err


@pytest.mark.parametrize("corpus", [{"objective": "span_corruption"}, {"pack": True}])
def test_pretraining_is_planned_for_with_its_own_arrays(corpus):
    settings = dataclasses.replace(
        experiment(CONFIG, trainable="model"),
        prompt=PromptConfig(length=0),
        corpus=CorpusConfig(**{"objective": "prefix_lm", **corpus}),
    )
    lengths = {"inputs": 64}
    settings = dataclasses.replace(
        settings, data=dataclasses.replace(settings.data, task_feature_lengths=lengths)
    )
    shapes = program.largest_shapes(settings)
    assert shapes == (8, 64, 64 if settings.corpus.pack else 14)
    lowered = program.lower_step(settings, sharding.make_mesh(2))
    names = lowered.args_info[0][2].keys()
    assert ("encoder_segment_ids" in names) == settings.corpus.pack


def test_a_plan_refuses_what_a_run_refuses():
    with pytest.raises(ConfigError, match=r"MICROBATCHES = 3 .*BATCH_SIZE = 8"):
        plan.make_plan(experiment(CONFIG, microbatches=3), chips.parse_topology("cpu:8"))
    by_cudnn = dataclasses.replace(CONFIG, dtype="bfloat16", attention="cudnn")
    with pytest.raises(ConfigError, match=r"NVIDIA.* cpu"):
        plan.make_plan(experiment(by_cudnn), chips.parse_topology("cpu:8"))
    with pytest.raises(ConfigError, match="PACK = True"):
        dataclasses.replace(
            experiment(by_cudnn), corpus=CorpusConfig(objective="prefix_lm", pack=True)
        )
    with pytest.raises(ConfigError, match=r"NUM_MODEL_PARTITIONS = 8 .*NUM_HEADS"):
        plan.make_plan(experiment(by_cudnn, partitions=8), chips.parse_topology("h100:8"))


@pytest.mark.slow
def test_every_device_holds_its_share_of_every_matrix():
    mesh = sharding.make_mesh(8)
    settings = experiment(dataclasses.replace(model_config("base"), num_heads=16), partitions=8)
    total = sum(4 * leaf.size for leaf in t5.param_shapes(settings.model).values())
    state, frozen = program.abstract_state(settings, mesh)
    assert devices.device_bytes(frozen) == pytest.approx(total / 8, rel=0.01)
    prompt = 4 * 20 * settings.model.embed_dim
    assert prompt < devices.device_bytes(state) < 2.01 * prompt, "Adafactor's moments beside it"
    whole = dataclasses.replace(settings, train=TrainConfig(trainable="model"))
    half = dataclasses.replace(settings.model, dtype="bfloat16")
    said = devices.describe_arrays(dataclasses.replace(whole, model=half), mesh)
    state, _ = program.abstract_state(whole, mesh)
    assert devices.device_bytes(state) > total / 8, "of a model that is trained there are slots too"
    places = sharding.param_shardings(state.trainable, mesh)
    assert {n: leaf.sharding for n, leaf in state.trainable.items()} == places
    held = devices.device_bytes(state) / 2**30
    assert said == f"weights and optimiser: {held:.3f} GiB a device in float32"
    assert devices.host_rows(8, sharding.make_mesh(2)) == 8


def test_steps_of_a_run():
    def steps(path="", **train):
        settings = dataclasses.replace(
            experiment(CONFIG), initial_checkpoint_path=path, train=TrainConfig(**train)
        )
        return plan.run_steps(settings)

    assert steps(train_steps_relative=7) == 7
    assert steps("gs://b/checkpoint_1100000", train_steps=1_130_000) == 30_000
    assert steps("gs://b/elsewhere", train_steps=1_130_000) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", "--topology=v5e: expected"),
        ("z9:4", "The chips: v2"),
        ("h100:0", "--topology=h100:0"),
    ],
)
def test_a_topology_that_is_none_says_so(name, message):
    with pytest.raises(ConfigError, match=message):
        chips.parse_topology(name)


def test_what_cannot_be_planned_says_so():
    with pytest.raises(ConfigError, match="utilisation"):
        plan.make_plan(experiment(CONFIG), chips.parse_topology("cpu:8"), utilisation=2.0)
    with pytest.raises(ConfigError, match="BATCH_SIZE = 6"):
        plan.make_plan(experiment(CONFIG, rows=6), chips.parse_topology("cpu:8"))
    with pytest.raises(ConfigError, match="64 CPU devices"):
        plan.make_plan(experiment(CONFIG), chips.parse_topology("cpu:64"))


# On the devices of this machine.


def test_a_run_is_cut_into_parts_until_it_fits():
    run = experiment(ONE_LAYER, rows=32)
    whole, text = fit.fit_to_devices(run)
    assert (whole.model.dtype, whole.train.microbatches) == ("float32", 1)
    assert "MICROBATCHES = 1, inputs of 64 tokens" in text
    here = plan.make_plan(run, chips.topology_here(jax.devices(), 2**30))
    # Room for the weights and six tenths of a step, of which the parts' sum of gradients is little.
    memory = (here.argument_bytes + 0.6 * here.temporary_bytes) / here.usable_share
    halved, _ = fit.fit_to_devices(run, memory)
    assert halved.train.microbatches == 2
    assert dataclasses.replace(halved, train=run.train) == run


def test_a_run_that_cannot_be_cut_further_has_shorter_inputs_or_is_refused():
    run = experiment(ONE_LAYER, rows=4, inputs=256)  # a row for each data-parallel device
    here = plan.make_plan(run, chips.topology_here(jax.devices(), 2**30))
    memory = (here.argument_bytes + 0.6 * here.temporary_bytes) / here.usable_share
    shorter, text = fit.fit_to_devices(run, memory)
    assert shorter.data.task_feature_lengths == {"inputs": 128, "targets": 8}
    assert "inputs of 128 tokens" in text
    with pytest.raises(ConfigError, match="smaller backbone"):
        fit.fit_to_devices(run, here.argument_bytes)


@pytest.mark.parametrize(
    ("kind", "platform", "chip"),
    [
        ("Tesla T4", "gpu", "t4"),
        ("NVIDIA A100-SXM4-40GB", "gpu", "a100"),
        ("TPU v2", "tpu", "v2"),
        ("TPU v5 lite", "tpu", "v5e"),
        ("an unknown one", "gpu", "cpu"),
    ],
)
def test_a_device_is_known_by_its_name(kind, platform, chip):
    device = types.SimpleNamespace(device_kind=kind, platform=platform)
    topology = chips.topology_here([device], 7.0)
    assert topology.chip.float32 == chips.CHIPS[chip].float32
    assert (topology.chip.platform, topology.chip.memory, topology.devices) == (platform, 7.0, 1)


SMALL = [
    *("--gin_file=models/t5_1_1_tiny.gin", "--gin_file=superglue/cb.gin"),
    *("--gin_file=runs/prompt_tune.gin", "--gin.NUM_MODEL_PARTITIONS=2"),
]


@pytest.mark.slow
def test_the_command_needs_neither_checkpoint_nor_folder(tmp_path):
    path = tmp_path / "plan.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "prompt_tuning.cli", "plan", *SMALL),
            *("--topology=h100:4", f"--json={path}"),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "data 2 x model 2 on h100:4" in done.stdout
    values = json.loads(path.read_text())
    assert values["mesh"] == {"data": 2, "model": 2}
    assert values["steps"] == 30_000
    assert values["parameters"] == 919_296
    assert values["argument_bytes"] > 0
    assert np.isclose(values["step_flops"] / values["forward_flops"], 2.49, atol=0.01)


@pytest.mark.parametrize(("name", "model"), [("v5e:4x8", 8), ("v5e:4x8", 4), ("v5e:2x2", 2)])
def test_devices_that_share_a_model_are_neighbours_on_a_tpu(name, model):
    pytest.importorskip("libtpu", reason="the TPU's compiler is not installed (pip install libtpu)")
    found, _ = plan.find_devices(chips.parse_topology(name))
    for row in sharding.make_mesh(model, found).devices:
        places = np.array([device.coords for device in row])
        assert (np.abs(np.diff(places, axis=0)).sum(axis=1) == 1).all()


@pytest.mark.parametrize("name", ["v3:2x2", "v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_the_compiler_has_as_many_devices_as_jax_will(name):
    pytest.importorskip("libtpu", reason="the TPU's compiler is not installed (pip install libtpu)")
    topology = chips.parse_topology(name)
    devices, _ = plan.find_devices(topology)
    assert len(devices) == topology.devices


def test_a_tpu_is_planned_for_by_its_own_compiler(capsys, tmp_path):
    pytest.importorskip("libtpu", reason="the TPU's compiler is not installed (pip install libtpu)")
    path = tmp_path / "plan.json"
    assert cli.main(["plan", *SMALL, "--topology=v5e:2x2", f"--json={path}"]) == 0
    assert "the TPU's own compiler" in capsys.readouterr().out
    found = json.loads(path.read_text())
    assert found["collectives"]["all-reduce"]
    assert not found["gathers_a_weight"]
    assert found["donates"]
    assert found["fits"]
