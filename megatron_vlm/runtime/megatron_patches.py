"""What megatron-core needs before it runs on a machine without a GPU.

megatron-core asks CUDA for a device, for streams and events, and for the names of types; on a CPU each of these is
answered with the CPU's own or with an object that does nothing. It also expects an Adam whose `step` is in the param
group, from Apex or Transformer Engine: where neither is installed, ours takes the place (on a GPU too).

Importing this module installs the patches. Every module that imports `megatron.core` imports this one first.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.utils._device

from megatron_vlm.runtime.device import on_gpu
from megatron_vlm.runtime.fused_adam import FusedAdam

CPU = torch.device("cpu")
_FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "eye", "full", "full_like", "linspace", "ones", "ones_like", "rand",
    "randint", "randn", "tensor", "zeros", "zeros_like",
)  # fmt: skip


class _Idle:
    """Stands in for a CUDA stream or event: every method does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., _Idle]:
        return lambda *args, **kwargs: _Idle()


class _IdleStream(_Idle): ...


class _IdleEvent(_Idle): ...


def install() -> None:
    """Prepare this process for megatron-core. Safe to call more than once."""
    if not getattr(install, "done", False):
        install.done = True  # type: ignore[attr-defined]
        if not on_gpu():
            _answer_for_cuda()
            _answer_for_device_arguments()
            import megatron.core.tensor_parallel.random as megatron_random

            megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
        _provide_adam()


def _answer_for_cuda() -> None:
    cuda: Any = torch.cuda
    # One function per name: torch._dynamo refuses one object under two names.
    cuda.current_device = lambda: CPU
    cuda.set_device = lambda *args, **kwargs: None
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.Stream, cuda.Event = _IdleStream, _IdleEvent
    cuda.current_stream = lambda *args: _Idle()
    cuda.default_stream = lambda *args: _Idle()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.memory_allocated = lambda *args: 0
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.FloatTensor, cuda.HalfTensor, cuda.BFloat16Tensor = torch.FloatTensor, torch.HalfTensor, torch.BFloat16Tensor


def _is_cuda(device: Any) -> bool:
    return str(device).startswith("cuda")


def _answer_for_device_arguments() -> None:
    # torch lists its factories when a `with torch.device(...)` is first entered: it must see its own, not ours, or
    # transformers' meta-device loading leaves buffers unset.
    torch.utils._device._device_constructors()
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]

    def on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(factory)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = CPU
            return factory(*args, **kwargs)

        return wrapped

    for name in _FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))

    to, type_ = tensor.to, tensor.type

    def to_cpu(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        args = tuple(CPU if isinstance(a, str | torch.device) and _is_cuda(a) else a for a in args)
        return to(self, *args, **{k: CPU if k == "device" and _is_cuda(v) else v for k, v in kwargs.items()})

    def type_as_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return type_(self, *args, **kwargs) if args or kwargs else type_(self).replace("torch.", "torch.cuda.")

    tensor.to, tensor.type = to_cpu, type_as_cuda


def _provide_adam() -> None:
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed

    if optimizer.USING_PYTORCH_OPTIMIZER:  # neither Apex nor Transformer Engine
        optimizer.Adam = distributed.Adam = FusedAdam
        optimizer.USING_PYTORCH_OPTIMIZER = False
        distributed.HAVE_APEX_OR_TE = distributed.USING_APEX_OPTIMIZER = True


_NEEDED = {"megatron": "megatron-core", "psutil": "psutil"}
"""Module -> package, of those in the extra `train` that nothing of megatron-core works without."""

if _missing := [package for module, package in _NEEDED.items() if find_spec(module) is None]:
    raise ImportError(
        f"training and conversion need {', '.join(_missing)}, which is not installed: pip install 'megatron-vlm[train]'"
    )
# megatron-core tells its own developers of its own deprecations, some from every layer of every rank.
warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"megatron\.core")
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
# torch renames collectives that megatron-core still calls by their old names.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")

install()
