"""A run on shards in an S3 store, killed twice, has the samples and losses of a run on local shards."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_vlm.data.prepare.shard_writer import prepare_shards
from megatron_vlm.data.sample_log import read_samples
from megatron_vlm.data.shards.cache import ShardCache
from tests.data.helpers import mixed_folder
from tests.support.launch import ROOT
from tests.support.s3_server import BUCKET, Fault, put_folder, store, wait_for
from tests.training.tiny_run import metrics, run, write_recipe

ITERATIONS = 20
COMPARED = ("iteration", "lm_loss", "grad_norm", "tokens", "loss_tokens", "tiles")


def kept(save: Path) -> list[dict[str, Any]]:
    """The compared metrics of each iteration; the last line of those that were repeated after a kill."""
    lines = {line["iteration"]: {name: line[name] for name in COMPARED} for line in metrics(save)}
    return [lines[number] for number in sorted(lines)]


def killed_after(recipe: Path, save: Path, log: Path, iterations: int, *flags: str) -> None:
    command = [sys.executable, "-m", "megatron_vlm.train", "--config", str(recipe), "--save", str(save), *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        job = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            wait_for(
                lambda: (
                    job.poll() is not None or ((save / "metrics.jsonl").is_file() and len(kept(save)) >= iterations)
                ),
                300,
            )
            assert job.poll() is None, log.read_text()[-3000:]
        finally:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()


@pytest.mark.timeout(900)
def test_a_run_from_s3_killed_twice_equals_the_run_from_disk(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, train_iters=ITERATIONS, save_interval=3)
    data = mixed_folder(tmp_path / "many", 240)
    prepare_shards([data.write()], data.images, tmp_path / "shards", 1, size_limit=6000, samples_per_part=60)
    files = list((tmp_path / "shards").rglob("*.mds"))
    total_bytes = sum(file.stat().st_size for file in files)
    run(recipe, tmp_path / "from_disk", "--data-path", str(tmp_path / "shards"), "--log-samples")
    with store() as proxy:
        put_folder(tmp_path / "shards", f"s3://{BUCKET}/set")
        settings = yaml.safe_load(recipe.read_text())
        settings["data"] |= {
            "data_path": [f"s3://{BUCKET}/set"],
            "cache_dir": str(tmp_path / "cache"),
            "cache_limit": f"{total_bytes // 3}b",
            "log_samples": True,
        }
        recipe.write_text(yaml.safe_dump(settings))
        proxy.faults += [Fault("error", "shard.00001", 2), Fault("disconnect", "shard.00003", 2)]
        save = tmp_path / "from_s3"
        killed_after(recipe, save, tmp_path / "log1", 5)
        killed_after(recipe, save, tmp_path / "log2", 12)
        run(recipe, save)
        downloads = [path for method, path in proxy.requests if method == "GET" and path.endswith(".mds")]
    times = Counter(downloads)
    repeated = sum(n - 1 for path, n in times.items() if not any(re.search(fault.part, path) for fault in proxy.faults))
    assert len(files) > 20 and repeated > 5  # evicted shards were downloaded again, injected faults not counted
    assert 0 < ShardCache(tmp_path / "cache" / "shards").used <= total_bytes // 3
    assert kept(save) == kept(tmp_path / "from_disk") and len(kept(save)) == ITERATIONS
    assert read_samples(save) == read_samples(tmp_path / "from_disk") and len(read_samples(save)) == 4 * ITERATIONS
    print(
        f"{ITERATIONS} iterations, {len(files)} shards of {total_bytes} bytes, cache of {total_bytes // 3} bytes: "
        f"{len(downloads)} downloads, {repeated} of them repeated"
    )
