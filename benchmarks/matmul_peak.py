"""The machine's peak of matrix products as JAX reaches it: what a step's share is taken of."""

import json
import sys
import time

import jax
import jax.numpy as jnp


def main() -> None:
    """Prints FLOP/s of the best of some square products."""
    dtype, best = sys.argv[1], 0.0
    # Sums in float32: XLA's CPU compiler has the processor's bfloat16 instructions for no others.
    multiply = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32))
    sizes = (1024, 2048, 4096) if jax.default_backend() == "cpu" else (4096, 8192, 16384)
    for size in sizes:
        a = jnp.ones((size, size), dtype)
        jax.block_until_ready(multiply(a, a))
        for _ in range(5):
            begin = time.perf_counter()
            jax.block_until_ready(multiply(a, a))
            best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    print(json.dumps({"dtype": dtype, "flops_per_second": best}))


if __name__ == "__main__":
    main()
