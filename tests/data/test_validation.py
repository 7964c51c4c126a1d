"""Validation data: what is held out, which rows are evaluated, and that ranks share them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_vlm.config import Recipe
from megatron_vlm.data.planned_data import PlannedData, plan_data
from megatron_vlm.data.rows.rank_batch import RankView
from megatron_vlm.data.validation import ValidationRows, choose_rows, open_validation, short_names
from tests.data.helpers import make_recipe, mixed_folder, tiny_tokenizer_folder

VIEW = RankView(
    is_first_stage=False, is_last_stage=True, context=(0, 1), sequence=(0, 1), tile_ranks=1, tower_sequence_ranks=1,
    tokens_per_tile=5, patches_per_tile=4, groups_documents=False, groups_tiles=False, loss_normalization="token",
)  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two datasets of 40 and 20 samples, the second one used twice, the first one also as validation data."""
    root = tmp_path_factory.mktemp("validation")
    folder = mixed_folder(root, 40)
    folder.write("a.json")
    folder.entries = [{**entry, "id": "b" + entry["id"]} for entry in folder.entries[:20]]
    folder.write("b.jsonl")
    (root / "mix.yaml").write_text("datasets: [{json_path: a.json}, {json_path: b.jsonl, repeat: 2}]")
    made = make_recipe([str(root / "mix.yaml")], folder.images, tiny_tokenizer_folder(root / "t"), data_root=str(root))
    return replace(Recipe(), model=made.model, data=made.data, training=made.training)


def _share(recipe: Any, share: float) -> Any:
    return replace(recipe, data=replace(recipe.data, valid_share=share))


def _samples(data: PlannedData) -> Counter[int]:
    return Counter(data.plan.current.members.tolist())


def test_a_share_of_each_dataset_is_held_out(recipe: Any) -> None:
    split = _share(recipe, 0.25)
    training = plan_data(split, is_logging_rank=False)
    validation = open_validation(split, training, is_logging_rank=False)
    assert validation is not None
    trained, evaluated = _samples(training), _samples(validation)
    assert not set(trained) & set(evaluated) and set(trained) | set(evaluated) == set(range(60))
    assert set(evaluated.values()) == {1}, "once, whatever the mixture repeats"
    assert [sum(number < 40 for number in evaluated), len(evaluated)] == [10, 15]
    other = replace(split, training=replace(split.training, seed=99))
    again = open_validation(other, plan_data(other, is_logging_rank=False), is_logging_rank=False)
    assert again is not None and set(_samples(again)) == set(evaluated), "another seed"
    whole = plan_data(recipe, is_logging_rank=False)
    assert training.inputs != whole.inputs, "a resumed run notices"
    assert open_validation(recipe, whole, is_logging_rank=False) is None


def test_validation_data_of_its_own(recipe: Any) -> None:
    root = Path(recipe.data.data_root)
    other = replace(recipe, data=replace(recipe.data, valid_data_path=[str(root / "b.jsonl")]))
    training = plan_data(other, is_logging_rank=False)
    validation = open_validation(other, training, is_logging_rank=False)
    assert validation is not None
    assert sum(_samples(validation).values()) == 20 and sum(_samples(training).values()) == 80


@pytest.mark.parametrize("eval_iters", [None, 1])
def test_any_number_of_ranks_evaluates_the_same_rows(recipe: Any, eval_iters: int | None) -> None:
    split = _share(recipe, 0.25)
    split.training = replace(split.training, eval_iters=eval_iters, global_batch_size=2)
    training = plan_data(split, is_logging_rank=False)
    validation = open_validation(split, training, is_logging_rank=False)
    assert validation is not None
    found = []
    for size in (1, 2, 4):
        supervised: Counter[str] = Counter()
        for rank in range(size):
            rows = ValidationRows(
                split,
                validation,
                dp_rank=rank,
                dp_size=size,
                multiple=size,
                tile_shard=(0, 1) if rank else None,
                view=VIEW,
            )
            assert rows.num_rows % size == 0 and rows.datasets == ["a", "b"]
            batches = iter(rows)
            for _ in range(2):  # two evaluations
                for _ in range(rows.num_rows // size):
                    batch = next(batches)
                    assert batch.targets is not None and batch.token_datasets is not None
                    assert len(batch.targets) == batch.num_supervised == len(batch.token_datasets)
                    if batch.num_supervised:
                        supervised.update(batch.sample_ids)
                        assert set(batch.token_datasets.tolist()) == {name[0] == "b" for name in batch.sample_ids}
            rows.loader.close()
        assert set(supervised.values()) == {2}
        found.append(set(supervised))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 15 if eval_iters is None else 0 < len(found[0]) < 15


def test_rows_are_taken_at_equal_distances() -> None:
    plan: Any = SimpleNamespace(rows=10, row=lambda index: _Row(index))
    assert [row.members for row in choose_rows(plan, 4)] == [0, 2, 5, 7]
    assert [row.row_index for row in choose_rows(plan, 4)] == [0, 1, 2, 3]
    assert len(choose_rows(plan, None)) == len(choose_rows(plan, 99)) == 10


def _Row(index: int) -> Any:
    from megatron_vlm.data.packing.row_plan import PlannedRow

    return PlannedRow(index, 0, np.int64(index))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/data/vqa.json", "s3://x/ocr/"], ["vqa", "ocr"]),
        (["/data/a/train.json", "/data/b/train.json", "/data/c.json"], ["a/train", "b/train", "c"]),
        (["x.json"], ["x"]),
    ],
)
def test_names_are_short_and_different(paths: list[str], names: list[str]) -> None:
    assert short_names(paths) == names
