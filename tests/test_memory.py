"""What a step frees stays with the process: the next step makes no page anew."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Temporaries of 128 MB: 32,000 pages.
STEPS = """
import resource, sys
from prompt_tuning.launch import memory
if sys.argv[1] == "keep" and not memory.keep_freed():
    sys.exit(77)
import jax, jax.numpy as jnp
x = jnp.ones((4096, 4096))
step = jax.jit(lambda x: jnp.sin(x @ x).T @ jnp.cos(x)[:, :8])
faults = []
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(step(x))
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""


def fewest_faults(how):
    done = subprocess.run(
        [sys.executable, "-c", STEPS, how],
        env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    if done.returncode == 77:
        pytest.skip("the C library is not glibc")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_step_makes_no_page_that_the_last_one_freed():
    assert fewest_faults("keep") < 1000
    assert fewest_faults("leave") > 10_000
