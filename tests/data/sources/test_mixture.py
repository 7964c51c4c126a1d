"""The samples that the entries of a mixture select for an epoch."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from megatron_vlm.data.errors import DataError
from megatron_vlm.data.sources.mixture import describe_mixture, open_mixture
from megatron_vlm.data.sources.mixture_file import SamplingRule
from tests.data.helpers import Folder

USABLE = np.array([True, False] + [True] * 8)  # 9 of 10
GOOD = [0, 2, 3, 4, 5, 6, 7, 8, 9]


def select(rule: str, epoch: int = 0) -> list[int]:
    return SamplingRule.parse(rule).select(USABLE, np.random.default_rng([1, epoch])).tolist()


def test_deterministic_rules() -> None:
    assert select("all") == GOOD
    assert select("first:3") == [0, 2]  # the first three without the rejected one
    assert select("first:25%") == [0, 2]  # ceil(2.5) = 3
    assert select("end:2") == [8, 9]
    assert select("end:15%") == [8, 9]
    assert sorted(select("repeat:2")) == sorted(GOOD * 2)
    assert select("first:99") == select("end:99") == GOOD


@pytest.mark.parametrize(
    ("rule", "most", "count"),
    [("random:4", 1, 4), ("random:35%", 1, 4), ("random:99", 1, 9), ("choose:4", 1, 4), ("choose:20", 3, 20),
     ("repeat:1.5", 2, 13), ("repeat:0.5", 1, 4)],
)  # fmt: skip
def test_random_rules(rule: str, most: int, count: int) -> None:
    selected = Counter(select(rule))
    assert selected.total() == count and max(selected.values()) <= most and 1 not in selected
    assert select(rule) == select(rule)
    assert count == 9 or any(sorted(select(rule, epoch)) != sorted(select(rule)) for epoch in range(1, 5))


@pytest.mark.parametrize(("rule", "same"), [("random:50%", True), ("choose:10", False), ("repeat:1.5", False)])
def test_fixed_and_per_epoch_sampling(rule: str, same: bool, tmp_path: Path) -> None:
    path = annotations(tmp_path, "a", 20)
    (tmp_path / "m.yaml").write_text(f"datasets: [{{json_path: {path}, sampling_strategy: '{rule}'}}]")
    mixture = open_mixture([str(tmp_path / "m.yaml")], None)
    epochs = [sorted(mixture.sample_epoch(np.ones(20, bool), seed=3, epoch=epoch).tolist()) for epoch in range(4)]
    assert (epochs == [epochs[0]] * 4) == same
    assert sorted(mixture.sample_epoch(np.ones(20, bool), seed=4, epoch=0).tolist()) != epochs[0]


@pytest.mark.parametrize("rule", ["first", "some:3", "first:x", "repeat:0", "choose:-1", "first:1.5", "repeat:5%", ""])
def test_invalid_rules(rule: str) -> None:
    with pytest.raises(ValueError, match=r"expected all, first:N"):
        SamplingRule.parse(rule)


def annotations(root: Path, name: str, count: int) -> str:
    folder = Folder(root)
    for i in range(count):
        folder.add(f"{name}{i}", "hi", "yes")
    return str(folder.write(f"{name}.json"))


def test_mixture_of_sources(tmp_path: Path) -> None:
    a, b = annotations(tmp_path, "a", 4), annotations(tmp_path, "b", 3)
    (tmp_path / "mix.yaml").write_text(f"""
datasets:
  - json_path: {a}
    sampling_strategy: "first:2"
  - json_path: {b}
    repeat: 2
  - json_path: {a}
    choose: 1
""")
    mixture = open_mixture([str(tmp_path / "mix.yaml")], None)
    assert len(mixture.sources.sources) == 2 and len(mixture.sources) == 7  # a file with two entries is opened once
    assert [rule.amount for _, rule in mixture.entries] == [Fraction(2), Fraction(2), Fraction(1)]
    samples = mixture.sample_epoch(np.ones(7, bool), seed=3, epoch=0).tolist()
    extra = Counter(samples) - Counter([0, 1, 4, 4, 5, 5, 6, 6])
    assert extra.total() == 1 and len(samples) == 9 and max(extra) < 4
    assert mixture.sample_epoch(np.ones(7, bool), seed=3, epoch=0).tolist() == samples
    epochs = [Counter(mixture.sample_epoch(np.ones(7, bool), seed=3, epoch=epoch).tolist()) for epoch in range(20)]
    assert {max((one - Counter([0, 1, 4, 4, 5, 5, 6, 6])).keys()) for one in epochs} == {0, 1, 2, 3}
    assert [mixture.sources.sample(n).id for n in (0, 3, 4, 6)] == ["a0", "a3", "b0", "b2"]


def test_all_invalid_entries_are_reported_together(tmp_path: Path) -> None:
    path = tmp_path / "mix.yaml"
    path.write_text("""
datasets:
  - json_path: a.json
    shard_path: b
  - json_path: a.json
    sampling: all
  - shard_path: b
    choose: 3
    repeat: 2
  - json_path: a.json
    sampling_strategy: most
""")
    with pytest.raises(DataError) as caught:
        open_mixture([str(path)], None)
    for part in ("datasets[0]: give exactly one", "datasets[1]: unknown keys ['sampling']", "datasets[2]: give one of",
                 "datasets[3]: 'most': expected"):  # fmt: skip
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("paths", "message"),
    [([], "no data"), (["absent.json"], "does not exist|cannot be read"), (["absent"], "does not exist"),
     (["absent.yaml"], "cannot be read"), ([__file__], "neither annotations")],
)  # fmt: skip
def test_paths_that_cannot_be_opened(paths: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_mixture(paths, None)


@pytest.mark.parametrize("text", ["datasets: [", "[]", "datasets: []", "other: 1"])
def test_files_that_are_not_a_mixture(tmp_path: Path, text: str) -> None:
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(DataError, match=r"m\.yaml"):
        open_mixture([str(tmp_path / "m.yaml")], None)


def test_all_sources_that_cannot_be_opened_are_reported_together(tmp_path: Path) -> None:
    annotations(tmp_path, "a", 1)
    (tmp_path / "m.yaml").write_text("datasets: [{json_path: b.json}, {json_path: a.json}, {shard_path: c}]")
    with pytest.raises(DataError) as caught:
        open_mixture([str(tmp_path / "m.yaml")], None, str(tmp_path))
    assert "2 of 3 datasets cannot be opened" in str(caught.value)
    assert "b.json" in str(caught.value) and "c does not exist" in str(caught.value)


def test_table_of_a_mixture(tmp_path: Path) -> None:
    annotations(tmp_path, "a", 4), annotations(tmp_path, "b", 3)
    (tmp_path / "m.yaml").write_text(
        "datasets: [{json_path: a.json}, {json_path: b.json, repeat: 2}, {json_path: a.json, choose: 25%}]"
    )
    mixture = open_mixture([str(tmp_path / "m.yaml")], None, str(tmp_path))
    lines = describe_mixture(mixture, np.arange(7) != 0, np.full(7, 1000), np.arange(7), seed=1).splitlines()
    assert [line.split()[1:4] for line in lines[1:4]] == [
        ["all", "4", "3"],
        ["repeat:2", "3", "6"],
        ["choose:25%", "4", "1"],
    ]
    assert lines[2].split()[-4:] == ["6,000", "30", "60.00", "%"]
    assert lines[-1].split()[:4] == ["all", "11", "10", "10,000"] and lines[-1].endswith("100.00 %")
