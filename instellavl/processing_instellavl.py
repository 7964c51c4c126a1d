"""Encodes questions about images for `generate`, and decodes answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from PIL import Image, ImageOps
from transformers import ProcessorMixin, StoppingCriteriaList

from .constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from .conversation import conv_templates

Pictures = Image.Image | Sequence[Image.Image] | None


class InstellaVLProcessor(ProcessorMixin):
    """Encodes questions as in training, and decodes answers."""

    if transformers.__version__.startswith("4."):  # 5 reads the constructor's arguments
        attributes = ["image_processor", "tokenizer"]
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any) -> None:
        super().__init__(image_processor, tokenizer, **kwargs)
        self.image_processor, self.tokenizer = image_processor, tokenizer

    def encode(
        self,
        query: str,
        image: Pictures = None,
        image_processor: Any = None,
        tokenizer: Any = None,
        config: Any = None,
    ) -> dict[str, Any]:
        """Encode one question and its images as arguments of `generate`.

        Args:
            query: the question; `<image>` marks the position of an image, without any the images come first. Other
                special tokens are plain text here, as in training, so that no question can end a turn.
            image: one image, several, or None; rotated upright by the EXIF orientation.
            image_processor: by default the processor's own.
            tokenizer: by default the processor's own; `decode` uses the last one given.
            config: not used; the image processor has the settings of its model.

        Returns:
            input_ids [1, L] with -200 for each image; image_tensor [n, t, 3, P, P]; image_sizes, n times (width,
            height); stopping_criteria and eos_token_id.

        Raises:
            ValueError: the query has `<image>`, but not once per image.
        """
        self.tokenizer = tokenizer or self.tokenizer
        image_processor = image_processor or self.image_processor
        images = [image] if isinstance(image, Image.Image) else list(image or ())
        images = [ImageOps.exif_transpose(picture) for picture in images]
        pictures = image_processor.preprocess(images, return_tensors="pt")
        return {
            "input_ids": torch.tensor([self._prompt_ids(_place_images(query, len(images)))], dtype=torch.long),
            "image_tensor": pictures["pixel_values"],
            "image_sizes": pictures["image_sizes"],
            "stopping_criteria": StoppingCriteriaList(),  # only the end-of-sequence id ends an answer
            "eos_token_id": self.tokenizer.eos_token_id,
        }

    def batch_encode(
        self,
        queries: Sequence[str],
        images: Sequence[Pictures],
        image_processor: Any = None,
        tokenizer: Any = None,
        config: Any = None,
    ) -> list[dict[str, Any]]:
        """`encode` of each question with its image.

        Raises:
            ValueError: the numbers of questions and images differ (None stands for no image).
        """
        if len(queries) != len(images):
            raise ValueError(f"{len(queries)} questions and {len(images)} images: give None where there is no image")
        return [
            self.encode(query, image, image_processor, tokenizer, config)
            for query, image in zip(queries, images, strict=True)
        ]

    def collate(self, encoded: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Several encoded questions as the arguments of one `generate`."""
        ids = [one["input_ids"][0] for one in encoded]
        longest, pad = max(map(len, ids)), self.tokenizer.pad_token_id
        padded = [torch.nn.functional.pad(row, (longest - len(row), 0), value=pad) for row in ids]
        mask = [torch.arange(longest) >= longest - len(row) for row in ids]
        return {
            "inputs": torch.stack(padded),
            "attention_mask": torch.stack(mask).long(),
            "images": [tiles for one in encoded for tiles in one["image_tensor"]],
            "image_sizes": [size for one in encoded for size in one["image_sizes"]],
            "eos_token_id": self.tokenizer.eos_token_id,
        }

    def decode(self, output_ids: Any, **kwargs: Any) -> str:
        """The text of one answer: new ids as a list, [N] or [1, N].

        Raises:
            ValueError: several answers; use `batch_decode`.
        """
        if isinstance(output_ids, torch.Tensor) and output_ids.dim() == 2:
            if len(output_ids) != 1:
                raise ValueError(f"{len(output_ids)} answers: batch_decode gives a list of them")
            output_ids = output_ids[0]
        text: str = self.tokenizer.decode(output_ids, **{"skip_special_tokens": True, **kwargs})
        return text.strip()

    def batch_decode(self, output_ids: Any, **kwargs: Any) -> list[str]:
        """The text of each answer."""
        return [self.decode(row, **kwargs) for row in output_ids]

    def _prompt_ids(self, question: str) -> list[int]:
        """Ids of the template with one question; ids of special tokens are inserted, not tokenized."""
        template = conv_templates["instella"]
        user, assistant = template.roles
        ids = [self.tokenizer.eos_token_id]
        for number, span in enumerate(f"{user}{question}{template.sep}{assistant}".split(DEFAULT_IMAGE_TOKEN)):
            if number:
                ids.append(IMAGE_TOKEN_INDEX)
            ids += self.tokenizer(span, add_special_tokens=False, split_special_tokens=True).input_ids if span else []
        return ids


def _place_images(question: str, images: int) -> str:
    """The question with a placeholder for every image: its own ones, or new ones at the start.

    A single one is moved to the start, as in training.
    """
    placeholders = question.count(DEFAULT_IMAGE_TOKEN)
    if placeholders == 0:
        return f"{DEFAULT_IMAGE_TOKEN}\n" * images + question
    if placeholders != images:
        raise ValueError(f"{placeholders} times {DEFAULT_IMAGE_TOKEN} in the question and {images} images")
    if placeholders == 1 and not question.startswith(DEFAULT_IMAGE_TOKEN):
        return f"{DEFAULT_IMAGE_TOKEN}\n{question.replace(DEFAULT_IMAGE_TOKEN, '').strip()}".strip()
    return question
