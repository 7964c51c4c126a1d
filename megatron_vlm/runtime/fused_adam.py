"""AdamW on torch's fused kernel, for megatron-core without Apex and Transformer Engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class FusedAdam(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101) with `step` in the param group, as in Apex and Transformer Engine.

    torch.optim.AdamW has one `step` per parameter, and loading megatron-core's `fully_reshardable` optimizer checkpoint
    into that fails (KeyError: 'step').
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        **_: Any,
    ) -> None:
        if not (bias_correction and adam_w_mode):
            raise ValueError("FusedAdam is AdamW with bias correction; bias_correction and adam_w_mode must be True")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            # Counted on ranks without gradients too: `step` must be the same on all ranks.
            group["step"] = group.get("step", 0) + 1
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            # One tensor for all, filled on the device: a copy from the host for each parameter would wait 351 times.
            step = torch.full((), float(group["step"]), device=params[0].device)
            torch._fused_adamw_(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                [step] * len(params),
                lr=float(group["lr"]),
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )


def install_fused_adam() -> None:
    """Make megatron-core use FusedAdam where neither Apex nor Transformer Engine is installed, on GPUs too."""
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed

    if optimizer.USING_PYTORCH_OPTIMIZER:
        optimizer.Adam = distributed.Adam = FusedAdam
        optimizer.USING_PYTORCH_OPTIMIZER = False
        distributed.HAVE_APEX_OR_TE = distributed.USING_APEX_OPTIMIZER = True
