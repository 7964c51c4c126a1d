"""Where an exported model looks for an answer: its attention over an image, with stock transformers."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaNextForConditionalGeneration


class AttentionMaps:
    """An exported llava_next model that returns its attention."""

    def __init__(self, folder: Path) -> None:
        self.processor = AutoProcessor.from_pretrained(folder)
        # The fused kernels do not compute attention weights; `eager` does.
        self.model = LlavaNextForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    @torch.inference_mode()
    def over_image(self, image: Image.Image, question: str) -> torch.Tensor:
        """Attention [grid, grid] of the position that predicts the answer, over the patches of a square image.

        It is the average of heads and layers. Each patch has a token of the base view and one of the only tile; their
        attention is summed.

        Raises:
            ValueError: the image is split into several tiles, or is not square.
        """
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = self.processor(images=image, text=text, return_tensors="pt")
        layers = self.model(**inputs, output_attentions=True).attentions
        to_all = torch.stack([weights[0, :, -1] for weights in layers]).mean((0, 1))
        to_image = to_all[inputs["input_ids"][0] == self.model.config.image_token_index]
        vision = self.model.config.vision_config
        grid = vision.image_size // vision.patch_size
        if len(to_image) != grid * grid + grid * (grid + 1):
            raise ValueError(f"an image of {image.size} is not one square tile of {vision.image_size} pixels")
        base, tile = to_image[: grid * grid], to_image[grid * grid :]
        # Each row of the tile ends with the newline.
        return base.view(grid, grid) + tile.view(grid, grid + 1)[:, :-1]
