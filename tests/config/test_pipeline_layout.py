"""The notation of pipeline stages is megatron-core's."""

from __future__ import annotations

import pytest

from megatron_vlm.config.pipeline_layout import format_layout, parse_layout

LAYOUTS = {
    "Et*3|t*4|t*4|t*5L": [3, 4, 4, 5],
    "E|t*8|t*8L": [0, 8, 8],
    "Ettt|(tt|)*3,tL": [3, 2, 2, 2, 1],
    "Et,(t*2|)*2tL": [3, 2, 1],
    "Et*4|L": [4, 0],
    "Et*16L": [16],
}


@pytest.mark.parametrize(("text", "layers"), LAYOUTS.items())
def test_layers_of_each_stage_are_those_of_megatron_core(one_process: None, text: str, layers: list[int]) -> None:
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    assert parse_layout(text) == layers
    stages = PipelineParallelLayerLayout.parse_str_to_list(text)
    assert [stage.count(LayerType.decoder) for stage in stages] == layers
    assert parse_layout(format_layout(layers)) == layers


def test_format_is_short() -> None:
    assert format_layout([0, 1, 2, 5]) == "E|t|t*2|t*5L"


@pytest.mark.parametrize(
    "text", ["", "t*4", "tEt*3L", "Et*2|t*2", "Et|E|tL", "EL*2", "Et*2|(t|*2L", "Et*-1L", "Et|m|L"]
)
def test_other_texts_are_errors(text: str) -> None:
    with pytest.raises(ValueError, match="must have one E|which is none of"):
        parse_layout(text)
