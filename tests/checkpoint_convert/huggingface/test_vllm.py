"""What vLLM reads of an exported `llava_next` folder. Files of its wheel are read and run, without installing it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from checkpoint_convert.huggingface.config import llava_next_config
from checkpoint_convert.mapping.families import LANGUAGES
from checkpoint_convert.mapping.param_map import hf_shapes, param_map
from megatron_vlm.config import ModelConfig
from megatron_vlm.data.processing.image_tokens import num_image_tokens
from megatron_vlm.data.processing.tiling import ImageGeometry
from tests.checkpoint_convert.huggingface.test_tiling_parity import PUBLISHED
from tests.checkpoint_convert.whole_model import model_config
from tests.support.published_source import PublishedModule, download_wheel
from tests.support.random_models import FAMILIES, llava_next_model

VLLM = "vllm==0.33.0"
MODELS = {"clip, olmo": {}, **FAMILIES}


def exported_config(model: ModelConfig) -> dict[str, Any]:
    """config.json of an export."""
    written: dict[str, Any] = json.loads(json.dumps(llava_next_config(model, 2, 1, "bfloat16")))
    return written


@pytest.mark.parametrize("arguments", MODELS.values(), ids=MODELS)
def test_both_levels_of_the_config_say_the_same(arguments: dict[str, Any]) -> None:
    from transformers import LlavaNextConfig

    model = model_config(llava_next_model(**arguments))
    config = exported_config(model)
    text = config["text_config"]
    assert text["architectures"] == [LANGUAGES[model.language.model_type].architecture]
    assert text["tie_word_embeddings"] is config["tie_word_embeddings"] is model.language.tie_word_embeddings
    loaded = LlavaNextConfig.from_dict(config)
    assert loaded.text_config.architectures == text["architectures"]
    assert loaded.tie_word_embeddings is loaded.text_config.tie_word_embeddings is text["tie_word_embeddings"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return download_wheel(VLLM, tmp_path_factory.mktemp("vllm"))


@pytest.mark.full
def test_vllm_has_a_class_for_every_export(wheel: Path) -> None:
    registry = PublishedModule(wheel, "vllm.model_executor.models.registry").dict_entries()
    assert registry["LlavaNextForConditionalGeneration"][0] == "llava_next"
    assert registry["OlmoForCausalLM"] == ("transformers", "TransformersForCausalLM")
    assert {family.architecture for family in LANGUAGES.values()} <= registry.keys()


@pytest.mark.full
@pytest.mark.parametrize("arguments", MODELS.values(), ids=MODELS)
def test_vllm_takes_the_language_model_from_the_config(wheel: Path, arguments: dict[str, Any]) -> None:
    """Its `with_hf_config` chooses the class, and copies the outer tie_word_embeddings over the inner one."""
    from transformers import LlavaNextConfig

    model = model_config(llava_next_model(**arguments))
    config = LlavaNextConfig.from_dict(exported_config(model))
    outer = SimpleNamespace(hf_config=config, is_multimodal_model=True, get_model_arch_config=lambda: None)
    with_hf_config = PublishedModule(wheel, "vllm.config.vllm").function(
        "VllmConfig.with_hf_config", copy=copy, replace=lambda _, model_config: model_config
    )
    inner = with_hf_config(SimpleNamespace(model_config=outer), config.text_config).hf_config
    assert inner.architectures == [LANGUAGES[model.language.model_type].architecture]
    assert inner.tie_word_embeddings is model.language.tie_word_embeddings


@pytest.mark.full
def test_vllm_knows_the_names_of_all_tensors(wheel: Path) -> None:
    """Names of its modules are those of an export; it renames only the names that transformers 5 writes."""
    source = PublishedModule(wheel, "vllm.model_executor.models.llava_next")
    renamed = {old: new for old, new in source.dict_entries().items() if isinstance(new, str) and old.endswith(".")}
    assert "model.language_model." in renamed, "the table of names has moved"
    names = hf_shapes(param_map(ModelConfig()))
    assert not [name for name in names if name.startswith(tuple(renamed))]
    modules = ("language_model.model.", "vision_tower.vision_model.", "multi_modal_projector.linear_", "image_newline")
    assert {name for name in names if not name.startswith(modules)} <= {"language_model.lm_head.weight"}
    for module in ("language_model", "vision_tower", "multi_modal_projector", "image_newline"):
        assert f"self.{module} = " in source.text
    assert "self.vision_model = " in PublishedModule(wheel, "vllm.model_executor.models.clip").text


@pytest.mark.full
def test_vllm_counts_the_image_tokens_that_we_train_on(wheel: Path) -> None:
    """Its own counting, on the published model, at the published sizes and at random ones."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    model = ModelConfig()
    config = SimpleNamespace(**exported_config(model))
    source = PublishedModule(wheel, "vllm.model_executor.models.llava_next")
    encoder = SimpleNamespace(
        get_num_image_tokens=lambda **_: model.vision.tokens_per_tile,
        get_image_size=lambda: model.vision.image_size,
        get_patch_grid_length=lambda: model.vision.image_size // model.vision.patch_size,
    )
    selected = PublishedModule(wheel, "vllm.model_executor.models.vision").function("get_num_selected_vision_tokens")
    count = source.function(
        "LlavaNextProcessingInfo.get_num_image_tokens",
        get_num_selected_vision_tokens=selected,
        get_anyres_image_grid_shape=get_anyres_image_grid_shape,
    )
    unpadded = source.function("LlavaNextProcessingInfo._get_num_unpadded_features")
    info = SimpleNamespace(
        get_hf_config=lambda: config,
        get_vision_encoder_info=lambda: encoder,
        _get_num_unpadded_features=lambda **sizes: unpadded(None, **sizes),
    )
    sizes = [*PUBLISHED, *map(tuple, np.random.default_rng(0).integers(1, 2000, (300, 2)).tolist())]
    for width, height in sizes:
        expected = num_image_tokens((width, height), ImageGeometry.of(model, "anyres"))
        assert count(info, image_width=width, image_height=height) == expected, (width, height)
