"""--model_args of lmms-eval."""

from __future__ import annotations

import pytest

from megatron_vlm.config import InferenceConfig
from megatron_vlm.evaluation.model_args import engine_config

PUBLISHED = {"conv_template": "instella", "model_name": "instellavl"}


def test_the_published_arguments(caplog: pytest.LogCaptureFixture) -> None:
    assert engine_config(PUBLISHED, 1).inference_max_requests == InferenceConfig().inference_max_requests
    assert not caplog.records
    engine_config(PUBLISHED | {"use_cache": True, "device_map": "auto"}, "auto")
    assert "device_map, use_cache" in caplog.text


def test_sizes_of_the_engine() -> None:
    assert engine_config({}, "8").inference_max_requests == 8
    config = engine_config({"inference_dynamic_batching_buffer_size_gb": 3, "inference_max_requests": 5}, 8)
    assert (config.inference_dynamic_batching_buffer_size_gb, config.inference_max_requests) == (3.0, 5)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="model_args has colour, which .* It takes pretrained, conv_template, inferen"):
        engine_config({"colour": "red"}, 1)
    with pytest.raises(ValueError, match="conv_template is 'vicuna'"):
        engine_config({"conv_template": "vicuna"}, 1)
