"""Tiny random models of every family, made and run by transformers: golden/make_hf_outputs.py
stores them and what they compute, test_huggingface compares alive where torch is installed.

transformers 5 ties the embedding and the output of every T5 it makes (the files of the released
T5 1.1 come untied), so the output gets a matrix of its own here.
"""

import torch
import transformers

VOCABULARY, INPUTS, TARGETS = 61, 21, 11
SMALL = dict(d_model=12, d_kv=5, d_ff=14, num_heads=2, vocab_size=VOCABULARY)
FAMILIES = {
    "t5_1_0": dict(num_layers=2, num_decoder_layers=2, feed_forward_proj="relu"),
    "t5_1_1": dict(num_layers=2, num_decoder_layers=1, feed_forward_proj="gated-gelu"),
    "flan_t5": dict(num_layers=1, num_decoder_layers=2, feed_forward_proj="gated-gelu"),
    "mt5": dict(num_layers=1, num_decoder_layers=1, feed_forward_proj="gated-gelu"),
    "byt5": dict(num_layers=3, num_decoder_layers=1, feed_forward_proj="gated-gelu"),
}


def make_model(family, seed=0, **changes):
    """A random model in which no part is too faint to be noticed."""
    torch.manual_seed(seed)
    config_class = transformers.MT5Config if family == "mt5" else transformers.T5Config
    model_class = getattr(transformers, f"{config_class.__name__[:-6]}ForConditionalGeneration")
    tied = family == "t5_1_0"
    settings = {**SMALL, **FAMILIES[family], "tie_word_embeddings": tied, **changes}
    model = model_class(config_class(**settings, decoder_start_token_id=0))
    if not tied:
        shape = model.shared.weight.shape
        model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn(shape))
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "layer_norm" in name:
                param.copy_(1 + 0.3 * torch.randn_like(param))
            elif "relative" in name:
                param.copy_(torch.randn_like(param))
            elif name not in ("shared.weight", "lm_head.weight"):
                param.copy_(torch.randn_like(param) * param.shape[1] ** -0.5)
        (model.shared if tied else model.lm_head).weight[1] *= 3  # some outputs are to end
    return model.eval()


def make_tokens(rng, rows=4, vocabulary=VOCABULARY):
    """Rows of different lengths that end with 1, and decoder inputs that begin with 0."""
    inputs = rng.integers(3, vocabulary, (rows, INPUTS))
    lengths = [INPUTS - 3 * row for row in range(rows)]
    for row, length in enumerate(lengths):
        inputs[row, length - 1] = 1
        inputs[row, length:] = 0
    targets = rng.integers(3, vocabulary, (rows, TARGETS))
    targets[:, 0] = 0
    return inputs, targets


@torch.no_grad()
def run(model, inputs, targets):
    """float32 logits, greedy outputs, and beam outputs with their scores."""
    model = model.float()
    tokens, mask = torch.tensor(inputs), torch.tensor(inputs > 0).long()
    logits = model(input_ids=tokens, attention_mask=mask, decoder_input_ids=torch.tensor(targets))
    # Without its cache, which is too small for a decoder that is deeper than the encoder.
    limits = {"max_new_tokens": TARGETS, "do_sample": False, "use_cache": False}
    greedy = model.generate(input_ids=tokens, attention_mask=mask, **limits)
    beams = model.generate(
        input_ids=tokens,
        attention_mask=mask,
        num_beams=3,
        early_stopping=False,
        output_scores=True,
        return_dict_in_generate=True,
        **limits,
    )
    return {
        "logits": logits.logits.numpy(),
        "greedy": _pad(greedy[:, 1:]),
        "beams": _pad(beams.sequences[:, 1:]),
        "beam_scores": beams.sequences_scores.numpy(),
    }


def _pad(tokens):
    """Zeros behind the first end-of-sequence, where transformers repeats that at times."""
    tokens = torch.nn.functional.pad(tokens, (0, TARGETS - tokens.shape[1]))
    ended = (tokens == 1).cumsum(1) - (tokens == 1).long() > 0
    return tokens.masked_fill(ended, 0).numpy()
