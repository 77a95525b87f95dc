"""Prompt tuning inside upstream T5X: its network with a prompt, our optimiser and prompt files.

`gin/t5x/*.gin` binds what is here; `inputs.py` says what a run starts from. T5X is not on the
package index and stays unmodified: see docs/t5x.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.core import unfreeze
from flax.linen.partitioning import param_with_axes
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int

try:
    from t5x import decoding, optimizers
    from t5x.examples.t5 import layers, network
except ImportError as error:
    raise ImportError(
        f"upstream T5X cannot be imported ({error}). It is not on the package index: docs/t5x.md "
        "says how to install it. The embedded engine (--engine=embedded) does without it."
    ) from error

from prompt_tuning.checkpoints.identity import backbone_identity
from prompt_tuning.checkpoints.t5x_prompt import SCOPE, is_prompt_leaf
from prompt_tuning.config import BEAM, Decoding, Experiment
from prompt_tuning.methods.table import find_method
from prompt_tuning.model.prompt import Prompt, prepend_prompt
from prompt_tuning.prompts.prompt_file import save_prompt
from prompt_tuning.training import optim
from prompt_tuning.upstream.inputs import (
    StartingPrompt,
    absolute_path,
    describe_prompt,
    start_step,
    starting_prompt,
)


def choose_decoder(num_decodes: int, settings: Decoding = BEAM) -> Callable[..., Any]:
    """T5X's search with the embedded engine's results: greedy, beam search, or sampling.

    (T5X's own default for one decode is a beam of one, which may continue after an end-of-sequence.
    Scores are log probabilities of the model, not of the rescaled ones, which are all 0.)
    """
    if settings.method == "sample":
        return functools.partial(_sample, settings=settings)
    if num_decodes > 1:
        return functools.partial(decoding.beam_search, alpha=settings.alpha)
    return functools.partial(decoding.temperature_sample, temperature=0.0, rescale_log_probs=False)


def _sample(
    *args: Any, settings: Decoding, decode_rng: Array | None = None, **kwargs: Any
) -> tuple[Array, Array]:
    """T5X's sampling; its infer hands over a key for each batch, its eval none."""
    key = jax.random.PRNGKey(0) if decode_rng is None else decode_rng
    return decoding.temperature_sample(
        *args,
        decode_rng=jax.random.fold_in(key, settings.seed),
        temperature=settings.temperature,
        topk=settings.topk,
        topp=settings.topp,
        rescale_log_probs=settings.rescale_log_probs,
        **kwargs,
    )


class MethodParameters(nn.Module):
    """The parameters of a prompt method, float32. Their axes have no names: T5X replicates them."""

    first: Mapping[str, Any]  # their first values, nested as in T5X's tree

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        """The parameters, nested as `first`."""
        return {
            name: MethodParameters(value, name=name)()
            if isinstance(value, Mapping)
            else param_with_axes(
                name, lambda key, value=value: jnp.asarray(value), axes=(None,) * value.ndim
            )
            for name, value in self.first.items()
        }


class PromptedTransformer(network.Transformer):
    """T5X's Transformer with a prompt, float32[P, D], in front of its embedded encoder input.

    The encoder makes its attention mask, and the decoder its cross-attention mask, from the input
    tokens: both are given tokens with P dummies in front. No dummy is ever embedded. The method's
    parameters are folded once a call of `encode`: T5X calls it once a microbatch.
    """

    start: StartingPrompt

    def setup(self) -> None:
        """Adds the method's parameters to what T5X creates."""
        super().setup()
        if self.start.length:
            # As in the original implementation, whose parameter is encoder/prompt/prompt/prompt.
            scope = self.encoder.scope.push("prompt").push("prompt")
            first = unflatten_dict(dict(self.start.params), sep="/")
            self.method_params = MethodParameters(first, parent=scope)()

    def encode(
        self,
        encoder_input_tokens: Int[Array, "B T"],
        encoder_segment_ids: None = None,
        enable_dropout: bool = True,
    ) -> Float[Array, "B P+T D"]:
        """The encoder's output for prompt and tokens."""
        if encoder_segment_ids is not None:
            raise ValueError("packed rows would share one prompt: set DatasetConfig.pack = False.")
        length = self.start.length
        if not length:
            return super().encode(encoder_input_tokens, enable_dropout=enable_dropout)
        key = self.make_rng("dropout") if enable_dropout and self.has_rng("dropout") else None
        params = flatten_dict(unfreeze(self.method_params), sep="/")
        rows = self.start.fold(params, key)

        def prepend(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            """Runs in place of every submodule's method; changes the embedding's result alone."""
            if not isinstance(context.module, layers.Embed) or context.method_name != "__call__":
                return call(*args, **kwargs)
            tokens = args[0][:, length:]
            x, _ = prepend_prompt(rows, call(tokens, **kwargs), tokens > 0)
            return x

        with nn.intercept_methods(prepend):
            tokens = self._with_dummies(encoder_input_tokens)
            return super().encode(tokens, enable_dropout=enable_dropout)

    def decode(
        self, encoded: Array, encoder_input_tokens: Int[Array, "B T"], *args: Any, **kwargs: Any
    ) -> Array:
        """The logits; T5X hands over the tokens as they came, without the prompt."""
        return super().decode(encoded, self._with_dummies(encoder_input_tokens), *args, **kwargs)

    def _with_dummies(self, tokens: Int[Array, "B T"]) -> Int[Array, "B P+T"]:
        return jnp.pad(tokens, ((0, 0), (self.start.length, 0)), constant_values=1)


def make_optimizer(experiment: Experiment) -> optimizers.OptaxWrapper:
    """The project's masked optimiser: exactly zero updates, and no slots, for what is frozen."""
    # T5X partitions optimiser states by type and does not know optax's Adafactor: replicate it.
    optimizers.OptaxStatePartitionRules._RULES[optax.FactoredState] = lambda state, axes: (
        jax.tree.map(lambda _: None, state)
    )
    method = find_method(experiment.prompt.method)
    rules = optim.method_rules(experiment.train.trainable, method)
    start = start_step(experiment)
    return optimizers.OptaxWrapper(
        optim.make_optimizer(experiment.optimizer, rules, start_step=start)
    )


def make_learning_rate(experiment: Experiment) -> Callable[[Any], Any]:
    """The rate at T5X's step, for its log: what counts is inside the optimiser."""
    start = start_step(experiment)
    rate = optim.learning_rate(experiment.optimizer, start)
    return lambda step: rate(step - start) if callable(rate) else rate


def make_prompt_writer(experiment: Experiment) -> Callable[[Any, Any], tuple[Any, Any]]:
    """A `SaveCheckpointConfig.state_transformation_fns`: writes the prompt, changes nothing."""
    folder = Path(absolute_path(experiment.model_dir)) / "prompts"
    start = starting_prompt(experiment)
    fold = jax.jit(start.fold)

    def write(state: Any, infos: Any) -> tuple[Any, Any]:
        params: dict[Any, Any] = flatten_dict(state["target"], sep="/")
        leaves = {name: params.pop(name) for name in list(params) if is_prompt_leaf(name)}
        identity = backbone_identity(params)  # every process takes part where it is sharded
        if leaves and jax.process_index() == 0:
            step = int(np.asarray(state["state"]["step"]))
            metadata = describe_prompt(experiment, backbone=identity, init=start.init, step=step)
            rows = fold({n.removeprefix(SCOPE): np.asarray(v) for n, v in leaves.items()})
            save_prompt(folder / f"step_{step:06d}", Prompt(jax.device_get(rows)), metadata)
        return state, infos

    return write
