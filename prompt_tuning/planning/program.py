"""The training step of a run, lowered from shapes alone: it needs no weights, rows or devices.

`plan.py` compiles it; `devices.py` uses its shapes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from prompt_tuning.config import Experiment
from prompt_tuning.methods.table import find_method, trace_method
from prompt_tuning.model import sharding, t5
from prompt_tuning.model.device import choose_device
from prompt_tuning.model.prompt import Prompt, no_prompt
from prompt_tuning.pretraining.examples import make_shape
from prompt_tuning.training import optim
from prompt_tuning.training import step as steps

Struct = jax.ShapeDtypeStruct


class Shapes(NamedTuple):
    """Rows, input tokens and target tokens of a batch."""

    rows: int
    inputs: int
    targets: int


def abstract_batch(
    shapes: Shapes, mesh: Mesh, *, packed: bool = False, members: bool = False
) -> dict[str, Struct]:
    """The shapes of T5X's four arrays, and those of packed rows, sharded by row over 'data'.

    If the prompt has members, the numbers of the rows' members, `which`, are among them.
    """
    where = NamedSharding(mesh, PartitionSpec("data"))
    widths = {
        "encoder_input_tokens": (shapes.inputs, jnp.int32),
        "decoder_input_tokens": (shapes.targets, jnp.int32),
        "decoder_target_tokens": (shapes.targets, jnp.int32),
        "decoder_loss_weights": (shapes.targets, jnp.float32),
    }
    if packed:
        widths["encoder_segment_ids"] = (shapes.inputs, jnp.int32)
        widths["decoder_segment_ids"] = (shapes.targets, jnp.int32)
    batch = {
        name: Struct((shapes.rows, width), dtype, sharding=where)
        for name, (width, dtype) in widths.items()
    }
    return batch | ({"which": Struct((shapes.rows,), jnp.int32, sharding=where)} if members else {})


def abstract_params(experiment: Experiment, mesh: Mesh) -> dict[str, Any]:
    """The shape, dtype and sharding of every parameter, including the prompt's."""
    model, tunes_model = experiment.model, experiment.train.trainable == "model"
    dtype = jnp.dtype("float32" if tunes_model else model.dtype)
    shapes = t5.param_shapes(model)
    places = sharding.param_shardings(shapes, mesh)
    params = {n: Struct(s.shape, dtype, sharding=places[n]) for n, s in shapes.items()}
    prompt = param_shapes_of_prompt(experiment)
    return {**params, **place_everywhere(prompt, sharding.replicated(mesh))}


def param_shapes_of_prompt(experiment: Experiment) -> dict[str, Struct]:
    """The shapes of the prompt method's parameters."""
    model = experiment.model
    if experiment.train.trainable == "model":
        return {"prompt": Struct((0, model.embed_dim), jnp.float32)}
    params, _ = trace_method(experiment.prompt, model, _find_members(experiment))
    return {name: Struct(value.shape, value.dtype) for name, value in params.items()}


def prompt_shapes(experiment: Experiment) -> Prompt:
    """The shapes of the folded prompt."""
    if experiment.train.trainable == "model":
        return no_prompt(experiment.model)
    return trace_method(experiment.prompt, experiment.model, _find_members(experiment))[1]


def _find_members(experiment: Experiment) -> tuple[str, ...]:
    """The tasks with a rate above 0. One may lack TRAIN_SPLIT: to know it may need its data."""
    if not find_method(experiment.prompt.method).members:
        return ()
    from prompt_tuning.tasks import registry, task_rows  # these import TensorFlow

    task_rows.register_tasks(experiment.data)
    tasks = registry.component_tasks(experiment.data.names[0])
    return tuple(sorted(task for task, rate in tasks if rate > 0))


def _recipe(experiment: Experiment, model: t5.T5) -> steps.Recipe:
    return steps.make_recipe(model, experiment.prompt, experiment.optimizer, experiment.train)


def abstract_state(experiment: Experiment, mesh: Mesh) -> tuple[Any, dict[str, Any]]:
    """The shapes of the `TrainState`, and those of the frozen parameters."""
    rules = optim.RULES[experiment.train.trainable]
    trainable, frozen = optim.split_params(abstract_params(experiment, mesh), rules)
    recipe = _recipe(experiment, t5.T5(experiment.model))
    names = steps.averaged_names(recipe, trainable)
    state = jax.eval_shape(
        lambda t: steps.init_state(t, recipe.optimizer, 0, averaged=names), trainable
    )
    return _place(state, trainable, mesh), frozen


def lower_step(
    experiment: Experiment, mesh: Mesh, shapes: Shapes | None = None, *, platform: str = ""
) -> Any:
    """`trace_step`, lowered for the devices of the mesh; `.compile()` compiles it."""
    return trace_step(experiment, mesh, shapes, platform=platform).lower()


def trace_step(
    experiment: Experiment, mesh: Mesh, shapes: Shapes | None = None, *, platform: str = ""
) -> Any:
    """The traced training step of an experiment for a mesh.

    `platform` must be given if the devices of the mesh represent those of another platform.
    Without `shapes` the result is the largest program of the run: the whole batch at full length
    or, with MICROBATCHES, one part of it.
    """
    state, frozen = abstract_state(experiment, mesh)
    partitions = mesh.shape["model"]
    device = choose_device(experiment.model, mesh.devices.flat, platform, partitions=partitions)
    model = t5.T5(experiment.model, device)
    recipe = _recipe(experiment, model)
    programs = steps.compile_step(recipe, state)
    parts = experiment.train.microbatches
    packed = experiment.corpus.objective != "task" and experiment.corpus.pack
    batch = abstract_batch(
        shapes or largest_shapes(experiment), mesh, packed=packed, members=recipe.method.members
    )
    if parts == 1:
        return programs.whole.trace(state, frozen, batch)
    everywhere = sharding.replicated(mesh)
    folded = place_everywhere(jax.eval_shape(programs.fold, state, frozen), everywhere)
    total: Any = jax.eval_shape(programs.zeros, state, folded)
    total = place_everywhere(total, everywhere)._replace(
        backbone={
            name: Struct(leaf.shape, leaf.dtype, sharding=state.trainable[name].sharding)
            for name, leaf in total.backbone.items()
        }
    )
    return programs.add.trace(total, folded, state, frozen, batch, Struct((), jnp.int32))


def place_everywhere(tree: Any, everywhere: NamedSharding) -> Any:
    """The same shapes, replicated."""
    return jax.tree.map(lambda x: Struct(x.shape, x.dtype, sharding=everywhere), tree)


def largest_shapes(experiment: Experiment) -> Shapes:
    """The largest shapes of a batch or microbatch of the run."""
    rows = experiment.data.batch_size // experiment.train.microbatches
    lengths = dict(experiment.data.task_feature_lengths)
    if experiment.corpus.objective != "task":  # the targets' length may follow from the inputs'
        shape = make_shape(experiment.corpus, lengths, experiment.model.num_embeddings)
        return Shapes(rows, shape.inputs, shape.targets)
    return Shapes(rows, lengths["inputs"], lengths["targets"])


def _place(state: Any, trainable: dict[str, Any], mesh: Mesh) -> Any:
    """The state with shardings: a slot has its parameter's; all other leaves are replicated."""
    everywhere = sharding.replicated(mesh)

    def place(path: tuple[Any, ...], leaf: Any) -> Struct:
        where = everywhere
        for key in path:
            owner = trainable.get(getattr(key, "key", ""))
            if owner is not None and owner.shape == leaf.shape:
                where = owner.sharding
        return Struct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree_util.tree_map_with_path(place, state)
