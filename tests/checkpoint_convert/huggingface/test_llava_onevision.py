"""A converted `llava_onevision` folder: its recipe, and logits and tiles that equal those of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer

from benchmarks.support.random_tokenizer import write_tokenizer
from checkpoint_convert import hf_to_megatron
from checkpoint_convert.mapping.families import TOWERS
from megatron_vlm.data.processing.conversation import Turn
from megatron_vlm.data.processing.image_tokens import num_image_tokens
from megatron_vlm.data.processing.tiling import ImageGeometry, image_to_tiles, normalise_tiles
from megatron_vlm.data.processing.tokenizer import load_tokenizer
from megatron_vlm.inference.engine import Prompt, read_prompts
from megatron_vlm.inference.load import load_engine
from megatron_vlm.training.checkpoint import read_recipe
from tests.checkpoint_convert.whole_model import our_logits, picture
from tests.support.random_models import LANGUAGE_SIZES, QWEN2_SIZES, SIGLIP_SIZES, VISION_SIZES, randomize

TOLERANCE = 1e-4
PINPOINTS = [[28 * rows, 28 * columns] for rows in range(1, 5) for columns in range(1, 5)]
SIZES = {"one tile": (20, 20), "tall": (25, 80), "wide": (90, 31), "reduced": (107, 97), "reduced, odd": (111, 61)}
"""(width, height); all but the first have more patches than anyres_max_2 keeps."""
CASES: dict[str, Any] = {
    "siglip, qwen2": (
        SIGLIP_SIZES | {"model_type": "siglip_vision_model", "vision_use_head": False},
        QWEN2_SIZES | {"model_type": "qwen2"},
    ),
    "clip, olmo": (VISION_SIZES | {"model_type": "clip_vision_model"}, LANGUAGE_SIZES | {"model_type": "olmo"}),
}


def write_onevision(folder: Path, case: str) -> Any:
    """A random LlavaOnevisionForConditionalGeneration with tokenizer and image processor; returns the model."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    vision, language = (dict(part) for part in CASES[case])
    vocab_size = write_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<image>", normalized=False), AddedToken("<video>", normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    rope = {"rope_theta": language.pop("rope_theta", 10000.0), "rope_type": "default"}
    text = CONFIG_MAPPING[language.pop("model_type")](
        **{"tie_word_embeddings": True, **language}, rope_parameters=rope, eos_token_id=269, pad_token_id=1
    )
    tower = CONFIG_MAPPING[vision.pop("model_type")](**vision)
    config = LlavaOnevisionConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=vocab_size,
        video_token_index=vocab_size + 1,
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_2",
        vision_feature_select_strategy=TOWERS[tower.model_type].select_strategy,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    model = LlavaOnevisionForConditionalGeneration(config).eval()
    randomize(model)
    model.save_pretrained(folder)
    half = [0.5, 0.5, 0.5]
    processor = {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "size": {"height": 28, "width": 28},
        "image_grid_pinpoints": PINPOINTS,
        "image_mean": half,
        "image_std": half,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


@pytest.fixture(scope="module", params=CASES)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    folder = tmp_path_factory.mktemp("onevision")
    reference = write_onevision(folder / "source", request.param)
    assert hf_to_megatron.main(["--model", str(folder / "source"), "--save", str(folder / "megatron")]) == 0
    return folder / "source", folder / "megatron", reference


def test_recipe_of_the_checkpoint(converted: tuple[Path, Path, Any]) -> None:
    _, megatron, reference = converted
    recipe = read_recipe(megatron)
    assert recipe.data.image_aspect_ratio == "anyres_max_2"
    assert recipe.model.vision.vision_feature_layer == -1
    assert recipe.model.vision.image_normalization == "imagenet_standard", "as its image processor says"
    assert recipe.model.image_grid_pinpoints == [[width, height] for height, width in PINPOINTS]
    assert len(load_tokenizer(megatron / "tokenizer")) == reference.config.image_token_index, "no <image>, no <video>"


@torch.no_grad()
def test_logits_equal_those_of_transformers(converted: tuple[Path, Path, Any]) -> None:
    _, megatron, reference = converted
    with load_engine(megatron) as engine:
        model, aspect_ratio = engine.recipe.model, engine.recipe.data.image_aspect_ratio
        reduced = {}
        for name, size in SIZES.items():
            image = picture(size)
            prompt = Prompt([Turn("human", "<image>\nWhat is the colour?")], [image])
            batch = read_prompts([prompt], model, aspect_ratio, engine.tokenizer)
            reduced[name] = batch.bilinear_sources is not None and len(batch.bilinear_sources) > 0
            assert batch.tiles is not None
            tiles = normalise_tiles(batch.tiles, model.vision.image_mean, model.vision.image_std)
            inputs = {"pixel_values": tiles[None], "image_sizes": torch.tensor([size[::-1]])}
            wanted = reference(input_ids=batch.tokens[None], **inputs).logits[0]
            difference = (our_logits(engine.model, batch) - wanted).abs().max()
            assert difference < TOLERANCE, f"{name}: {difference:.1e}"
            assert wanted.std() > 0.1
        assert reduced["reduced"]
        assert reduced["reduced, odd"]
        assert not reduced["one tile"]


@torch.no_grad()
def test_several_images_equal_those_of_transformers(converted: tuple[Path, Path, Any]) -> None:
    """In a sample with several images, each is one padded tile with a newline."""
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    source, megatron, reference = converted
    images = [picture(size, seed) for seed, size in enumerate(SIZES.values())]
    with load_engine(megatron) as engine:
        model, data = engine.recipe.model, engine.recipe.data
        assert data.multi_image_aspect_ratio == "pad"
        prompt = Prompt([Turn("human", "<image>\n" * len(images) + "Which?")], images)
        batch = read_prompts([prompt], model, data.image_aspect_ratio, engine.tokenizer, data.multi_image_aspect_ratio)
        assert batch.tiles is not None and len(batch.tiles) == len(images)
        tiles = normalise_tiles(batch.tiles, model.vision.image_mean, model.vision.image_std)
        processor = LlavaOnevisionImageProcessorPil.from_pretrained(source)
        inputs = processor([images], return_tensors="pt", do_pad=False)
        assert inputs["batch_num_images"].tolist() == [len(images)]
        theirs = inputs["pixel_values"].reshape(tiles.shape)
        assert (theirs - tiles).abs().max() < 0.1, "transformers pads with 127, not 127.5, of the mean colour"
        wanted = reference(input_ids=batch.tokens[None], **inputs | {"pixel_values": tiles[:, None]}).logits[0]
        assert (our_logits(engine.model, batch) - wanted).abs().max() < TOLERANCE
        (answer,) = engine.generate([prompt], 3)
        expected = wanted[-1].argmax()
        assert answer[0] == expected, "the engine encodes them the same"


def test_tiles_and_token_counts_equal_those_of_the_processor(converted: tuple[Path, Path, Any]) -> None:
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    source, megatron, reference = converted
    processor = LlavaOnevisionImageProcessorPil.from_pretrained(source)
    recipe = read_recipe(megatron)
    tower = reference.config.vision_config
    for size in SIZES.values():
        image = picture(size)
        (theirs,) = processor(image, return_tensors="np")["pixel_values"]
        ours = image_to_tiles(image, recipe.model, "anyres_max_2")
        assert theirs.shape == ours.shape
        assert np.abs(theirs - ours).max() < 1e-3
        features = reference.get_image_features(
            torch.from_numpy(theirs)[None], torch.tensor([size[::-1]]), vision_aspect_ratio="anyres_max_2"
        )
        assert num_image_tokens(size, ImageGeometry.of(recipe.model, "anyres_max_2")) == len(
            features.pooler_output[0]
        ), size
    assert tower.image_size // tower.patch_size == recipe.model.vision.grid


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_aspect_ratio": "anyres"}, "vision_aspect_ratio is 'anyres'; supported: 'anyres_max_N'"),
        ({"vision_feature_layer": [-1, -2]}, "vision_feature_layer is [-1, -2]; supported: one layer"),
        ({"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy is 'default'"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
    ],
)
def test_unsupported_settings_are_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    write_onevision(tmp_path / "source", "siglip, qwen2")
    file = tmp_path / "source" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert hf_to_megatron.main(["--model", str(tmp_path / "source"), "--save", str(tmp_path / "megatron")]) == 1
    reported = capsys.readouterr().err
    assert message in reported
    assert str(file) in reported
    assert not (tmp_path / "megatron").exists()


def test_other_image_means_are_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_onevision(tmp_path / "source", "siglip, qwen2")
    file = tmp_path / "source" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [0.1, 0.2, 0.3]}))
    assert hf_to_megatron.main(["--model", str(tmp_path / "source"), "--save", str(tmp_path / "megatron")]) == 1
    assert "image_mean (0.1, 0.2, 0.3)" in capsys.readouterr().err
