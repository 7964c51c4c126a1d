"""Conversion of 1,486,569,472 parameters: bit for bit, in every parallel layout, with logits equal to transformers'.

Needs about 8 GB of memory and 25 GB of disk; the two models are never in memory together.
"""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.support.random_folder import write_random_folder
from benchmarks.support.random_tokenizer import write_tokenizer
from checkpoint_convert import hf_to_megatron, megatron_to_hf
from checkpoint_convert.huggingface.safetensors import FolderTensors
from checkpoint_convert.megatron.files import loaded_model
from megatron_vlm.config import ModelConfig
from tests.checkpoint_convert.megatron import resave
from tests.checkpoint_convert.whole_model import our_logits, prompt
from tests.support.launch import launch

pytestmark = [pytest.mark.full, pytest.mark.timeout(3600)]

PARAMETERS = 1_486_569_472
TOLERANCE = 1e-4
PROMPTS = {"text": [], "tall": [(300, 640)], "wide": [(640, 290)]}
"""Sizes of images, (width, height)."""
WORLDS = {1: ["1,1"], 2: ["2,1", "1,2"], 4: ["4,1", "1,4", "2,2"]}
"""Number of ranks -> parallel layouts to test; the last one saves."""


def write_real_folder(folder: Path, dtype: torch.dtype) -> Path:
    """FOLDER/hf: a random model with a tokenizer."""
    model = ModelConfig()
    model.image_token_index = write_tokenizer(folder / "tokenizer")
    assert write_random_folder(folder / "hf", folder / "tokenizer", model, dtype) == PARAMETERS
    return folder / "hf"


def to_megatron(source: Path, save: Path) -> Path:
    assert hf_to_megatron.main(["--model", str(source), "--save", str(save)]) == 0
    return save


def to_hf(load: Path, save: Path) -> Path:
    assert megatron_to_hf.main(["--load", str(load), "--save", str(save), "--format", "llava_next"]) == 0
    return save


def assert_same_weights(one: Path, other: Path) -> None:
    before, after = FolderTensors(one, "llava"), FolderTensors(other, "llava")
    assert sorted(before) == sorted(after)
    for name in before:
        assert before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]), name


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_real_folder(tmp_path_factory.mktemp("real"), torch.float32)


@pytest.fixture(scope="module")
def megatron(source: Path) -> Path:
    return to_megatron(source, source.with_name("megatron"))


def test_round_trip_is_bit_for_bit(source: Path, megatron: Path) -> None:
    back = to_hf(megatron, source.with_name("back"))
    assert_same_weights(source, back)
    shutil.rmtree(back)


def write_reference_logits(source: Path, into: Path) -> None:
    """PROMPT.pt for each prompt, by transformers in fp32."""
    from transformers import LlavaNextForConditionalGeneration

    model = LlavaNextForConditionalGeneration.from_pretrained(source, dtype=torch.float32).eval()
    config = ModelConfig(image_token_index=model.config.image_token_index)
    with torch.no_grad():
        for name, sizes in PROMPTS.items():
            torch.save(model(**prompt(config, sizes)[1]).logits[0], into / f"{name}.pt")


def compare_our_logits(megatron: Path, into: Path) -> None:
    """DIFFERENCES.pt: prompt -> (tokens, largest difference, spread of the reference)."""
    found = {}
    with loaded_model(megatron) as model:
        for name, sizes in PROMPTS.items():
            reference = torch.load(into / f"{name}.pt", mmap=True)
            ours = our_logits(model, prompt(model.recipe.model, sizes)[0])
            found[name] = (len(ours), float((ours - reference).abs().max()), float(reference.std()))
    torch.save(found, into / "differences.pt")


def in_own_process(function: Callable[[Path, Path], None], *arguments: Path) -> None:
    """Its memory is freed afterwards."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_logits_equal_those_of_transformers(source: Path, megatron: Path, tmp_path: Path) -> None:
    in_own_process(write_reference_logits, source, tmp_path)
    in_own_process(compare_our_logits, megatron, tmp_path)
    differences = torch.load(tmp_path / "differences.pt")
    print(differences)
    assert list(differences) == list(PROMPTS)
    for name, (tokens, difference, spread) in differences.items():
        assert tokens > 1000 or not PROMPTS[name]
        assert spread > 0.5
        assert difference <= TOLERANCE, name


def test_every_layout_loads_and_saves_the_imported_checkpoint(tmp_path: Path) -> None:
    """In bf16, so that four ranks fit in 24 GB."""
    source = write_real_folder(tmp_path, torch.bfloat16)
    megatron = to_megatron(source, tmp_path / "megatron")
    for ranks, layouts in WORLDS.items():
        saved = tmp_path / f"saved-by-{ranks}"
        done = launch(Path(resave.__file__), megatron, saved, *layouts, ranks=ranks, timeout=1200)
        assert done.stdout.count("are equal") == ranks * len(layouts)
        if ranks == 4:
            assert_same_weights(source, to_hf(saved, tmp_path / "back"))
        shutil.rmtree(saved)
