"""Makes tokenizer_ids.json: what Hugging Face's tokenizers says to the bundled pieces.

The bundled pieces are written as a tokenizer.json (`tests/tokenizer_files.py`) and read by
transformers 5.24 with tokenizers 0.23.3:

    PYTHONPATH=.:tests python tests/golden/make_tokenizer_ids.py
"""

import json
import tempfile
from pathlib import Path

import transformers
from tokenizer_files import write_tokenizer_json

from prompt_tuning.world import assets

TEXTS = {
    "same": [
        "lovely soup. we loved the soup.",
        "  two  spaces ",
        "tab\tand\nnewline",
        "no\u00a0break\u3000wide\u200bzero",
        "\ufb01 \u00bd \u2460 \u212b",  # NFKC
        "e\u0301 na\u00efve",
        "\U0001f642 x\U0001f642\U0001f642y",
        "\x00a\x07b\x1fc\x0bd",
        "<extra_id_0>",
        "a <extra_id_0> b <extra_id_99>",
        "<extra_id_100>",
        "\u2581a b\u2581c",
        "\u0300",
        " ",
        "",
    ],
    # T5's ids are SentencePiece's, not these.
    "different": [
        "a</s>b",
        "<pad> a",
        "a<extra_id_0>b",
        "<extra_id_0><extra_id_1>",
        "a\u0085b",
    ],
}


def main() -> None:
    model = Path(assets.tiny_vocabulary()).read_bytes()
    with tempfile.TemporaryDirectory() as work:
        write_tokenizer_json(Path(work), model)
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=f"{work}/tokenizer.json")
    ids = {
        group: [[text, tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts]
        for group, texts in TEXTS.items()
    }
    file = Path(__file__).with_name("tokenizer_ids.json")
    lines = {group: ",\n  ".join(map(json.dumps, pairs)) for group, pairs in ids.items()}
    text = ",\n".join(f' "{group}": [\n  {body}\n ]' for group, body in lines.items())
    file.write_text(f"{{\n{text}\n}}\n")
    print(file.read_text())


if __name__ == "__main__":
    main()
