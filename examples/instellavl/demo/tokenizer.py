"""Train a small tokenizer like the published one: byte-level BPE with GPT-NeoX's and OLMo's special tokens.

python examples/instellavl/demo/tokenizer.py --annotations runs/demo/data/questions.json … --output runs/demo/tokenizer
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

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


def train(corpus: Iterator[str]) -> Tokenizer:
    """Train on `corpus`; `<|endoftext|>` has id 0, `<|padding|>` 1, `|||IP_ADDRESS|||` the last id."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCAB_SIZE - len(PLACEHOLDERS),
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=True) for text in PLACEHOLDERS])
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a folder for `AutoTokenizer.from_pretrained`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_SEQUENCE,
        "pad_token": PADDING,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


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
