"""Prepares a process for megatron-core. Every module that imports `megatron.core` imports this one first.

The import raises an ImportError if the extra `train` is not installed, filters megatron-core's warnings that are known
noise, gives it an AdamW and gradient clipping where neither Apex nor Transformer Engine is installed (fused_adam.py,
gradient_clipping.py), and on a machine without a GPU patches torch so that megatron-core runs on the CPU: it asks CUDA
for a device, streams, events and tensor types, and gets the CPU's own, or objects that do nothing.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
import torch.utils._device

from megatron_vlm.runtime.device import on_gpu
from megatron_vlm.runtime.fused_adam import install_fused_adam
from megatron_vlm.runtime.gradient_clipping import install_gradient_clipping

CPU = torch.device("cpu")
_FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "eye", "full", "full_like", "linspace", "ones", "ones_like", "rand",
    "randint", "randn", "tensor", "zeros", "zeros_like",
)  # fmt: skip


class _NoOp:
    """Replaces a CUDA stream or event; every method does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., _NoOp]:
        return lambda *args, **kwargs: _NoOp()


class _NoOpStream(_NoOp): ...


class _NoOpEvent(_NoOp): ...


def install() -> None:
    """Apply the patches. Calling it again has no effect."""
    if not getattr(install, "done", False):
        install.done = True  # type: ignore[attr-defined]
        if not on_gpu():
            _redirect_cuda_calls()
            _redirect_cuda_devices()
            with _without_compiler():
                import megatron.core.tensor_parallel.random as megatron_random

            megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
        install_fused_adam()
        install_gradient_clipping()


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    """Inside the block, torch.compile returns functions as they are.

    megatron-core compiles its fused operations, which loads torch's compiler: half of the time that the import takes.
    On a CPU nothing of ours calls them.
    """
    compiler = torch.compile
    torch.compile = lambda function=None, **_: function or (lambda decorated: decorated)  # type: ignore
    try:
        yield
    finally:
        torch.compile = compiler


def _redirect_cuda_calls() -> None:
    cuda: Any = torch.cuda
    # One function per name: torch._dynamo rejects one object under two names.
    cuda.current_device = lambda: CPU
    cuda.set_device = lambda *args, **kwargs: None
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.Stream, cuda.Event = _NoOpStream, _NoOpEvent
    cuda.current_stream = lambda *args: _NoOp()
    cuda.default_stream = lambda *args: _NoOp()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.memory_allocated = lambda *args: 0
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.FloatTensor, cuda.HalfTensor, cuda.BFloat16Tensor = torch.FloatTensor, torch.HalfTensor, torch.BFloat16Tensor


def _is_cuda(device: Any) -> bool:
    return str(device).startswith("cuda")


def _redirect_cuda_devices() -> None:
    # torch caches the list of its factories when `with torch.device(...)` is first entered. It must list the original
    # functions: otherwise transformers' loading on the meta device does not initialise buffers.
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


_NEEDED = {"megatron": "megatron-core", "psutil": "psutil"}
"""Module -> package of the extra `train`; megatron-core does not work without them."""

if _missing := [package for module, package in _NEEDED.items() if find_spec(module) is None]:
    raise ImportError(
        f"training and conversion need {', '.join(_missing)}, which is not installed: pip install 'megatron-vlm[train]'"
    )

# Regular expressions that known noise begins with. All other warnings are shown.
_NOISE: list[tuple[type[Warning], str]] = [
    # Apex and Transformer Engine are optional: norms and Adam are this package's own.
    (UserWarning, "(Transformer Engine and )?Apex (is|are) not installed"),
    # About the default value of megatron-core's own setting cuda_graph_scope.
    (UserWarning, "full scope is deprecated"),
    # torch's new names of collectives and of checkpoint functions, which megatron-core does not use yet.
    (FutureWarning, r"`torch\.distributed\.\w+` is deprecated"),
    (FutureWarning, "Please use DTensor instead and we are deprecating ShardedTensor"),
    (FutureWarning, "`load_state_dict` is deprecated"),
]
if not on_gpu():
    # About the overlap of CUDA kernels.
    _NOISE.append((UserWarning, "When using .* it is recommended to set the environment variable CUDA_DEVICE_MAX_CONN"))
for _category, _message in _NOISE:
    warnings.filterwarnings("ignore", _message, _category)

install()
