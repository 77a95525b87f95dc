"""The bundled backbone as transformers' T5, with PEFT's prompt tuning around it.

`tests/test_peft.py` compares live with it, where torch, transformers and peft are installed;
`make_peft_outputs.py` stores what it computes for where they are not.
"""

import numpy as np
import peft
import torch
import transformers

from prompt_tuning.checkpoints.t5x import read_param, read_shapes
from prompt_tuning.world import assets

P = 6  # rows of the prompts
TEXTS = ("lovely soup. we loved the soup.", "the bus was late.", "so dull")
TARGETS = ("positive", "negative", "not so")
NEW_TOKENS = 8
_LAYER = {
    "self_attention": (0, "SelfAttention"),
    "attention": (0, "SelfAttention"),
    "encoder_decoder_attention": (1, "EncDecAttention"),
}
_NORM = {"pre_attention_layer_norm": 0, "pre_self_attention_layer_norm": 0}
_NORM |= {"pre_cross_attention_layer_norm": 1}


def make_t5() -> transformers.T5ForConditionalGeneration:
    """transformers' T5 with the bundled weights."""
    sizes = assets.TINY_CONFIG
    config = transformers.T5Config(
        vocab_size=sizes.num_embeddings,
        d_model=sizes.embed_dim,
        d_kv=sizes.head_dim,
        d_ff=sizes.mlp_dim,
        num_layers=sizes.num_encoder_layers,
        num_decoder_layers=sizes.num_decoder_layers,
        num_heads=sizes.num_heads,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    config.tie_word_embeddings = False  # transformers 5 sets it to true, whatever it was given
    model = transformers.T5ForConditionalGeneration(config).eval()
    checkpoint = assets.tiny_checkpoint()
    state = {}
    for name in read_shapes(checkpoint):
        array = torch.tensor(np.asarray(read_param(checkpoint, name), np.float32))
        state[_theirs(name)] = array.T if name.endswith("kernel") else array
    relative = [name for name in state if name.endswith("relative_attention_bias.weight")]
    state |= {name: state[name].T for name in relative}
    shared = state.pop("shared.weight")
    state |= dict.fromkeys(
        ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"), shared
    )
    model.load_state_dict(state)
    return model


def _theirs(name: str) -> str:
    """transformers' name of a parameter."""
    stack, *rest = name.split("/")
    if stack == "token_embedder":
        return "shared.weight"
    if rest[0] == "logits_dense":
        return "lm_head.weight"
    if rest[0] == "relpos_bias":
        return f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    if rest[0].endswith("_norm"):
        return f"{stack}.final_layer_norm.weight"
    block, last = f"{stack}.block.{rest[0].removeprefix('layers_')}.layer", 1 + (stack == "decoder")
    if rest[1] == "pre_mlp_layer_norm":
        return f"{block}.{last}.layer_norm.weight"
    if rest[1] in _NORM:
        return f"{block}.{_NORM[rest[1]]}.layer_norm.weight"
    if rest[1] == "mlp":
        return f"{block}.{last}.DenseReluDense.{rest[2]}.weight"
    number, module = _LAYER[rest[1]]
    letter = {"query": "q", "key": "k", "value": "v", "out": "o"}[rest[2]]
    return f"{block}.{number}.{module}.{letter}.weight"


def outputs(
    model: peft.PeftModel, inputs: np.ndarray, targets: np.ndarray, task: int | None = None
) -> dict[str, np.ndarray]:
    """Logits of the targets, and what greedy decoding says."""
    tokens = torch.tensor(inputs)
    given = {"input_ids": tokens, "attention_mask": (tokens > 0).long()}
    if task is not None:
        given["task_ids"] = torch.full((len(inputs),), task)
    limits = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    with torch.no_grad():
        logits = model(**given, labels=torch.tensor(targets)).logits
        greedy = model.generate(**given, **limits, num_beams=1)
    return {"logits": logits.numpy(), "greedy": greedy[:, 1:].numpy()}


def tune(
    model: peft.PeftModel,
    inputs: np.ndarray,
    targets: np.ndarray,
    steps: int = 5,
    task: int | None = None,
) -> None:
    """A few steps of Adam on the prompt, as PEFT's users take them."""
    tokens = torch.tensor(inputs)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=1.0)
    for _ in range(steps):
        optimizer.zero_grad()
        given = {"input_ids": tokens, "attention_mask": (tokens > 0).long()}
        if task is not None:
            given["task_ids"] = torch.full((len(inputs),), task)
        model(**given, labels=torch.tensor(targets)).loss.backward()
        optimizer.step()


def new_adapter(seed: int = 0, config: str = "PromptTuningConfig", **settings) -> peft.PeftModel:
    """The model with a new prompt; prompt tuning has by PEFT's own defaults 2 P rows."""
    torch.manual_seed(seed)
    make = getattr(peft, config)
    made = make(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P, **settings)
    return peft.get_peft_model(make_t5(), made)


def greedy(model: peft.PeftModel, inputs: np.ndarray) -> np.ndarray:
    """Greedy decoding by the model's forward pass, without its cache."""
    tokens, decoded = torch.tensor(inputs), torch.zeros((len(inputs), 1), dtype=torch.long)
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            logits = model(
                input_ids=tokens, attention_mask=(tokens > 0).long(), decoder_input_ids=decoded
            ).logits
        decoded = torch.cat([decoded, logits[:, -1:].argmax(-1)], dim=1)
    said = decoded[:, 1:].numpy()
    ended = (said == 1).cumsum(axis=1) - (said == 1) > 0
    return np.where(ended, 0, said)
