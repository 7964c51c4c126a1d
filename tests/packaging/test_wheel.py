"""The built wheel in environments of its own, used from an empty folder: nothing of the repository is found there."""

from __future__ import annotations

import json
import os
import subprocess
import zipfile
from pathlib import Path

import pytest
import yaml

from benchmarks.support.random_tokenizer import write_tokenizer
from tests.data.helpers import mixed_folder
from tests.support.environments import Environment, copy_sources, empty_environment
from tests.support.launch import ROOT
from tests.support.random_models import LANGUAGE_SIZES, VISION_SIZES

pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]

IMAGES = 20
STEPS = 5


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return empty_environment(tmp_path_factory.mktemp("wheel") / "environment")


@pytest.fixture(scope="module")
def wheel(environment: Environment) -> Path:
    folder = environment.folder.parent
    environment.pip("build")
    done = environment.run("-m", "build", "--wheel", "--outdir", folder, copy_sources(folder / "source"), timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user has: annotations, images, a tokenizer and a recipe."""
    folder = tmp_path_factory.mktemp("work")
    data = mixed_folder(folder, samples=IMAGES)  # a quarter of the samples has two images, a quarter has none
    assert len(list(data.images.iterdir())) == IMAGES
    data.write("train.json")
    recipe = {
        "model": {
            "vision": VISION_SIZES,
            "language": LANGUAGE_SIZES,
            "image_token_index": write_tokenizer(folder / "tokenizer"),
            "image_grid_pinpoints": [[28, 28], [28, 56], [56, 28]],
        },
        "data": {"data_path": ["shards"], "tokenizer_model": "tokenizer", "seq_length": 256, "max_tiles_per_row": 16},
        "training": {"train_iters": STEPS, "global_batch_size": 2, "lr": 1e-3},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def megatron_vlm(environment: Environment, folder: Path, *arguments: str, ranks: int = 1) -> str:
    """What the installed command prints; with torchrun's, if there are several ranks."""
    programs = environment.folder / "bin"
    torchrun: list[str | Path] = [programs / "torchrun", "--standalone", "--nproc-per-node", str(ranks), "--no-python"]
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [*(torchrun if ranks > 1 else []), programs / "megatron-vlm", *arguments],
        cwd=folder,
        env={**variables, "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_files_of_the_wheel(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"megatron_vlm", "checkpoint_convert", "instellavl"}
    assert {f"{package}/py.typed" for package in tops} <= set(names)
    assert "megatron_vlm/commands/published_datasets.csv" in names
    assert "megatron_vlm/inference/server/chat_page.html" in names


def test_data_commands_without_megatron_core(environment: Environment, wheel: Path, work: Path) -> None:
    environment.pip("-c", ROOT / "constraints.txt", f"{wheel}[data]")
    found = environment.run(
        "-c", "from importlib.util import find_spec as find; print(find('megatron'), find('streaming'))"
    )
    assert found.stdout == "None None\n", found.stderr
    where = environment.run("-c", "import megatron_vlm; print(megatron_vlm.__file__)").stdout
    assert where.startswith(str(environment.packages))

    assert "prepare-shards" in megatron_vlm(environment, work, "--help")
    assert "megatron-core not installed" in megatron_vlm(environment, work, "--version")
    annotations = ("--annotations", "train.json", "--image-folder", "images")
    written = megatron_vlm(environment, work, "prepare-shards", *annotations, "--output", "shards", "--processes", "1")
    assert f"{IMAGES} samples read = {IMAGES} written with {IMAGES} images + 0 quarantined" in written
    assert "sample 1:" in megatron_vlm(environment, work, "show-sample", "--config", "recipe.yaml", "--index", "1")
    megatron_vlm(environment, work, "data-report", "--config", "recipe.yaml", "--output", "report")
    assert list((work / "report").glob("*.html"))
    assert "warmup" in megatron_vlm(environment, work, "make-data-folders", "--stage", "warmup")


def test_from_shards_to_a_verified_export(environment: Environment, wheel: Path, work: Path) -> None:
    if not (work / "shards").exists():
        pytest.fail("this test needs the shards of the one before: run the whole file")
    environment.pip("-c", ROOT / "constraints.txt", f"{wheel}[train]")
    assert f"{STEPS} steps" in megatron_vlm(environment, work, "plan", "--config", "recipe.yaml")
    megatron_vlm(environment, work, "train", "--config", "recipe.yaml", "--save", "run")
    more = ("--train-iters", str(STEPS + 2), "--save", "run")
    megatron_vlm(environment, work, "train", "--config", "recipe.yaml", *more, ranks=2)
    lines = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "lm_loss" in line] == list(range(1, STEPS + 3))

    megatron_vlm(environment, work, "export", "--load", "run", "--save", "hf", "--format", "llava_next")
    assert "the same" in megatron_vlm(environment, work, "verify", "run", "hf")
    megatron_vlm(environment, work, "import", "--model", "hf", "--save", "imported")
    assert "the same" in megatron_vlm(environment, work, "verify", "run", "imported")
