"""GPUs that are not here, planned for by their own compiler."""

import dataclasses

import pytest
from test_plan import experiment
from tiny_models import CONFIG

from prompt_tuning.config import ConfigError, PromptConfig
from prompt_tuning.model import sharding
from prompt_tuning.planning import chips, gpus, hlo, plan, program


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
        sizes = {i.shape[-2:] for i in hlo.instructions(text[text.index("\nENTRY") :])}
        assert (length, length) in sizes
        assert (500, 500) not in sizes
    of_a_layer = (used[6] - used[3]) / 3
    assert of_a_layer < 1.5 * 2 * rows * CONFIG.num_heads * length**2


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
    with pytest.raises(ConfigError, match="h100:8: the GPU's compiler does not take it"):
        gpus.find_gpus(chips.parse_topology("h100:8"))
