"""The published model at its real size: every gradient tensor at tensor-parallel size 2 equals that of one process."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.support.launch import launch
from tests.support.planned_bytes import check_planned

MOST_BYTES = 22e9
TOLERANCE = 1e-5


def differences(ours: Path, reference: Path) -> dict[str, float]:
    """|ours - reference| / |reference| of every tensor, through the disk; nan if one side lacks it."""
    names = {path.name for folder in (ours, reference) for path in folder.glob("*.npy")}
    found = {}
    for name in names:
        if not ((ours / name).is_file() and (reference / name).is_file()):
            found[name] = float("nan")
            continue
        a, b = (np.load(folder / name, mmap_mode="r").reshape(-1) for folder in (ours, reference))
        error = norm = 0.0
        for start in range(0, len(b), 1 << 24):
            part = b[start : start + (1 << 24)].astype(np.float64)
            norm += float((part**2).sum())
            error += float(((a[start : start + (1 << 24)] - part) ** 2).sum())
        found[name] = error**0.5 / max(norm**0.5, 1e-12)
    return found


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_every_gradient_at_tensor_parallel_size_2(tmp_path: Path) -> None:
    for ranks in (1, 2):
        launch("-m", "tests.parallel.run_real_size", tmp_path / str(ranks), ranks=ranks, timeout=3500)
    reports = {ranks: json.loads((tmp_path / str(ranks) / "report.json").read_text()) for ranks in (1, 2)}
    print(json.dumps(reports, indent=1))
    for report in reports.values():
        assert report["tokens"] >= 4096 and report["tiles"] > 0
        assert sum(report["peak_bytes"]) < MOST_BYTES
        assert report["stage1"]["updated"] and report["stage1"]["grad_norm"] > 0
        for part in ("gradients", "stage1"):
            check_planned(report[part]["counted"], report[part]["planned"], f"in {part}")
    for part in ("gradients", "stage1"):
        found = differences(tmp_path / "2" / part, tmp_path / "1" / part)
        print(part, len(found), "tensors, worst:", max(found.items(), key=lambda item: item[1]))
        assert len(found) > 3
        elements = sum(np.load(path, mmap_mode="r").size for path in (tmp_path / "1" / part).glob("*.npy"))
        assert 4 * elements == reports[1][part]["counted"]["gradients"]  # all that is trained; layers are stacked
        assert all(difference <= TOLERANCE for difference in found.values()), found
    losses = [reports[ranks]["gradients"]["loss"] for ranks in (1, 2)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
