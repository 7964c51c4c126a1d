"""Train a small tokenizer like the published one: byte-level BPE with GPT-NeoX's and OLMo's special tokens.

python examples/instellavl/demo/tokenizer.py --annotations runs/demo/data/questions.json … --output runs/demo/tokenizer
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import normalizers

from megatron_vlm.data.processing.tokenizer_training import save_tokenizer, train_tokenizer

END_OF_TEXT, PADDING = "<|endoftext|>", "<|padding|>"
# OLMo's placeholders for data removed from its training text. The last one also ends every turn.
PLACEHOLDERS = ("|||EMAIL_ADDRESS|||", "|||PHONE_NUMBER|||", "|||IP_ADDRESS|||")
END_OF_SEQUENCE = PLACEHOLDERS[-1]
ROLES = "<|user|>\n<|assistant|>\n"  # plain text to the published tokenizer, and to this one
MAX_VOCAB_SIZE = 512


def texts(annotations: list[Path]) -> Iterator[str]:
    """Yield the text that training tokenizes: roles, questions and answers."""
    for path in annotations:
        for entry in json.loads(path.read_text(encoding="utf-8")):
            for message in entry["conversations"]:
                yield ROLES + message["value"].removeprefix("<image>")


def train(corpus: Iterator[str]) -> Any:
    """Train on `corpus`; `<|endoftext|>` has id 0, `<|padding|>` 1, `|||IP_ADDRESS|||` the last id."""
    return train_tokenizer(
        corpus, MAX_VOCAB_SIZE, first=[END_OF_TEXT, PADDING], last=PLACEHOLDERS, normalizer=normalizers.NFC()
    )


def save(tokenizer: Any, folder: Path) -> None:
    """Write a folder for `AutoTokenizer.from_pretrained`."""
    save_tokenizer(tokenizer, folder, eos=END_OF_SEQUENCE, pad=PADDING, clean_up_tokenization_spaces=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", type=Path, nargs="+", required=True, metavar="FILE", help="training text")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="output folder")
    options = parser.parse_args()
    tokenizer = train(texts(options.annotations))
    save(tokenizer, options.output)
    print(f"{tokenizer.get_vocab_size()} tokens -> {options.output}")


if __name__ == "__main__":
    main()
