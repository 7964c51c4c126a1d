"""Every kind of image and annotation, good and bad, in a real run of two ranks, from files and from shards."""

from __future__ import annotations

from pathlib import Path

import yaml

from megatron_vlm.data.prepare.shard_writer import prepare_shards
from megatron_vlm.training.sample_log import read_samples
from tests.data.helpers import Folder
from tests.data.processing.test_image_formats import GOOD, REASONS, add_samples
from tests.training.tiny_run import LAYOUTS, metrics, run, write_recipe


def test_what_is_bad_is_counted_and_left_out(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, train_iters=4)
    kinds = add_samples(Folder(tmp_path / "data"))
    listed = kinds.write("kinds.jsonl")
    prepare_shards([listed], kinds.images, tmp_path / "shards", 1)
    recipe = yaml.safe_load(path.read_text())
    recipe["data"]["data_path"] = [str(listed), str(tmp_path / "shards")]
    recipe["data"]["num_workers"] = 0
    path.write_text(yaml.safe_dump(recipe))
    # Pipeline stages see different parts of a row: only the first decodes, only the last knows the labels.
    done = run(path, tmp_path / "run", "--log-samples", "true", *LAYOUTS["pp2"], ranks=2)
    assert len(metrics(tmp_path / "run")) == 4
    trained = [name for _, names in read_samples(tmp_path / "run") for name in names]
    assert set(trained) == set(GOOD)
    assert all(trained.count(name) >= 2 for name in GOOD)  # from the file and from the shards
    (line,) = [line for line in done.stdout.splitlines() if "samples rejected" in line]
    assert f"{len(REASONS)} of {len(kinds.entries)} samples rejected" in line and "kinds.jsonl" in line
    for reason in REASONS.values():
        assert f"{reason} {list(REASONS.values()).count(reason)}" in line
