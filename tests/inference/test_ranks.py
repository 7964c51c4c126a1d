"""Tensor- and pipeline-parallel engines give the answers of one process, and all of them those of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vlm.inference.load import load_engine
from tests.inference.compare_with_transformers import compare, generate
from tests.inference.run_ranks import CONFIG, generate_at_random_times
from tests.inference.tiny_model import random_specs, write_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    write_tiny_model(folder)
    return folder


def test_two_ranks_give_the_answers_of_one(folder: Path) -> None:
    specs = random_specs(9, 80)
    with load_engine(folder / "megatron", CONFIG) as engine:
        assert engine is not None
        one = generate_at_random_times(engine, specs, 10)
    results = generate(folder, specs, 10, 2, "2x1x1x1", "1x2x1x1", "1x2x2x1", "1x1x1x2", "1x1x1x1")
    assert len(results) == 6, "a model of one rank has two engines on two"
    for layout, result in results.items():
        for alone, answer in zip(one["answers"], result["answers"], strict=True):
            assert answer["tokens"] == alone["tokens"], layout
            assert answer["logprobs"] == pytest.approx(alone["logprobs"], rel=0, abs=1e-4), layout


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_long_answers_of_random_batches_are_those_of_transformers(folder: Path) -> None:
    from checkpoint_convert import megatron_to_hf

    export = ["--load", str(folder / "megatron"), "--save", str(folder / "exported"), "--format", "llava_next"]
    assert megatron_to_hf.main(export) == 0
    lengths, differences = compare(folder, random_specs(104, 555))
    assert min(lengths) < 30
    assert 1900 < max(lengths) < 2100
    assert not differences
