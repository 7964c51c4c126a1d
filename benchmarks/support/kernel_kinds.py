"""The time of a profiled step by kind of work, such as matrix products and attention."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import torch

from megatron_vlm.runtime.device import on_gpu

_KINDS = (
    ("communication", r"nccl|rccl|all_?reduce|all_?gather|reduce_?scatter|all_?to_?all"),
    ("attention", r"flash|fmha|sdpa|attention|softmax_warp|cudnn.*sdp|aotriton|ck_tile.*fmha"),
    (
        "matrix products",
        r"gemm|nvjet|cutlass|xmma|cublas|hipblas|Cijk_|aten::(mm|addmm|bmm|linear|matmul)\b|convolution",
    ),
    ("optimizer", r"adam|multi_tensor|foreach|l2norm"),
    ("norms", r"layer_?norm|rms_?norm"),
    ("compiled elementwise", r"triton_"),
    ("indexing", r"index|gather|scatter|embedding|sort|cub::"),
    ("copies", r"memcpy|memset|copy|CatArray|aten::cat\b|fill|transpose"),
)
OTHER = "other"


def kind_of(kernel: str) -> str:
    """The kind of a kernel, or of a torch operation on a CPU, by its name."""
    return next((kind for kind, pattern in _KINDS if re.search(pattern, kernel, re.IGNORECASE)), OTHER)


def seconds_by_kind(profile: Any) -> dict[str, float]:
    """Seconds of a torch.profiler.profile by kind, longest first; on a CPU, of torch's operations by themselves."""
    total: dict[str, float] = defaultdict(float)
    for event in profile.key_averages():
        if on_gpu():
            # Operations on the host carry the time of their kernels a second time.
            if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
                total[kind_of(event.key)] += event.self_device_time_total / 1e6
        else:
            total[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    return dict(sorted(total.items(), key=lambda item: -item[1]))
