"""Run with any version of transformers: its tiles of images, and its logits of an exported `llava_next` model.

python stock.py FOLDER with FOLDER/table/*.png for the processor in FOLDER/processor, and FOLDER/images/*.png for the
model in FOLDER/llava_next; writes FOLDER/stock.npz. Needs transformers, torch and Pillow.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image


def pil_processor(folder: Path) -> Any:
    """The exported processor on transformers' PIL backend."""
    is_4 = transformers.__version__.startswith("4.")
    processor = transformers.AutoProcessor.from_pretrained(
        folder, **{"use_fast": False} if is_4 else {"backend": "pil"}
    )
    name = type(processor.image_processor).__name__
    assert name == ("LlavaNextImageProcessor" if is_4 else "LlavaNextImageProcessorPil"), name
    return processor


def tiles_and_image_tokens(processor: Any, image: Image.Image) -> tuple[np.ndarray, int]:
    """[t, 3, P, P] float32, and the number of image tokens in the prompt."""
    inputs = processor(images=[image], text="<image>", return_tensors="np")
    (tiles,) = inputs["pixel_values"]
    return tiles, int((inputs["input_ids"] == processor.image_token_id).sum())


@torch.no_grad()
def logits(processor: Any, model: Any, image: Image.Image | None) -> np.ndarray:
    """[S, V] of a question with or without an image."""
    text = "What is it?" if image is None else "<image>\nWhat is it?"
    prompt = processor.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
    inputs = processor(images=None if image is None else [image], text=prompt, return_tensors="pt")
    return model(**inputs).logits[0].float().numpy()


def main(folder: Path) -> None:
    found: dict[str, np.ndarray] = {"version": np.array(transformers.__version__)}
    processor = pil_processor(folder / "processor")
    for file in sorted((folder / "table").glob("*.png")):
        found[f"tiles {file.stem}"], image_tokens = tiles_and_image_tokens(processor, Image.open(file))
        found[f"image_tokens {file.stem}"] = np.array(image_tokens)
    model, report = transformers.LlavaNextForConditionalGeneration.from_pretrained(
        folder / "llava_next", output_loading_info=True
    )
    assert not any(report.values()), report
    processor = pil_processor(folder / "llava_next")
    for file in sorted((folder / "images").glob("*.png")):
        found[f"logits {file.stem}"] = logits(processor, model, Image.open(file))
    found["logits text"] = logits(processor, model, None)
    np.savez(folder / "stock.npz", **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
