"""All kinds of valid and invalid images and annotations in a run of two ranks, from files and from shards."""

from __future__ import annotations

from pathlib import Path

import yaml

from megatron_vlm.data.prepare.shard_writer import prepare_shards
from megatron_vlm.data.sample_log import read_samples
from tests.data.helpers import Folder
from tests.data.processing.test_image_formats import GOOD, REASONS, add_samples
from tests.training.tiny_run import LAYOUTS, metrics, run, write_recipe


def test_invalid_samples_are_counted_and_left_out(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, train_iters=4)
    kinds = add_samples(Folder(tmp_path / "data"))
    annotations = kinds.write("kinds.jsonl")
    prepare_shards([annotations], kinds.images, tmp_path / "shards", 1)
    recipe = yaml.safe_load(path.read_text())
    recipe["data"]["data_path"] = [str(annotations), str(tmp_path / "shards")]
    recipe["data"]["num_workers"] = 0
    path.write_text(yaml.safe_dump(recipe))
    # Pipeline stages read different fields of a row: only the first decodes images, only the last uses labels.
    done = run(path, tmp_path / "run", "--log-samples", "true", *LAYOUTS["pp2"], ranks=2)
    assert len(metrics(tmp_path / "run")) == 4
    trained = [name for _, names in read_samples(tmp_path / "run") for name in names]
    assert set(trained) == set(GOOD)
    assert all(trained.count(name) >= 2 for name in GOOD)  # from the file and from the shards
    (report,) = [line for line in done.stdout.splitlines() if "samples rejected" in line]
    assert f"{len(REASONS)} of {len(kinds.entries)} samples rejected" in report and "kinds.jsonl" in report
    for reason in REASONS.values():
        assert f"{reason} {list(REASONS.values()).count(reason)}" in report
