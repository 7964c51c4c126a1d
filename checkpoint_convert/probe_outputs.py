"""Outputs of a model for a few built-in prompts: logits of the prompt, and greedily generated tokens.

A Hugging Face folder runs in transformers' own classes, a Megatron checkpoint in megatron_vlm's engine. Both get the
same ids and tiles and compute in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import megatron_vlm.runtime.megatron_patches  # noqa: F401  (prepares the process before megatron.core is imported)
from checkpoint_convert.errors import ConversionError, some_of
from checkpoint_convert.megatron.files import checkpoint_recipe, checkpoint_tensors, tensors_of
from checkpoint_convert.model_source import MEGATRON, Source
from instellavl.constants import IMAGE_TOKEN_INDEX
from megatron_vlm.config import ModelConfig
from megatron_vlm.data.processing.conversation import Turn
from megatron_vlm.data.processing.tiling import image_to_tiles
from megatron_vlm.data.processing.tokenizer import Tokenizer
from megatron_vlm.data.rows.batch import PackedBatch
from megatron_vlm.inference.engine import Engine, Prompt, read_prompts
from megatron_vlm.model.build import build_model
from megatron_vlm.runtime.launch import distributed

NEW_TOKENS = 16
_QUESTION = "Describe the image, then count to three: 1,"
_IMAGE_SIZES = {"square": (0.8, 0.8), "tall": (0.9, 2.9), "wide": (3.1, 1.1)}
"""(width, height) of the images, in tiles."""
_IMAGE_TOKENS = 8
"""Number of image tokens whose logits are kept per prompt: all of them would be hundreds of megabytes."""


@dataclass(frozen=True)
class ProbeOutput:
    """Output for one prompt."""

    logits: torch.Tensor
    """[n, V] fp32, at all text tokens and some image tokens."""
    tokens: list[int]
    """Greedily generated, up to and with the end-of-sequence id."""


def built_in_prompts(model: ModelConfig) -> dict[str, Prompt]:
    """One prompt of text alone, and one for each shape of image."""
    prompts = {"text": Prompt([Turn("human", _QUESTION)])}
    for name, (width, height) in _IMAGE_SIZES.items():
        side = model.vision.image_size
        image = _picture(int(width * side), int(height * side))
        prompts[name] = Prompt([Turn("human", f"<image>\n{_QUESTION}")], [image])
    return prompts


def _picture(width: int, height: int) -> Image.Image:
    """Two gradients and noise, so that all regions differ, and images of different sizes too."""
    across, down = np.linspace(0, 255, width), np.linspace(255, 0, height)
    noise = np.random.default_rng(width * 10007 + height).integers(0, 256, (height, width))
    planes = np.broadcast_arrays(across[None, :], down[:, None], noise)
    return Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8))


def probe_outputs(source: Source, tokenizer: Tokenizer, prompts: dict[str, Prompt]) -> dict[str, ProbeOutput]:
    """Prompt name -> output of a whole VLM, which is loaded only inside this call.

    Raises ConversionError if transformers reports missing or unexpected tensors.
    """
    run = _run_megatron if source.format == MEGATRON else _run_transformers
    return run(source, tokenizer, prompts)


def _probed_positions(batch: PackedBatch, image_token_index: int) -> torch.Tensor:
    is_image = batch.tokens == image_token_index
    image = is_image.nonzero().flatten()
    some = image[:: max(1, len(image) // _IMAGE_TOKENS)]
    return torch.cat([(~is_image).nonzero().flatten(), some]).sort().values


@torch.no_grad()
def _run_megatron(source: Source, tokenizer: Tokenizer, prompts: dict[str, Prompt]) -> dict[str, ProbeOutput]:
    recipe = checkpoint_recipe(source.path)
    recipe.training.bf16 = False
    stored = checkpoint_tensors(source.path)
    with distributed(recipe.parallel):
        (model,) = build_model(recipe)
        for name, tensor in tensors_of(model).items():
            tensor.copy_(stored[name])
        outputs = {}
        with Engine(model, tokenizer) as engine:
            for name, prompt in tqdm(prompts.items(), desc="running megatron_vlm", disable=None):
                batch = read_prompts([prompt], recipe.model, source.aspect_ratio, tokenizer)
                hidden = model.language_model.decode(model.embed(batch), model.packed_sequence(batch))
                logits = model.language_model.logits(hidden, _probed_positions(batch, recipe.model.image_token_index))
                (tokens,) = engine.generate([prompt], NEW_TOKENS)
                outputs[name] = ProbeOutput(logits.float().cpu(), tokens)
        return outputs


@torch.no_grad()
def _run_transformers(source: Source, tokenizer: Tokenizer, prompts: dict[str, Prompt]) -> dict[str, ProbeOutput]:
    from transformers import GenerationConfig

    assert source.model is not None
    model, inputs_of = _load_in_transformers(source)
    greedy = GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id
    )
    outputs = {}
    for name, prompt in tqdm(prompts.items(), desc="running transformers", disable=None):
        batch = read_prompts([prompt], source.model, source.aspect_ratio, tokenizer)
        tiles = [torch.from_numpy(image_to_tiles(image, source.model, source.aspect_ratio)) for image in prompt.images]
        inputs = inputs_of(batch, prompt, tiles)
        positions = _probed_positions(batch, source.model.image_token_index)
        logits = model(**inputs, logits_to_keep=positions).logits[0]
        tokens = model.generate(**inputs, generation_config=greedy)[0].tolist()
        if source.format != "instellavl":  # its class returns the new tokens only
            tokens = tokens[inputs["input_ids"].shape[1] :]
        outputs[name] = ProbeOutput(logits.float(), tokens)
    return outputs


Inputs = Callable[[PackedBatch, Prompt, list[torch.Tensor]], dict[str, Any]]
"""(row, its prompt, normalised tiles of each image) -> arguments of the model."""


def _load_in_transformers(source: Source) -> tuple[Any, Inputs]:
    """The model in fp32, and the function for its inputs. Code in an `instellavl` folder is not run; ours is."""
    import transformers
    from transformers.utils import logging

    from instellavl.modeling_instellavl import InstellaVLForCausalLM

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    classes = {
        "llava_next": transformers.LlavaNextForConditionalGeneration,
        "llava_onevision": transformers.LlavaOnevisionForConditionalGeneration,
        "instellavl": InstellaVLForCausalLM,
    }
    model, report = classes[source.format].from_pretrained(source.path, dtype=torch.float32, output_loading_info=True)
    mismatches = [f"{kind}: {name}" for kind, names in report.items() for name in names]
    if mismatches:
        raise ConversionError(f"transformers does not load all tensors of {source.path}\n{some_of(mismatches)}")
    assert source.model is not None
    if source.format == "instellavl":
        return model.eval(), _inputs_of_instellavl(source.model.image_token_index)
    return model.eval(), _inputs_of_llava


def _inputs_of_llava(batch: PackedBatch, prompt: Prompt, tiles: list[torch.Tensor]) -> dict[str, Any]:
    inputs: dict[str, Any] = {"input_ids": batch.tokens[None], "attention_mask": torch.ones_like(batch.tokens)[None]}
    if tiles:
        sizes = [(image.height, image.width) for image in prompt.images]
        inputs |= {"pixel_values": torch.stack(tiles), "image_sizes": torch.tensor(sizes)}
    return inputs


def _inputs_of_instellavl(image_token_index: int) -> Inputs:
    def inputs_of(batch: PackedBatch, prompt: Prompt, tiles: list[torch.Tensor]) -> dict[str, Any]:
        is_image = batch.tokens == image_token_index
        first = is_image & ~torch.cat([torch.tensor([False]), is_image[:-1]])
        ids = torch.where(first, IMAGE_TOKEN_INDEX, batch.tokens)[first | ~is_image]
        inputs: dict[str, Any] = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
        if tiles:
            inputs |= {"images": tiles, "image_sizes": [image.size for image in prompt.images]}
        return inputs

    return inputs_of
