"""A tiny random model as a Megatron checkpoint, and random prompts for it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint_convert import hf_to_megatron
from megatron_vlm.data.processing.conversation import Turn
from megatron_vlm.inference.request import Prompt
from tests.checkpoint_convert.whole_model import SINGLE, TALL, WIDE, picture
from tests.support.random_models import GROUPED_QUERY_SIZES, write_llava_next

SIZES = GROUPED_QUERY_SIZES | {"vocab_size": 284, "num_hidden_layers": 4, "max_position_embeddings": 4096}
_WORDS = ("What", "is", "the", "colour", "of", "this", "image?", "A", "red", "dog.", "blue", "one!", "yes,", "no")


@dataclass(frozen=True)
class PromptSpec:
    """A prompt that can be made again in another process."""

    seed: int
    num_words: int
    num_images: int

    def prompt(self) -> Prompt:
        chance = random.Random(self.seed)
        text = " ".join(chance.choices(_WORDS, k=self.num_words))
        images = [picture(chance.choice([SINGLE, TALL, WIDE]), chance.randrange(6)) for _ in range(self.num_images)]
        return Prompt([Turn("human", "<image>\n" * self.num_images + text)], images)


def random_specs(count: int, most_words: int) -> list[PromptSpec]:
    """Prompts of 1 to `most_words` words, evenly on a logarithmic scale; half of them have an image or two."""
    return [
        PromptSpec(seed, max(1, round(most_words ** (seed / max(1, count - 1)))), seed % 4 if seed % 4 < 3 else 0)
        for seed in range(count)
    ]


def write_tiny_model(folder: Path) -> None:
    """Write FOLDER/source, a Hugging Face model, and FOLDER/megatron, the same as a Megatron checkpoint."""
    model = write_llava_next(folder / "source", language=SIZES)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            for parameter in layer.parameters():
                parameter *= 5  # otherwise answers repeat one token, whatever the prompt
    model.save_pretrained(folder / "source")
    assert hf_to_megatron.main(["--model", str(folder / "source"), "--save", str(folder / "megatron")]) == 0
