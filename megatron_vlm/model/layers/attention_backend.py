"""Which attention kernel each model part uses on this machine: `training.attention_backend`.

`auto` takes the fastest of those that work here, by MEASURED; where nothing was measured, the first in PREFERRED. An
explicit choice that does not work here is an error that says what to install.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_vlm.config import ConfigError, Recipe
from megatron_vlm.config.training import AttentionBackend
from megatron_vlm.model.layers import attention_kernels as kernels
from megatron_vlm.runtime.device import compute_capability, device_kind, on_gpu

AttentionPart = Literal["vision", "language"]


@dataclass(frozen=True)
class Measurement:
    """Forward and backward of a backend, in TFLOP/s of the scores that the masks leave."""

    backend: AttentionBackend
    part: AttentionPart
    tflops: int
    where: str


_H200 = "one NVIDIA H200, torch 2.11.0+cu130, Transformer Engine 2.11"
MEASURED = (
    # A row of 32,768 tokens with 14 documents, 16 heads of 128, causal.
    Measurement("torch_varlen", "language", 263, _H200),
    Measurement("transformer_engine", "language", 379, _H200),
    Measurement("flash_attn_3", "language", 498, _H200),
    # 46 tiles of 577 tokens, 16 heads of 64.
    Measurement("flash_attn_3", "vision", 232, _H200),
    Measurement("torch_varlen", "vision", 138, _H200),
    Measurement("transformer_engine", "vision", 119, _H200),
)
"""On CUDA. Nothing was measured on ROCm."""

PREFERRED: dict[str, tuple[AttentionBackend, ...]] = {
    "cuda": ("torch_varlen", "flash_attn_3", "flash_attn_2", "transformer_engine", "sdpa"),
    "rocm": ("flash_attn_2", "torch_varlen", "aiter", "sdpa"),
    "cpu": ("sdpa",),
}
"""Order of `auto` among backends without a measurement, which come after those with one. On ROCm it is that of AMD's
documentation. Transformer Engine is not in it: AMD's trainer turns its packed format off, because it aborts."""

_INSTALL: dict[AttentionBackend, str] = {
    "torch_varlen": "torch 2.11 or later",
    "flash_attn_2": "the package flash-attn (extra `cuda`; on ROCm, as AMD's training image has it)",
    "flash_attn_3": "FlashAttention-3, from the folder hopper of flash-attn's source",
    "transformer_engine": "Transformer Engine for PyTorch (extra `cuda`)",
    "aiter": "AMD's aiter, as AMD's training image has it",
}
_MODULES: dict[AttentionBackend, str] = {
    "flash_attn_2": "flash_attn",
    "flash_attn_3": "flash_attn_interface",
    "transformer_engine": "transformer_engine.pytorch",
    "aiter": "aiter",
}
_KERNELS: dict[AttentionBackend, kernels.Kernel] = {
    "sdpa": kernels.sdpa,
    "torch_varlen": kernels.torch_varlen,
    "flash_attn_2": kernels.flash_attn_2,
    "flash_attn_3": kernels.flash_attn_3,
    "transformer_engine": kernels.transformer_engine,
    "aiter": kernels.aiter,
}


@dataclass(frozen=True)
class Attention:
    """The attention of a model part."""

    backend: AttentionBackend
    reason: str
    """Why it was chosen, for people."""

    @property
    def kernel(self) -> kernels.Kernel:
        return _KERNELS[self.backend]

    @property
    def reads_groups(self) -> bool:
        """Whether the kernel reads groups of documents instead of cumulative lengths."""
        return self.backend == "sdpa"


def choose_attention(recipe: Recipe, part: AttentionPart) -> Attention:
    """The attention of a part on this machine; the same on every rank of machines that are alike.

    Raises:
        ConfigError: the recipe names a backend that does not work here.
    """
    training, language, vision = recipe.training, recipe.model.language, recipe.model.vision
    dtype = torch.bfloat16 if training.bf16 else torch.float32
    head_dim = language.head_width if part == "language" else vision.hidden_size // vision.num_attention_heads
    wanted, setting = training.attention_backend, "training.attention_backend"
    if part == "vision" and training.vision_attention_backend is not None:
        wanted, setting = training.vision_attention_backend, "training.vision_attention_backend"
    if wanted == "auto":
        return _fastest(part, dtype, head_dim)
    problem = why_not(wanted, dtype, head_dim)
    if problem is not None:
        raise ConfigError(f"{setting} = {wanted}: {problem}. Or use auto, which takes what works on this machine.")
    return Attention(wanted, f"as {setting} says")


def _fastest(part: AttentionPart, dtype: torch.dtype, head_dim: int) -> Attention:
    kind = device_kind()
    measured = [m for m in MEASURED if m.part == part and kind == "cuda"]
    for best in sorted(measured, key=lambda m: -m.tflops):
        if why_not(best.backend, dtype, head_dim) is None:
            return Attention(best.backend, f"{best.tflops} TFLOP/s on {best.where}")
    for backend in PREFERRED[kind]:
        if why_not(backend, dtype, head_dim) is None:
            reason = "the only one on a CPU" if kind == "cpu" else "not measured against others here"
            return Attention(backend, reason)
    raise AssertionError("sdpa works everywhere")


def why_not(backend: AttentionBackend, dtype: torch.dtype, head_dim: int) -> str | None:
    """What keeps a backend from working on this machine with this dtype and head dimension, and what to do; or None."""
    if backend == "sdpa":
        return None
    if not on_gpu():
        return "needs a GPU. Leave it out on a CPU"
    if dtype not in (torch.bfloat16, torch.float16):
        return "needs half precision. Set bf16 = true"
    if head_dim % 8 or head_dim > 256:
        return f"needs heads of a multiple of 8 and at most 256, and these have {head_dim}. Use sdpa"
    limits: dict[AttentionBackend, Callable[[], str | None]] = {
        "torch_varlen": _torch_varlen_problem,
        "flash_attn_3": lambda: _cuda_only("flash_attn_3") or _hopper_only(),
        "transformer_engine": lambda: _cuda_only("transformer_engine"),
        "aiter": lambda: None if device_kind() == "rocm" else "is for AMD GPUs. Use another backend",
    }
    problem = limits.get(backend, lambda: None)()
    return problem or _import_problem(backend)


def _torch_varlen_problem() -> str | None:
    if "window_size" in kernels.torch_varlen_parameters():
        return None
    return f"needs {_INSTALL['torch_varlen']}, and this is {torch.__version__}. Install it"


def _cuda_only(backend: AttentionBackend) -> str | None:
    if device_kind() == "cuda":
        return None
    if backend == "transformer_engine":
        return "aborts on AMD GPUs in the packed format. Use flash_attn_2, torch_varlen or aiter"
    return "is for NVIDIA GPUs. Use another backend"


def _hopper_only() -> str | None:
    major, minor = compute_capability()
    return None if major == 9 else f"needs compute capability 9, and this GPU has {major}.{minor}. Use flash_attn_2"


@functools.cache
def _import_problem(backend: AttentionBackend) -> str | None:
    module = _MODULES.get(backend)
    if module is None:
        return None
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # missing, or built for another torch
        return f"cannot be imported ({type(error).__name__}: {error}). Install {_INSTALL[backend]}"
    return None


def describe_attention(recipe: Recipe) -> str:
    """One line for the start of a run."""
    parts: tuple[AttentionPart, ...] = ("vision", "language")
    chosen = {part: choose_attention(recipe, part) for part in parts}
    return "attention: " + "; ".join(f"{part} {c.backend} ({c.reason})" for part, c in chosen.items())
