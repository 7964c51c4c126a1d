"""The published interface: images and prompts as in training, and errors that say what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from benchmarks.support.random_tokenizer import write_tokenizer
from checkpoint_convert.errors import ConversionError
from checkpoint_convert.huggingface.instellavl import REMOTE_CODE, model_from_instellavl, write_configs
from instellavl.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from instellavl.conversation import conv_templates
from instellavl.image_processing_instellavl import InstellaVLImageProcessor, feature_order
from instellavl.mm_utils import (
    KeywordsStoppingCriteria,
    get_model_name_from_path,
    process_images,
    tokenizer_image_token,
)
from instellavl.model.builder import LoadError, load_pretrained_model
from instellavl.processing_instellavl import InstellaVLProcessor
from instellavl.utils import disable_torch_init
from megatron_vlm.config import ModelConfig, VisionConfig
from megatron_vlm.data.processing.conversation import Turn, encode_conversation, encode_prompt
from megatron_vlm.data.processing.image_tokens import feature_order as training_feature_order
from megatron_vlm.data.processing.tiling import ImageGeometry, image_to_tiles
from megatron_vlm.data.processing.tokenizer import load_tokenizer
from tests.checkpoint_convert.whole_model import picture
from tests.instellavl.exports import NEWLINE, SIZES, pictures, write_exports
from tests.support.launch import ROOT
from tests.support.random_models import LANGUAGE_SIZES
from tests.support.real_tokenizer import real_tokenizer_folder

END = "|||IP_ADDRESS|||"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("exports")
    write_exports(root)
    return root / "instellavl"


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Any, Any, Any, int]:
    return load_pretrained_model(str(folder))


@pytest.fixture(scope="module")
def processor(loaded: tuple[Any, Any, Any, int]) -> InstellaVLProcessor:
    return InstellaVLProcessor(loaded[2], loaded[0])


@pytest.mark.parametrize("aspect_ratio", ["anyres", "square", "pad"])
def test_images_are_tiled_and_merged_as_in_training(folder: Path, aspect_ratio: str) -> None:
    from instellavl.configuration_instellavl import InstellaVLConfig

    fields = json.loads((folder / "config.json").read_text()) | {"image_aspect_ratio": aspect_ratio}
    fields["mm_patch_merge_type"] = "spatial_unpad" if aspect_ratio == "anyres" else "flat"
    model, ratio = model_from_instellavl(fields, "config.json", image_token_index=270)
    assert ratio == aspect_ratio
    config = InstellaVLConfig(**fields)
    image_processor = InstellaVLImageProcessor.of(config)
    for size in [*SIZES.values(), (1, 1), (7, 501), (28, 28), (57, 55)]:
        image = picture(size)
        ours = image_processor.tiles(image).numpy()
        assert np.array_equal(ours, image_to_tiles(image, model, aspect_ratio)), size
    for size in np.random.default_rng(0).integers(1, 600, (300, 2)).tolist():
        assert np.array_equal(
            feature_order(size, config), training_feature_order(tuple(size), ImageGeometry.of(model, aspect_ratio))
        ), size


def test_preprocess_gives_the_tiles_of_every_image(loaded: tuple[Any, Any, Any, int]) -> None:
    _, model, image_processor, _ = loaded
    images = list(pictures().values())
    batch = image_processor.preprocess(images, return_tensors="pt")
    assert batch["pixel_values"].shape[:2] == (4, 5) and batch["image_sizes"] == list(SIZES.values())
    assert torch.equal(image_processor.preprocess(images[1])["pixel_values"][0], image_processor.tiles(images[1]))
    assert [len(tiles) for tiles in process_images(images, image_processor, model.config)] == [2, 4, 4, 5]
    assert process_images(images[1:2], image_processor, model.config).shape[:2] == (1, 4)
    with pytest.raises(TypeError, match="not str"):
        image_processor.preprocess(["dog.jpg"])


@pytest.mark.parametrize("question", ["Is it red?", "What is\nit?  ", f"a {END} b <|padding|> c"])
def test_prompts_equal_those_of_training(folder: Path, processor: InstellaVLProcessor, question: str) -> None:
    tokenizer = load_tokenizer(folder)
    for images, text in ((0, question), (1, f"<image>\n{question}"), (2, f"<image>\n<image>\n{question}")):
        wanted = encode_prompt([Turn("human", text)], tokenizer, [1] * images, IMAGE_TOKEN_INDEX).ids.tolist()
        encoded = processor.encode(question, [picture((20, 20))] * images)
        assert encoded["input_ids"].tolist() == [wanted]
        assert len(encoded["image_tensor"]) == len(encoded["image_sizes"]) == images


def test_conversation_of_several_turns_equals_that_of_training(folder: Path, loaded: tuple[Any, Any, Any, int]) -> None:
    conversation = conv_templates["instella"].copy()
    user, assistant = conversation.roles
    turns = [(user, "<image>\nA dog?"), (assistant, " yes\n"), (user, " Sure? "), (assistant, "yes")]
    for role, text in turns:
        conversation.append_message(role, text)
    roles = {user: "human", assistant: "gpt"}
    wanted = encode_conversation([Turn(roles[r], t) for r, t in turns], load_tokenizer(folder), [1], IMAGE_TOKEN_INDEX)
    assert tokenizer_image_token(conversation.get_prompt(), loaded[0]) == wanted.ids.tolist()
    assert conv_templates["instella"].messages == [], "a copy has messages of its own"


def test_published_ids() -> None:
    """With the real tokenizer: the published generation prompt."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(real_tokenizer_folder())
    conversation = conv_templates["instella"].copy()
    conversation.append_message(conversation.roles[0], f"{DEFAULT_IMAGE_TOKEN}\nDescribe this image.")
    conversation.append_message(conversation.roles[1], None)
    ids = tokenizer_image_token(conversation.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
    published = "50279 29 93 4537 49651 187 -200 187 4476 19268 436 2460 15 187 29 93 515 5567 49651 187"
    assert ids.tolist() == list(map(int, published.split()))


def test_a_bare_newline_does_not_stop(loaded: tuple[Any, Any, Any, int]) -> None:
    tokenizer = loaded[0]
    prompt = torch.tensor([tokenizer("Is it?").input_ids])
    answer = torch.tensor([tokenizer("yes\n no").input_ids])
    for shown in (answer, torch.cat([prompt, answer], dim=1)):  # with and without the prompt
        assert KeywordsStoppingCriteria(["\n"], tokenizer, prompt)(shown).tolist() == [False]
        assert KeywordsStoppingCriteria(["\n", "no"], tokenizer, prompt)(shown).tolist() == [True]
        assert KeywordsStoppingCriteria(["Is"], tokenizer, prompt)(shown).tolist() == [False], (
            "the prompt is not searched"
        )
    with_end = torch.cat([answer, torch.tensor([[tokenizer.eos_token_id]])], dim=1)
    assert KeywordsStoppingCriteria([END + "\n"], tokenizer, prompt)(with_end).tolist() == [True]
    assert tokenizer("\n").input_ids == [NEWLINE]


def test_loader_chooses_for_a_cpu(folder: Path) -> None:
    disable_torch_init()
    with pytest.warns(UserWarning, match="flash_attention_2 is asked for"):
        tokenizer, model, _, context = load_pretrained_model(
            str(folder), None, "any name", False, False, device_map="cpu", attn_implementation="flash_attention_2"
        )
    assert model.dtype == torch.float32 and model.device.type == "cpu" and not model.training
    assert context == LANGUAGE_SIZES["max_position_embeddings"] and len(tokenizer) == 270
    assert model.get_input_embeddings().weight.shape[0] == LANGUAGE_SIZES["vocab_size"], (
        "not truncated to the tokenizer"
    )


def test_images_of_any_dtype(loaded: tuple[Any, Any, Any, int], processor: InstellaVLProcessor, folder: Path) -> None:
    inputs = processor.collate(processor.batch_encode(["A dog?"] * 2, list(pictures().values())[:2]))
    fp32 = loaded[1]
    bf16 = load_pretrained_model(str(folder), device_map="cpu", torch_dtype=torch.bfloat16)[1]
    for model in (fp32, bf16):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            images = [tiles.to(dtype) for tiles in inputs["images"]]
            ids = model.generate(**{**inputs, "images": images}, do_sample=False, max_new_tokens=2)
            assert ids.shape == (2, inputs["inputs"].shape[1] + 2)
            assert torch.equal(ids[:, :-2], inputs["inputs"])


def test_logits_of_a_prompt_do_not_depend_on_the_batch(
    loaded: tuple[Any, Any, Any, int], processor: InstellaVLProcessor
) -> None:
    """Padded on the left, on the right, or alone."""
    model = loaded[1]
    encoded = processor.batch_encode(["A dog?", "Is there a dog in the image?"], [picture((25, 80)), None])
    together = processor.collate(encoded)
    del together["eos_token_id"]
    ids = together.pop("inputs")
    left = model(ids, **together).logits
    shifted = torch.stack([row.roll(-int((row == 1).sum())) for row in ids])
    right = model(shifted, images=together["images"], image_sizes=together["image_sizes"]).logits
    for number, one in enumerate(encoded):
        alone = model(one["input_ids"], one["image_tensor"], one["image_sizes"]).logits[0]
        assert (left[number, -len(alone) :] - alone).abs().max() < 1e-5
        assert (right[number, -len(alone) :] - alone).abs().max() < 1e-5


def test_items_of_a_batch_are_separate_questions(
    loaded: tuple[Any, Any, Any, int], processor: InstellaVLProcessor
) -> None:
    """As published: a list, each item the arguments of one `generate`."""
    questions, images = ["A dog?", "Is it red?", "Describe this image."], [picture((25, 80)), None, picture((90, 31))]
    encoded = processor.batch_encode(questions, images)
    for one, question, image in zip(encoded, questions, images, strict=True):
        alone = processor.encode(question, image)
        assert torch.equal(one["input_ids"], alone["input_ids"])
        assert torch.equal(one["image_tensor"], alone["image_tensor"])
        assert one["image_sizes"] == alone["image_sizes"] == ([] if image is None else [image.size])


def test_wrong_inputs_are_named(loaded: tuple[Any, Any, Any, int], processor: InstellaVLProcessor) -> None:
    _, model, image_processor, _ = loaded
    tiles = image_processor.preprocess(picture((25, 80)))["pixel_values"]
    ids = torch.tensor([[269, IMAGE_TOKEN_INDEX, 5]])
    for message, arguments in {
        "1 placeholders for images .* and 0 images": {"inputs": ids},
        "0 placeholders for images .* and 1 images": {"inputs": ids[:, :1], "images": tiles, "image_sizes": [(25, 80)]},
        "image_sizes is missing": {"inputs": ids, "images": tiles},
        "1 images and 2 image_sizes": {"inputs": ids, "images": tiles, "image_sizes": [(25, 80)] * 2},
        "image 0 of 80 x 80 pixels comes as a tensor": {"inputs": ids, "images": tiles, "image_sizes": [(80, 80)]},
        "modalities video": {"inputs": ids, "images": tiles, "image_sizes": [(25, 80)], "modalities": ["video"]},
        "not as inputs_embeds": {"inputs_embeds": torch.zeros(1, 2, 48)},
    }.items():
        with pytest.raises(ValueError, match=message):
            model.generate(**arguments, max_new_tokens=1)
    with pytest.raises(ValueError, match="2 times <image> in the question and 1 images"):
        processor.encode("<image><image>", picture((20, 20)))
    with pytest.raises(ValueError, match="2 questions and 1 images"):
        processor.batch_encode(["a", "b"], [None])
    with pytest.raises(ValueError, match="batch_decode"):
        processor.decode(torch.zeros(2, 3, dtype=torch.long))


def test_loading_errors_are_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("instellavl.model.builder.importlib.util.find_spec", lambda name: None)
    for bits in (8, 4):
        with pytest.raises(LoadError, match=f"load_{bits}bit needs bitsandbytes and accelerate: pip install"):
            load_pretrained_model(str(folder), **{f"load_{bits}bit": True})
    with pytest.raises(LoadError, match="choose one"):
        load_pretrained_model(str(folder), None, None, True, True)
    with pytest.raises(LoadError, match="model_base .* is not supported"):
        load_pretrained_model(str(folder), "base")
    with pytest.raises(LoadError, match="does not exist"):
        load_pretrained_model(str(tmp_path / "absent"))
    with pytest.raises(LoadError, match="holds no config.json"):
        load_pretrained_model(str(tmp_path))
    with pytest.raises(LoadError, match="holds a llava_next model"):
        load_pretrained_model(str(folder.parent / "llava_next"))


def test_export_has_the_published_format(tmp_path: Path) -> None:
    write_exports(tmp_path, language=LANGUAGE_SIZES | {"tie_word_embeddings": True}, dtype=torch.bfloat16)
    folder = tmp_path / "instellavl"
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    tower = "model.vision_tower.vision_tower.vision_model."
    assert {"model.embed_tokens.weight", "model.image_newline", "model.mm_projector.2.bias"} <= names
    assert {f"{tower}encoder.layers.4.mlp.fc1.weight", f"{tower}post_layernorm.bias"} <= names, "unused layers too"
    assert "lm_head.weight" not in names, "tied"
    assert {"tokenizer.json", "processor_config.json", *REMOTE_CODE} <= {file.name for file in folder.iterdir()}
    config = json.loads((folder / "config.json").read_text())
    assert config["max_position_embeddings"] == config["tokenizer_model_max_length"] == 512
    assert config["torch_dtype"] == "bfloat16" and config["vision_config"]["image_size"] == 28


def test_the_published_config_is_read() -> None:
    """It has only the tower's name, and no image token."""
    published = {
        "model_type": "instellavl", "mm_vision_tower": "openai/clip-vit-large-patch14-336", "hidden_size": 2048,
        "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 16, "vocab_size": 50304,
        "max_position_embeddings": 2048, "tokenizer_model_max_length": 32768, "tie_word_embeddings": True,
        "image_grid_pinpoints": ModelConfig().image_grid_pinpoints, "mm_projector_type": "mlp2x_gelu",
    }  # fmt: skip
    assert model_from_instellavl(published, "config.json", 50280) == (ModelConfig(), "anyres")
    for name, value in {"mm_vision_tower": "google/siglip", "mm_projector_type": "linear"}.items():
        with pytest.raises(ConversionError, match=name):
            model_from_instellavl(published | {name: value}, "config.json", 50280)


def test_other_families_are_rejected(tmp_path: Path) -> None:
    vocab_size = write_tokenizer(tmp_path / "tokenizer")
    model = ModelConfig(image_token_index=vocab_size)
    model.vision = VisionConfig(model_type="siglip_vision_model", class_token=False, pre_norm=False, patch_bias=True)
    with pytest.raises(ConversionError, match="export with --format llava_next"):
        write_configs(tmp_path, model, load_tokenizer(tmp_path / "tokenizer"), torch.float32, "anyres")


def test_package_needs_neither_megatron_nor_streaming() -> None:
    code = "import sys, instellavl.model.builder, instellavl.processing_instellavl; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True)
    modules = {name.split(".")[0] for name in done.stdout.split()}
    assert not modules & {"megatron", "megatron_vlm", "checkpoint_convert", "streaming"}


def test_names_of_folders() -> None:
    assert get_model_name_from_path("/models/instellavl-1b/") == "instellavl-1b"
    assert get_model_name_from_path("runs/instellavl/checkpoint-20") == "instellavl_checkpoint-20"


def test_photos_are_rotated_upright(processor: InstellaVLProcessor, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture((25, 80)).save(tmp_path / "photo.jpg", exif=exif)
    with Image.open(tmp_path / "photo.jpg") as photo:
        assert processor.encode("A dog?", photo)["image_sizes"] == [(80, 25)]
