"""Helpers of the published scripts: prompts to ids, images to tensors, and when generation stops."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import torch
from PIL import Image
from transformers import StoppingCriteria

from .constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX


def process_images(
    images: Sequence[Image.Image], image_processor: Any, model_cfg: Any
) -> torch.Tensor | list[torch.Tensor]:
    """Tiles of each image, as in training: a tensor [n, t, 3, P, P] if all images have t, else a list of n tensors.

    `model_cfg` is not used: the image processor has the settings of its model.
    """
    tiles = [image_processor.tiles(image) for image in images]
    return torch.stack(tiles) if len({len(tile) for tile in tiles}) == 1 else tiles


def tokenizer_image_token(
    prompt: str,
    tokenizer: Any,
    image_token_index: int = IMAGE_TOKEN_INDEX,
    return_tensors: str | None = None,
) -> list[int] | torch.Tensor:
    """Ids of a prompt, with `image_token_index` for `<image>`; the spans between are tokenized separately.

    No special tokens are added to a span. Special tokens in the prompt are recognised, because it starts with one; for
    untrusted text use `InstellaVLProcessor.encode`, which does not.

    Returns:
        A list, or [L] int64 with return_tensors="pt".

    Raises:
        ValueError: return_tensors has another value.
    """
    ids: list[int] = []
    for number, span in enumerate(prompt.split(DEFAULT_IMAGE_TOKEN)):
        if number:
            ids.append(image_token_index)
        ids += tokenizer(span, add_special_tokens=False).input_ids if span else []
    if return_tensors is None:
        return ids
    if return_tensors != "pt":
        raise ValueError(f"return_tensors is {return_tensors!r}; supported: None and 'pt'")
    return torch.tensor(ids, dtype=torch.long)


def get_model_name_from_path(model_path: str) -> str:
    """The last component of a path; for a `checkpoint-*` folder, the name of the run comes before it."""
    parts = PurePath(model_path).parts
    if len(parts) > 1 and parts[-1].startswith("checkpoint-"):
        return f"{parts[-2]}_{parts[-1]}"
    return parts[-1]


class KeywordsStoppingCriteria(StoppingCriteria):  # type: ignore[misc]
    """Stops generation when the answer contains one of some keywords.

    Keywords of white space are ignored: `conv.sep` is a newline, and an answer may have several lines. The ids may
    include the prompt or not; both cases are recognised.
    """

    def __init__(self, keywords: Sequence[str], tokenizer: Any, input_ids: torch.Tensor) -> None:
        self.keywords = [keyword.strip() for keyword in keywords if keyword.strip()]
        self.tokenizer = tokenizer
        self.prompts = input_ids

    def __call__(self, output_ids: torch.Tensor, scores: Any = None, **kwargs: Any) -> torch.Tensor:
        """[batch] bool for output_ids [batch, length]."""
        ended = torch.zeros(len(output_ids), dtype=torch.bool, device=output_ids.device)
        if not self.keywords:
            return ended
        length = self.prompts.shape[1]
        has_prompts = torch.equal(output_ids[:, :length].cpu(), self.prompts.cpu())
        answers = self.tokenizer.batch_decode(output_ids[:, length:] if has_prompts else output_ids)
        for number, answer in enumerate(answers):
            ended[number] = any(keyword in answer for keyword in self.keywords)
        return ended
