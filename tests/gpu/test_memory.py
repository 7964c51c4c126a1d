"""The error message when a GPU is out of memory."""

from __future__ import annotations

import pytest
import torch

from megatron_vlm.runtime.out_of_memory import describe_out_of_memory, is_out_of_memory

pytestmark = pytest.mark.gpu


def test_the_message_reports_the_memory_of_the_gpu() -> None:
    with pytest.raises(torch.OutOfMemoryError) as raised:
        torch.empty(2**50, dtype=torch.uint8, device="cuda")
    assert is_out_of_memory(raised.value)
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    assert f"has {total:.1f} GiB; torch has reserved" in describe_out_of_memory(raised.value)
