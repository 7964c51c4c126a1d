"""Arrays are read back unchanged and memory-mapped; a truncated file is an error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_vlm.data.array_files import map_arrays, write_arrays

ARRAYS = {
    "int64": np.arange(7, dtype=np.int64),
    "empty": np.empty((0, 2), np.int32),
    "transposed": np.arange(12, dtype=np.float32).reshape(3, 4).T,
    "unaligned": np.arange(5, dtype=np.uint8),
    "last": np.arange(3, dtype=np.int64),
}


def test_round_trip(tmp_path: Path) -> None:
    write_arrays(tmp_path / "new" / "a.arrays", **ARRAYS)
    read = map_arrays(tmp_path / "new" / "a.arrays")
    assert list(read) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert (
            read[name].dtype == array.dtype
            and read[name].flags.aligned
            and not (array.size and read[name].flags.writeable)
        )
        np.testing.assert_array_equal(read[name], array)
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_mapped_arrays_outlive_the_replacement_of_their_file(tmp_path: Path) -> None:
    write_arrays(tmp_path / "a.arrays", x=np.arange(1000))
    before = map_arrays(tmp_path / "a.arrays")["x"]
    write_arrays(tmp_path / "a.arrays", x=np.zeros(1000, int))
    assert before.sum() == 499500 and not map_arrays(tmp_path / "a.arrays")["x"].any()


@pytest.mark.parametrize("size", [0, 10, 100, 300, -50])
def test_a_truncated_file_is_an_error(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.arrays"
    write_arrays(path, **ARRAYS)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError):
        map_arrays(path)


def test_a_failed_write_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_arrays(tmp_path / "a.arrays", x=np.array([object()]))
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError):
        map_arrays(tmp_path / "a.arrays")
