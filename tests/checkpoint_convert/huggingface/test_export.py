"""Stock transformers loads an exported folder: weights, processor, tokenizer, template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, LlavaNextForConditionalGeneration

from benchmarks.support.random_tokenizer import write_tokenizer
from checkpoint_convert.huggingface.config import llava_next_config, model_from_llava_next, model_from_parts
from checkpoint_convert.huggingface.llava_next import write_configs
from checkpoint_convert.huggingface.safetensors import write_weights
from checkpoint_convert.mapping.param_map import param_map, to_hf, to_megatron
from megatron_vlm.config import LanguageConfig, ModelConfig, VisionConfig
from megatron_vlm.data.processing.conversation import Turn, encode_conversation, encode_prompt
from megatron_vlm.data.processing.image_tokens import num_image_tokens
from megatron_vlm.data.processing.tiling import ImageGeometry, image_to_tiles
from megatron_vlm.data.processing.tokenizer import load_tokenizer
from tests.checkpoint_convert.whole_model import TALL, WIDE, canonical_tensors, model_config, picture
from tests.support.random_models import GROUPED_QUERY_SIZES, llava_next_model


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, ModelConfig]:
    """An exported folder, the transformers model with the same weights, and our config of it."""
    folder, tokenizer = tmp_path_factory.mktemp("exported"), tmp_path_factory.mktemp("tokenizer")
    reference = llava_next_model(language=GROUPED_QUERY_SIZES, image_token_index=write_tokenizer(tokenizer))
    model = model_config(reference)
    entries = param_map(model)
    write_configs(folder, model, load_tokenizer(tokenizer), torch.float32)
    megatron = dict(to_megatron(entries, canonical_tensors(reference), "the reference"))
    write_weights(to_hf(entries, megatron, "the reference"), folder)
    return folder, reference, model


def test_stock_transformers_loads_every_weight(exported: tuple[Path, Any, ModelConfig]) -> None:
    folder, reference, _ = exported
    loaded, report = LlavaNextForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    for name, tensor in reference.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.config.text_config.rope_parameters["rope_theta"] == 500.0
    assert loaded.generation_config.eos_token_id == 269
    assert loaded.generation_config.pad_token_id == 1


def test_processor_gives_our_ids_and_tiles(exported: tuple[Path, Any, ModelConfig]) -> None:
    folder, _, model = exported
    processor, tokenizer = AutoProcessor.from_pretrained(folder), load_tokenizer(folder)
    images = [picture(WIDE), picture(TALL, seed=1)]
    messages = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which one? "}],
        }
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=images, text=text, return_tensors="pt")
    assert sorted(inputs) == ["attention_mask", "image_sizes", "input_ids", "pixel_values"]
    lengths = [num_image_tokens(image.size, ImageGeometry.of(model, "anyres")) for image in images]
    turns = [Turn("human", "<image>\n<image>\nWhich one? ")]
    wanted = encode_prompt(turns, tokenizer, lengths, model.image_token_index)
    assert inputs["input_ids"][0].tolist() == wanted.ids.tolist()
    for pixels, image in zip(inputs["pixel_values"], images, strict=True):
        tiles = image_to_tiles(image, model, "anyres")
        assert abs(pixels[: len(tiles)].numpy() - tiles).max() < 1e-3


def test_template_of_several_turns_is_ours(exported: tuple[Path, Any, ModelConfig]) -> None:
    folder, _, model = exported
    processor, tokenizer = AutoProcessor.from_pretrained(folder), load_tokenizer(folder)
    turns = [
        Turn("system", "Answer briefly. "),
        Turn("human", "Is there a dog? "),
        Turn("gpt", " yes\n"),
        Turn("human", " Sure?\n"),
        Turn("gpt", "A red dog."),
    ]
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    messages = [{"role": roles[turn.role], "content": turn.text} for turn in turns]
    ids = processor.tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert ids == encode_conversation(turns, tokenizer, [], model.image_token_index).ids.tolist()
    prompt = processor.tokenizer.apply_chat_template(messages[:4], add_generation_prompt=True, return_dict=True)
    assert prompt["input_ids"] == encode_prompt(turns[:4], tokenizer, [], model.image_token_index).ids.tolist()
    answer = processor.tokenizer.decode([*tokenizer.encode("A red dog."), tokenizer.eos_id], skip_special_tokens=True)
    assert answer == "A red dog."
    with pytest.raises(Exception, match="roles are user, assistant and system, not tool"):
        processor.tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])


def test_config_round_trip() -> None:
    model = model_from_parts(VisionConfig(), LanguageConfig(), 50280)
    assert model == ModelConfig(), "the published model and its resolutions, in the published order"
    config = llava_next_config(model, 50279, 1, "bfloat16")
    assert config["image_grid_pinpoints"][1:3] == [[672, 336], [1008, 336]], "(height, width)"
    assert model_from_llava_next(config, "config.json") == model
    counted_from_the_start = config | {"vision_feature_layer": 23}
    assert model_from_llava_next(counted_from_the_start, "config.json") == model
