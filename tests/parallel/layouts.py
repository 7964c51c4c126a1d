"""The parallel layouts that are compared with one process, by world size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from megatron_vlm.config import ParallelConfig


@dataclass(frozen=True)
class Layout:
    """One case: parallel sizes, `vision_parallel`, optimizer, trainable parts and model family."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    vision: str = "data"
    optimizer: str = "adam"
    trainable: tuple[str, ...] = ("vision", "projector", "language")
    bf16: bool = False
    overlap: bool = False
    recompute: str | None = None
    family: str = "clip-olmo"
    loss: str = "token"

    @property
    def name(self) -> str:
        sizes = [f"{name}{size}" for name, size in self._sizes().items() if size > 1] or ["dp"]
        extra = [self.vision] if self.vision != "data" else []
        extra += [self.optimizer] if self.optimizer != "adam" else []
        extra += ["-".join(self.trainable)] if len(self.trainable) < 3 else []
        extra += [name for name, on in (("bf16", self.bf16), ("overlap", self.overlap)) if on]
        extra += [f"recompute-{self.recompute}"] if self.recompute else []
        extra += [self.family] if self.family != "clip-olmo" else []
        extra += [f"loss-{self.loss}"] if self.loss != "token" else []
        return "_".join(sizes + extra)

    def _sizes(self) -> dict[str, int]:
        return {"tp": self.tp, "pp": self.pp, "vpp": self.vpp, "cp": self.cp}

    def parallel(self) -> ParallelConfig:
        return ParallelConfig(
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            virtual_pipeline_model_parallel_size=self.vpp,
            context_parallel_size=self.cp,
            vision_parallel=self.vision,
            # megatron-core's distributed optimizer shards Adam's state; SGD runs without it
            use_distributed_optimizer=self.optimizer == "adam",
            overlap_grad_reduce=self.overlap,
            overlap_param_gather=self.overlap,
        )


def _with_sgd(layouts: list[Layout]) -> list[Layout]:
    """Each layout with SGD too, because Adam hides a gradient of the wrong scale."""
    return layouts + [replace(layout, optimizer="sgd") for layout in layouts]


WARM_UP = ("projector",)
# One and two key/value heads: fewer than TP * CP, so that ranks replicate them.
SIGLIP_QWEN2, CLIP_MISTRAL = "siglip-qwen2", "clip-mistral"


def _family(family: str, **sizes: Any) -> Layout:
    """With SGD: some gradients of the zero biases are rounding errors, which Adam would turn into full steps."""
    return Layout(family=family, optimizer="sgd", **sizes)


LAYOUTS: dict[int, list[Layout]] = {
    1: [Layout(recompute="full"), Layout(recompute="selective")],
    2: [
        *_with_sgd(
            [Layout(), Layout(tp=2), Layout(tp=2, vision="tensor"), Layout(pp=2), Layout(cp=2), Layout(pp=2, vpp=2)]
        ),
        Layout(tp=2, trainable=WARM_UP),
        Layout(pp=2, trainable=WARM_UP),
        Layout(trainable=("vision", "projector")),
        Layout(overlap=True),
        Layout(tp=2, recompute="full"),
        _family(SIGLIP_QWEN2, tp=2, vision="tensor"),
        Layout(cp=2, loss="sample"),
        Layout(pp=2, loss="sqrt"),
        Layout(loss="sqrt"),
    ],
    4: [
        *_with_sgd(
            [
                Layout(tp=2, pp=2),
                Layout(tp=2, cp=2),
                Layout(tp=2, cp=2, vision="tensor"),
                Layout(pp=2, cp=2),
                Layout(pp=2, vpp=2, cp=2),
                Layout(tp=2),
                Layout(tp=4),
            ]
        ),
        Layout(pp=4),
        Layout(cp=4),
        Layout(tp=2, pp=2, bf16=True),
        Layout(pp=2, cp=2, trainable=WARM_UP),
        _family(SIGLIP_QWEN2, tp=4),
        _family(SIGLIP_QWEN2, tp=2, cp=2),
        _family(CLIP_MISTRAL, tp=2, cp=2),
        _family(CLIP_MISTRAL, cp=4),
        Layout(tp=2, cp=2, loss="sqrt"),
        Layout(pp=2, vpp=2, loss="sample"),
    ],
    8: [
        *_with_sgd([Layout(tp=2, pp=2, cp=2), Layout(tp=2, pp=2, vpp=2, cp=2)]),
        Layout(tp=2, pp=2, cp=2, vision="tensor"),
        Layout(tp=2, cp=2),
        Layout(tp=2, pp=2, cp=2, trainable=("projector", "language"), overlap=True),
    ],
}
