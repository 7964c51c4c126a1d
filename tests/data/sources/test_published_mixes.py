"""The three published mixtures have the published entries, and the table of datasets matches them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from megatron_vlm.commands import make_data_folders
from megatron_vlm.data.sources.mixture_file import read_mixture

MIXES = Path(__file__).parents[3] / "examples" / "instellavl" / "mixes"


@pytest.mark.parametrize(
    ("stage", "entries", "sources", "kinds"),
    [
        ("warmup", 1, 1, {"all": 1}),
        ("pretrain", 30, 30, {"all": 27, "choose": 3}),
        ("instruct", 133, 131, {"all": 108, "choose": 19, "repeat": 6}),
    ],
)
def test_mixes(stage: str, entries: int, sources: int, kinds: dict[str, int]) -> None:
    mixture = read_mixture(MIXES / f"{stage}.yaml", "s3://bucket/data/")
    assert (len(mixture), len({path for path, _ in mixture})) == (entries, sources)
    assert all(path.startswith(f"s3://bucket/data/{stage}/") for path, _ in mixture)
    assert Counter(rule.kind for _, rule in mixture) == kinds
    names = {row["name"] for row in make_data_folders.read_datasets(stage)}
    assert names == {path.rpartition("/")[2] for path, _ in mixture}


def test_folders_and_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool = make_data_folders
    assert tool.main(["--stage", "pretrain", "--data-root", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "raw" / "pretrain" / "docvqa" / "images").is_dir() and "30 folders" in printed
    line = next(line for line in printed.splitlines() if "hiertext" in line)
    assert "CC BY-SA 4.0" in line and line.endswith("https://github.com/google-research-datasets/hiertext")
    assert tool.main(["--commands", "--data-root", "my data"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 162 and "'my data/raw/warmup/instella_alignment/images'" in lines[0]
