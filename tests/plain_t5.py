"""A T5 in NumPy and float64, one row at a time: what the model's answers are held to.

Attention is written out for any mask and any keys in front, without a trick of the model's.
"""

from typing import Any

import numpy as np
from tiny_models import CONFIG

from prompt_tuning.config import ModelConfig
from prompt_tuning.model.attention import relative_position_buckets

Layers = list[tuple[Any, Any]]  # of each layer, keys and values [J, H, K]


class PlainT5:
    def __init__(self, params: Any, config: ModelConfig = CONFIG) -> None:
        self.params = {name: np.asarray(value, np.float64) for name, value in params.items()}
        self.config = config

    def embed(self, tokens: Any) -> np.ndarray:
        return self.params["token_embedder/embedding"][np.asarray(tokens)]

    def norm(self, name: str, x: Any) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * self.params[f"{name}/scale"]

    def heads(self, name: str, x: Any) -> np.ndarray:
        return (x @ self.params[f"{name}/kernel"]).reshape(len(x), self.config.num_heads, -1)

    def bias(self, stack: str, places: Any, key_places: Any) -> np.ndarray:
        """By the distance of any two places, which are integers, negative ones among them."""
        reach = int(max(np.abs(places).max(), np.abs(key_places).max())) + 1
        table = relative_position_buckets(
            reach * 2,
            reach * 2,
            bidirectional=stack == "encoder",
            num_buckets=self.config.relative_attention_num_buckets,
            max_distance=self.config.relative_attention_max_distance,
        )
        buckets = table[np.asarray(places)[:, None] + reach, np.asarray(key_places)[None] + reach]
        return self.params[f"{stack}/relpos_bias/rel_embedding"][:, buckets]

    def attend(self, name: str, x: Any, keys_values: Any, bias: Any, seen: Any) -> np.ndarray:
        keys, values = keys_values
        logits = np.einsum("qhk,shk->hqs", self.heads(f"{name}/query", x), keys) + bias
        logits = np.where(seen, logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        read = np.einsum("hqs,shk->qhk", weights, values).reshape(len(x), -1)
        return read @ self.params[f"{name}/out/kernel"]

    def mlp(self, name: str, x: Any) -> np.ndarray:
        gate, value = (x @ self.params[f"{name}/wi_{n}/kernel"] for n in (0, 1))
        gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        return (gelu * value) @ self.params[f"{name}/wo/kernel"]

    def keys_values(self, name: str, y: Any, front: Any) -> tuple[np.ndarray, np.ndarray]:
        own = self.heads(f"{name}/key", y), self.heads(f"{name}/value", y)
        if front is None:
            return own
        return tuple(np.concatenate(pair) for pair in zip(front, own, strict=True))  # type: ignore

    def encode(self, x: Any, seen: Any, front: Layers | None = None) -> tuple[np.ndarray, Layers]:
        """The states of `x`, and the layers' own keys; `seen` is [S, J + S]."""
        before = 0 if front is None else len(front[0][0])
        places = np.arange(len(x))
        bias, own = self.bias("encoder", places, np.arange(-before, len(x))), []
        for n in range(self.config.num_encoder_layers):
            name = f"encoder/layers_{n}"
            y = self.norm(f"{name}/pre_attention_layer_norm", x)
            own.append(self.keys_values(f"{name}/attention", y, None))
            both = self.keys_values(f"{name}/attention", y, front and front[n])
            x = x + self.attend(f"{name}/attention", y, both, bias, seen)
            x = x + self.mlp(f"{name}/mlp", self.norm(f"{name}/pre_mlp_layer_norm", x))
        return self.norm("encoder/encoder_norm", x), own

    def decode(
        self, tokens: Any, encoded: Any, front: Layers | None = None, cross: Layers | None = None
    ) -> np.ndarray:
        """Logits [L, V], with keys in front of the targets' own and of the encoder's."""
        x, before = self.embed(tokens), 0 if front is None else len(front[0][0])
        bias = self.bias("decoder", np.arange(len(x)), np.arange(-before, len(x)))
        causal = np.arange(-before, len(x))[None] <= np.arange(len(x))[:, None]
        for n in range(self.config.num_decoder_layers):
            name = f"decoder/layers_{n}"
            y = self.norm(f"{name}/pre_self_attention_layer_norm", x)
            both = self.keys_values(f"{name}/self_attention", y, front and front[n])
            x = x + self.attend(f"{name}/self_attention", y, both, bias, causal)
            y = self.norm(f"{name}/pre_cross_attention_layer_norm", x)
            read = f"{name}/encoder_decoder_attention"
            both = self.keys_values(read, encoded, cross and cross[n])
            x = x + self.attend(read, y, both, 0.0, True)
            x = x + self.mlp(f"{name}/mlp", self.norm(f"{name}/pre_mlp_layer_norm", x))
        x = self.norm("decoder/decoder_norm", x)
        return x @ self.params["decoder/logits_dense/kernel"]
