"""Which samples an epoch takes."""

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


def draw(rule: str, epoch: int = 0) -> list[int]:
    return SamplingRule.parse(rule).draw(USABLE, np.random.default_rng([1, epoch])).tolist()


def test_rules_without_chance() -> None:
    assert draw("all") == GOOD
    assert draw("first:3") == [0, 2]  # of the first three as written, one is refused
    assert draw("first:25%") == [0, 2]  # ceil(2.5) = 3
    assert draw("end:2") == [8, 9]
    assert draw("end:15%") == [8, 9]
    assert sorted(draw("repeat:2")) == sorted(GOOD * 2)
    assert draw("first:99") == draw("end:99") == GOOD


@pytest.mark.parametrize(
    ("rule", "most", "count"),
    [("random:4", 1, 4), ("random:35%", 1, 4), ("random:99", 1, 9), ("choose:4", 1, 4), ("choose:20", 3, 20),
     ("repeat:1.5", 2, 13), ("repeat:0.5", 1, 4)],
)  # fmt: skip
def test_rules_with_chance(rule: str, most: int, count: int) -> None:
    drawn = Counter(draw(rule))
    assert drawn.total() == count and max(drawn.values()) <= most and 1 not in drawn
    assert draw(rule) == draw(rule)
    assert count == 9 or any(sorted(draw(rule, epoch)) != sorted(draw(rule)) for epoch in range(1, 5))


@pytest.mark.parametrize(("rule", "same"), [("random:50%", True), ("choose:10", False), ("repeat:1.5", False)])
def test_drawn_once_or_for_each_epoch(rule: str, same: bool, tmp_path: Path) -> None:
    path = annotations(tmp_path, "a", 20)
    (tmp_path / "m.yaml").write_text(f"datasets: [{{json_path: {path}, sampling_strategy: '{rule}'}}]")
    mixture = open_mixture([str(tmp_path / "m.yaml")], None)
    draws = [sorted(mixture.draw(np.ones(20, bool), seed=3, epoch=epoch).tolist()) for epoch in range(4)]
    assert (draws == [draws[0]] * 4) == same
    assert sorted(mixture.draw(np.ones(20, bool), seed=4, epoch=0).tolist()) != draws[0]


@pytest.mark.parametrize("rule", ["first", "some:3", "first:x", "repeat:0", "choose:-1", "first:1.5", "repeat:5%", ""])
def test_wrong_rules(rule: str) -> None:
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
    assert len(mixture.sources.sources) == 2 and len(mixture.sources) == 7  # a file that is used twice is opened once
    assert [rule.amount for _, rule in mixture.uses] == [Fraction(2), Fraction(2), Fraction(1)]
    drawn = mixture.draw(np.ones(7, bool), seed=3, epoch=0).tolist()
    extra = Counter(drawn) - Counter([0, 1, 4, 4, 5, 5, 6, 6])
    assert extra.total() == 1 and len(drawn) == 9 and max(extra) < 4
    assert mixture.draw(np.ones(7, bool), seed=3, epoch=0).tolist() == drawn
    draws = [Counter(mixture.draw(np.ones(7, bool), seed=3, epoch=epoch).tolist()) for epoch in range(20)]
    assert {max((one - Counter([0, 1, 4, 4, 5, 5, 6, 6])).keys()) for one in draws} == {0, 1, 2, 3}
    assert [mixture.sources.sample(n).id for n in (0, 3, 4, 6)] == ["a0", "a3", "b0", "b2"]


def test_mistakes_are_told_together(tmp_path: Path) -> None:
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
def test_nothing_there(paths: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_mixture(paths, None)


@pytest.mark.parametrize("text", ["datasets: [", "[]", "datasets: []", "other: 1"])
def test_files_that_are_no_mixture(tmp_path: Path, text: str) -> None:
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(DataError, match=r"m\.yaml"):
        open_mixture([str(tmp_path / "m.yaml")], None)


def test_a_mixture_is_checked_as_a_whole(tmp_path: Path) -> None:
    annotations(tmp_path, "a", 1)
    (tmp_path / "m.yaml").write_text("datasets: [{json_path: b.json}, {json_path: a.json}, {shard_path: c}]")
    with pytest.raises(DataError) as caught:
        open_mixture([str(tmp_path / "m.yaml")], None, str(tmp_path))
    assert "2 of 3 data sets cannot be opened" in str(caught.value)
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
