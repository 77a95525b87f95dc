"""The machine's peak of matrix products as JAX reaches it: what a step's share is taken of."""

import json
import sys
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp


def peak(dtype: str, sizes: Sequence[int], times: int = 5) -> float:
    """FLOP/s of the best of so many square products of each size."""
    best = 0.0
    # Sums in float32: XLA's CPU compiler has the processor's bfloat16 instructions for no others.
    for size in sizes:
        a = jnp.ones((size, size), dtype)
        jax.block_until_ready(_multiply(a, a))
        for _ in range(times):
            begin = time.perf_counter()
            jax.block_until_ready(_multiply(a, a))
            best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    return best


@jax.jit
def _multiply(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def main() -> None:
    """Prints it for sizes that fit the device."""
    sizes = (1024, 2048, 4096) if jax.default_backend() == "cpu" else (4096, 8192, 16384)
    print(json.dumps({"dtype": sys.argv[1], "flops_per_second": peak(sys.argv[1], sizes)}))


if __name__ == "__main__":
    main()
