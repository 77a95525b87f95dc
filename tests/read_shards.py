"""Reads a checkpoint as one of several processes and holds its shards against the whole array.

python read_shards.py COORDINATOR PROCESSES INDEX CHECKPOINT WHOLE.npy
"""

import sys

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from prompt_tuning.checkpoints.t5x import read_t5x


def main() -> None:
    coordinator, processes, index, path, whole = sys.argv[1:]
    jax.distributed.initialize(coordinator, int(processes), int(index))
    wanted = np.load(whole)
    mesh = jax.make_mesh((1, 8), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    places = {"a/kernel": NamedSharding(mesh, PartitionSpec(None, "model"))}
    shapes = {"a/kernel": jax.ShapeDtypeStruct(wanted.shape, wanted.dtype)}
    read, _ = read_t5x(path, shapes, shardings=places)
    for shard in read["a/kernel"].addressable_shards:
        np.testing.assert_array_equal(shard.data, wanted[shard.index])
    print(len(read["a/kernel"].addressable_shards), "shards")


if __name__ == "__main__":
    main()
