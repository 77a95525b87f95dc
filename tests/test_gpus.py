"""GPUs: planned for by their own compiler, and held to the plan where there is one."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import hlo_text
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_plan import experiment
from test_step import prompt_gradient
from tiny_models import CONFIG, fit_to

from prompt_tuning.api import model_config
from prompt_tuning.config import ConfigError, PromptConfig
from prompt_tuning.model import attention, sharding
from prompt_tuning.planning import chips, gpus, plan, program


@pytest.fixture
def gpu_compiler():
    if not gpus.has_compiler():
        pytest.skip("the GPU's compiler is not installed (pip install 'jax[cuda12]')")


@pytest.mark.parametrize("name", gpus.GPUS)
def test_a_gpu_is_planned_for_by_its_own_compiler(name, gpu_compiler):
    found = plan.make_plan(experiment(CONFIG), chips.parse_topology(f"{name}:4"))
    assert "the GPU's own compiler" in found.compiler
    assert not found.overstates_memory
    assert not found.gathers_a_weight
    assert found.donates
    assert found.fits
    assert found.collectives["all-reduce"] > 0


def test_gpus_over_hosts_are_devices_of_both(gpu_compiler):
    devices, _ = plan.find_devices(chips.parse_topology("h100:16"))
    assert [device.process_index for device in devices] == [0] * 8 + [1] * 8


def test_a_gpu_keeps_two_bytes_of_a_weight_of_attention(gpu_compiler):
    """And copies none to a size it can multiply, though 15 + 485 is no multiple of 8."""
    rows, length = 8, 504
    devices, _ = plan.find_devices(chips.parse_topology("h100:1"))
    used = {}
    for layers in (3, 6):
        model = dataclasses.replace(CONFIG, dtype="bfloat16", num_encoder_layers=layers)
        settings = experiment(model, partitions=1, rows=rows, inputs=485)
        settings = dataclasses.replace(settings, prompt=PromptConfig(length=15))
        lowered = program.lower_step(settings, sharding.make_mesh(1, devices))
        compiled = lowered.compile(gpus.OPTIONS)
        used[layers] = compiled.memory_analysis().temp_size_in_bytes
        text = compiled.as_text()
        sizes = {i.shape[-2:] for i in hlo_text.instructions(text[text.index("\nENTRY") :])}
        assert (length, length) in sizes
        assert (500, 500) not in sizes
    of_a_layer = (used[6] - used[3]) / 3
    assert of_a_layer < 1.5 * 2 * rows * CONFIG.num_heads * length**2


def test_with_cudnn_no_weight_of_attention_is_kept(gpu_compiler):
    """On several GPUs too, with heads and rows split."""
    pytest.importorskip("nvidia.cudnn", reason="cuDNN is not installed (pip install 'jax[cuda12]')")
    used, topology = {}, chips.parse_topology("h100:4")
    for kind in ("xla", "cudnn"):
        model = dataclasses.replace(CONFIG, dtype="bfloat16", num_heads=8, attention=kind)
        settings = experiment(model, partitions=2, rows=8, inputs=485)
        settings = dataclasses.replace(settings, prompt=PromptConfig(length=15))
        mesh = sharding.make_mesh(2, plan.find_devices(topology)[0])
        compiled = program.lower_step(settings, mesh).compile(gpus.OPTIONS)
        used[kind] = compiled.memory_analysis().temp_size_in_bytes
        calls = [line for line in compiled.as_text().splitlines() if "__cudnn$fmha" in line]
        assert len(calls) == 2 * CONFIG.num_encoder_layers * (kind == "cudnn")
        assert all("bf16[4,4,504,8]" in line for line in calls)  # 504 = 500 filled up
        square = [
            i.shape for i in hlo_text.instructions(compiled.as_text()) if i.shape[-2:] == (504, 504)
        ]
        assert kind == "xla" or {shape[-3] for shape in square} == {
            4
        }  # of the bias: half of the heads
    assert used["cudnn"] < used["xla"] / 2


def test_a_gpu_before_ampere_has_no_cudnn_attention(gpu_compiler):
    config = dataclasses.replace(CONFIG, dtype="bfloat16", attention="cudnn")
    devices, _ = plan.find_devices(chips.parse_topology("t4:1"))
    with pytest.raises(ConfigError, match=r"Tesla T4 has 7\.5"):
        fit_to(config, devices)


@pytest.mark.skipif(gpus.has_compiler(), reason="the GPU's compiler is installed")
def test_without_cudnn_its_attention_says_how_to_get_it():
    heads = [jnp.ones((1, 8, 2, 8), jnp.bfloat16)] * 3
    with pytest.raises(ConfigError, match=r"pip install 'jax\[cuda12\]'"):
        attention.attend_to_lengths(*heads, jnp.ones((1, 2, 8, 8)), jnp.asarray([3]), "cudnn")


ON_A_GPU = pytest.mark.skipif(
    jax.default_backend() != "gpu",
    reason="no GPU is used: JAX_PLATFORMS=cuda,cpu python -m pytest tests/test_gpus.py",
)


@ON_A_GPU
@pytest.mark.parametrize("attention", ["xla", "cudnn"])
def test_on_a_gpu_bfloat16_moves_the_prompt_where_float32_does(attention):
    half, whole = prompt_gradient("bfloat16", attention), prompt_gradient("float32")
    assert half @ whole / np.linalg.norm(half) / np.linalg.norm(whole) > 0.999


@ON_A_GPU
@pytest.mark.parametrize("attention", ["xla", "cudnn"])
def test_a_gpu_needs_the_memory_that_was_planned(attention):
    """Of base, in a process of its own: a peak is the highest since a process began."""
    code = f"from test_gpus import print_memory\nprint_memory({attention!r})"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    planned, peak = map(int, done.stdout.split()[-2:])
    assert peak == pytest.approx(planned, rel=0.1)


def print_memory(attention):
    """What the plan says that a step needs, and the highest that was in use while it ran."""
    model = dataclasses.replace(model_config("base"), dtype="bfloat16", attention=attention)
    settings = experiment(model, partitions=1, rows=32, inputs=512)
    mesh = sharding.make_mesh(1, jax.devices()[:1])
    lowered = program.lower_step(settings, mesh)
    memory = lowered.compile(gpus.OPTIONS).memory_analysis()  # as `t5x plan` does
    step = lowered.compile()
    given = jax.tree.map(
        lambda one: jax.device_put(np.ones(one.shape, one.dtype), jax.devices()[0]),
        lowered.args_info[0],
    )
    for _ in range(3):
        state, metrics = step(*given)
        given = (state, *given[1:])
    jax.block_until_ready(metrics)
    stats = jax.devices()[0].memory_stats() or {"peak_bytes_in_use": 0}
    planned = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    print(planned, stats["peak_bytes_in_use"])


@ON_A_GPU
def test_cudnn_attends_as_xla_does():
    """Of its values and gradients the cosine to float32, and none that is not finite."""
    keys = jax.random.split(jax.random.key(0), 5)
    heads = [jax.random.normal(key, (4, 504, 8, 64)) / 3 for key in keys[:3]]
    bias, lengths = jax.random.normal(keys[3], (1, 8, 504, 504)), jnp.asarray([504, 100, 1, 377])
    weights = jax.random.normal(keys[4], (4, 504, 8, 64))

    def gradients(kernel, dtype):
        def total(*given):
            heads = [x.astype(dtype) for x in given[:3]]
            out = attention.attend_to_lengths(*heads, given[3], lengths, kernel)
            return (out * weights).sum(dtype=jnp.float32)

        return jax.jit(jax.value_and_grad(total, (0, 1, 2, 3)))(*heads, bias)

    (value, found), (same, wanted) = gradients("cudnn", "bfloat16"), gradients("xla", "float32")
    np.testing.assert_allclose(value, same, rtol=0.05)
    for one, other in zip(found, wanted, strict=True):
        one, other = np.asarray(one).ravel(), np.asarray(other).ravel()
        assert np.isfinite(one).all()
        assert one @ other / np.linalg.norm(one) / np.linalg.norm(other) > 0.999


def test_every_gpu_has_what_its_compiler_asks():
    assert set(gpus.GPUS) == {name for name, chip in chips.CHIPS.items() if chip.platform == "gpu"}
    text = gpus.target_config(chips.parse_topology("t4:1"))
    assert "cuda_compute_capability { major: 7 minor: 5 }" in text
    assert "shared_memory_per_block_optin: 65536" in text  # Turing has no KiB of its own
    text = gpus.target_config(chips.parse_topology("h200:8"))
    assert "core_count: 132" in text
    assert f"shared_memory_per_block_optin: {227 * 1024}" in text
    assert "device_memory_size: 141000000000" in text


@pytest.mark.skipif(gpus.has_compiler(), reason="the GPU's compiler is installed")
def test_without_its_compiler_a_plan_says_how_to_get_it():
    assert "pip install 'jax[cuda12]'" in plan.find_devices(chips.parse_topology("h100:8"))[1]
    assert "jax[cuda12]" not in plan.find_devices(chips.parse_topology("cpu:8"))[1]
    with pytest.raises(ConfigError, match="h100:8"):
        gpus.find_gpus(chips.parse_topology("h100:8"))
