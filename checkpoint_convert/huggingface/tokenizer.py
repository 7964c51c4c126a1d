"""Tokenizers: an exported one has a token `<image>`, that of a Megatron checkpoint has not.

In training the loader inserts image_token_index itself, and no text encodes to that id. Stock processors need a token
for images, so the exported tokenizer has one more: `<image>`, with image_token_index as its id.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from checkpoint_convert.errors import ConversionError
from checkpoint_convert.huggingface.sentencepiece import tokenizer_json_of
from megatron_vlm.config import ModelConfig
from megatron_vlm.data.errors import DataError
from megatron_vlm.data.processing.tokenizer import (
    PLACEHOLDERS,
    HuggingFaceTokenizer,
    Tokenizer,
    load_tokenizer,
    without_placeholders,
)

IMAGE_TOKEN = PLACEHOLDERS[0]
_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)


def import_tokenizer(source: Path, folder: Path) -> Tokenizer:
    """Copy the tokenizer at `source` (a Hugging Face folder, or a sentencepiece file) into the new `folder`.

    An `<image>` token that an export added as the last one is removed, and a `<video>` token after it.

    Raises:
        ConversionError: no tokenizer, or one that cannot be used.
    """
    folder.mkdir()
    if source.is_file():
        shutil.copy(source, folder)
    elif (source / "tokenizer.json").is_file():
        for name in _COPIED:
            if (source / name).is_file():
                shutil.copy(source / name, folder)
        definition = folder / "tokenizer.json"
        try:
            definition.write_bytes(without_placeholders(definition.read_bytes()))
        except (ValueError, AttributeError) as error:
            raise ConversionError(f"{source / 'tokenizer.json'} is not a tokenizer: {error}") from error
    elif len(models := sorted(source.glob("*.model"))) == 1:
        shutil.copy(models[0], folder)
    else:
        raise ConversionError(
            f"{source} holds no tokenizer (tokenizer.json or one sentencepiece .model): give one with --tokenizer"
        )
    try:
        return load_tokenizer(folder)
    except DataError as error:
        raise ConversionError(f"the tokenizer of {source} cannot be used: {error}") from error


def check_image_token(tokenizer: Tokenizer, model: ModelConfig, source: str) -> None:
    """Raise ConversionError unless image_token_index is the tokenizer's next id and the embedding has a row for it."""
    index, length, rows = model.image_token_index, len(tokenizer), model.language.vocab_size
    if index in tokenizer.placeholder_ids:
        return
    if length >= rows:
        raise ConversionError(
            f"the tokenizer has {length} tokens and the embedding of {source} {rows} rows: none is left for the image "
            "token. Is it this model's tokenizer? If so, pad the embedding to a multiple of 128 above that "
            "(transformers' resize_token_embeddings)"
        )
    if index != length:
        raise ConversionError(
            f"image_token_index of {source} is {index}, but its tokenizer has {length} tokens, so {IMAGE_TOKEN} would "
            f"get id {length}. Train with model.image_token_index = {length}, or give the tokenizer of the training"
        )


def export_tokenizer(
    tokenizer: Tokenizer,
    model: ModelConfig,
    folder: Path,
    processor_class: str = "LlavaNextProcessor",
    image_token: bool = True,
) -> None:
    """Write tokenizer.json, with `<image>` added if `image_token`, and tokenizer_config.json into `folder`."""
    check_image_token(tokenizer, model, "this checkpoint")
    if isinstance(tokenizer, HuggingFaceTokenizer):
        definition = json.loads(tokenizer.definition)
    else:
        definition = tokenizer_json_of(tokenizer)
    if image_token and not tokenizer.placeholder_ids:
        definition["added_tokens"].append(
            {
                "id": model.image_token_index,
                "content": IMAGE_TOKEN,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        )
    fast = FastTokenizer.from_str(json.dumps(definition))
    if fast.encode("").ids:
        definition["post_processor"] = None  # it would add tokens to a complete prompt
    _write(folder / "tokenizer.json", definition)
    eos, pad = (fast.id_to_token(number) for number in (tokenizer.eos_id, tokenizer.pad_id))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": processor_class,
        "eos_token": eos,
        "pad_token": pad,
        "model_max_length": model.language.max_position_embeddings,
        "padding_side": "left",  # for generation, the prompts of a batch must end together
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # transformers 4 adds token types, which OLMo rejects
    }
    if tokenizer.chat_template is not None:  # it may name more of them, such as bos_token
        config = {**tokenizer.chat_template.special_tokens, **config}
    _write(folder / "tokenizer_config.json", config)


def _write(file: Path, content: dict[str, Any]) -> None:
    # As the tokenizers library writes it: adding a token and removing it again gives the same bytes.
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
