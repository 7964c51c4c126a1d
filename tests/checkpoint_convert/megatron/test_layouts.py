"""A converted checkpoint loads in every parallel layout, and what any layout saves is exported bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.support.random_folder import write_random_folder
from checkpoint_convert import hf_to_megatron, megatron_to_hf
from checkpoint_convert.huggingface.safetensors import FolderTensors
from megatron_vlm.config import recipe_from_dict
from megatron_vlm.data.processing.tokenizer import load_tokenizer
from tests.checkpoint_convert.megatron import resave
from tests.support.forked_ranks import launch_forked
from tests.training.tiny_run import MODEL, run, write_recipe

LAYOUTS = ["1,1", "2,1", "4,1", "1,2", "1,2,Et*3|tL", "1,4", "1,4,E|t|t*2|tL", "2,2", "2,2,E|t*4L"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random `llava_next` folder, beside `recipe.yaml`, which trains it, and `imported`, the checkpoint of it."""
    folder = tmp_path_factory.mktemp("source")
    write_recipe(folder)
    model = recipe_from_dict({"model": MODEL}).model
    model.image_token_index = len(load_tokenizer(folder / "tokenizer"))
    write_random_folder(folder / "hf", folder / "tokenizer", model, torch.bfloat16)
    arguments = ["--model", str(folder / "hf"), "--save", str(folder / "imported")]
    assert hf_to_megatron.main(arguments) == 0
    return folder / "hf"


def _export(load: Path) -> Path:
    """FOLDER -> FOLDER-exported."""
    save = load.with_name(load.name + "-exported")
    arguments = ["--load", str(load), "--save", str(save), "--format", "llava_next", "--shard-gb", "0.0001"]
    assert megatron_to_hf.main(arguments) == 0
    return save


def _assert_same_weights(exported: Path, source: Path) -> None:
    after, before = FolderTensors(exported, "llava"), FolderTensors(source, "llava")
    assert sorted(after) == sorted(before)
    for name in before:
        assert after[name].dtype == before[name].dtype and torch.equal(after[name], before[name]), name


def test_imported_checkpoint_loads_in_every_layout_and_is_exported(source: Path, tmp_path: Path) -> None:
    script = Path(resave.__file__)
    done = launch_forked(script, source.parent / "imported", tmp_path / "saved", *LAYOUTS, ranks=4, timeout=240)
    assert done.stdout.count("are equal") == 4 * len(LAYOUTS)
    files = (tmp_path / "saved" / "iter_0000000").glob("__*.distcp")  # __RANK_NUMBER.distcp
    assert {file.name.split("_")[2] for file in files} == {"0", "1", "2", "3"}
    _assert_same_weights(_export(tmp_path / "saved"), source)


def test_export_of_a_training_run(source: Path, tmp_path: Path) -> None:
    """A step too small to change a weight, under tensor 2 x pipeline 2; the optimizer's state is saved with them."""
    model = ["--model.image-token-index", str(len(load_tokenizer(source.parent / "tokenizer")))]
    layout = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
    steps = ["--train-iters", "1", "--lr", "1e-30", "--weight-decay", "0", "--bf16", "--pretrained-checkpoint"]
    saved = tmp_path / "trained"
    run(source.parent / "recipe.yaml", saved, *model, *layout, *steps, str(source.parent / "imported"), ranks=4)
    exported = _export(saved)
    _assert_same_weights(exported, source)
    for name, setting in ("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length"):
        config = json.loads((exported / name).read_text())
        assert config.get("text_config", config)[setting] == 192
    (line,) = map(json.loads, (saved / "metrics.jsonl").read_text().splitlines())
    card = (exported / "README.md").read_text()
    for row in (
        "| iterations | 1 of 1 |",
        "| rows | 4 of 192 tokens, 4 per iteration |",
        f"| tokens | {line['tokens']:,}, {line['loss_tokens']:,} of them supervised |",
        f"| loss | {line['lm_loss']:.4f}, mean of the last 1 iterations |",
        "| parallelism | tensor 2 x pipeline 2 x context 1 |",
        "| started from | imported |",
    ):
        assert row in card.splitlines()
