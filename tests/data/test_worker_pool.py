"""Results come in order; a worker process that dies is an error."""

from __future__ import annotations

import os
import signal

import pytest

from megatron_vlm.data.errors import DataError
from megatron_vlm.data.worker_pool import parallel_map


@pytest.mark.parametrize("processes", [1, 2, None])
@pytest.mark.parametrize("total", [0, 1, 700])
def test_order(processes: int | None, total: int) -> None:
    assert list(parallel_map(lambda i: i * i, total, processes, "squaring")) == [i * i for i in range(total)]


def test_a_process_that_dies() -> None:
    def die(index: int) -> int:
        if index == 300:
            os.kill(os.getpid(), signal.SIGKILL)
        return index

    with pytest.raises(DataError, match="dying: a worker process died"):
        list(parallel_map(die, 700, 2, "dying"))
