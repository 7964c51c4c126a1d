"""The parallel layouts that are compared with one process, by world size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from megatron_vlm.config import ParallelConfig


@dataclass(frozen=True)
class Layout:
    """One case: parallel sizes, `vision_parallel`, optimizer, trainable parts, model family, and its rows."""

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
    modules: tuple[str, ...] = ()
    """recompute_modules, where `recompute` is selective."""
    recompute_layers: int | None = None
    stages: str | None = None
    """pipeline_model_parallel_layout; the tiny model has four language layers."""
    buckets: bool = False
    """Overlap with gradient buckets of few parameters, so that each chunk has several."""
    batch: int = 8
    """Rows per step. Over the data ranks, that gives the micro-batches that are accumulated."""
    rows: str = "mixed"
    """Which rows: see tests.parallel.rows.ROWS."""

    lora: tuple[str, ...] = ()
    """lora_target_modules, where `trainable` has language_lora."""

    @property
    def name(self) -> str:
        sizes = [f"{name}{size}" for name, size in self._sizes().items() if size > 1] or ["dp"]
        extra = [self.vision] if self.vision != "data" else []
        extra += [self.optimizer] if self.optimizer != "adam" else []
        extra += ["-".join(self.trainable)] if set(self.trainable) != {"vision", "projector", "language"} else []
        extra += ["-".join(self.lora)] if self.lora else []
        extra += [name for name, on in (("bf16", self.bf16), ("overlap", self.overlap)) if on]
        recompute = [self.recompute, *self.modules, *([str(self.recompute_layers)] if self.recompute_layers else [])]
        extra += [f"recompute-{'-'.join(map(str, recompute))}"] if self.recompute else []
        extra += [self.family] if self.family != "clip-olmo" else []
        extra += [f"loss-{self.loss}"] if self.loss != "token" else []
        extra += [self.stages.replace("|", "-").replace("*", "")] if self.stages else []
        extra += ["buckets"] if self.buckets else []
        extra += [f"batch{self.batch}"] if self.batch != 8 else []
        extra += [self.rows] if self.rows != "mixed" else []
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
            overlap_grad_reduce=self.overlap or self.buckets,
            # megatron-core gathers parameters of the distributed optimizer only
            overlap_param_gather=(self.overlap or self.buckets) and self.optimizer == "adam",
            ddp_bucket_size=3000 if self.buckets else None,
            pipeline_model_parallel_layout=self.stages,
        )

    def reference(self) -> Layout:
        """The case on one process that this one is compared with."""
        return Layout(
            optimizer=self.optimizer, trainable=self.trainable, family=self.family, loss=self.loss, batch=self.batch,
            rows=self.rows, lora=self.lora,
        )  # fmt: skip


def _with_sgd(layouts: list[Layout]) -> list[Layout]:
    """Each layout with SGD too, because Adam hides a gradient of the wrong scale."""
    return layouts + [replace(layout, optimizer="sgd") for layout in layouts]


WARM_UP = ("projector",)
LORA = ("projector", "language_lora")
# One and two key/value heads: fewer than TP * CP, so that ranks replicate them.
SIGLIP_QWEN2, CLIP_MISTRAL = "siglip-qwen2", "clip-mistral"


def _family(family: str, **sizes: Any) -> Layout:
    """With SGD: some gradients of the zero biases are rounding errors, which Adam would turn into full steps."""
    return Layout(family=family, optimizer="sgd", **sizes)


LAYOUTS: dict[int, list[Layout]] = {
    1: [Layout(recompute="full"), Layout(recompute="selective", modules=("core_attn", "mlp"))],
    2: [
        *_with_sgd(
            [Layout(), Layout(tp=2), Layout(tp=2, vision="tensor"), Layout(pp=2), Layout(cp=2), Layout(pp=2, vpp=2)]
        ),
        Layout(tp=2, trainable=WARM_UP),
        Layout(pp=2, trainable=WARM_UP),
        Layout(pp=2, stages="Et|t*3L"),
        Layout(pp=2, stages="auto", optimizer="sgd"),
        Layout(trainable=("vision", "projector")),
        Layout(overlap=True),
        Layout(tp=2, recompute="full"),
        _family(SIGLIP_QWEN2, tp=2, vision="tensor"),
        Layout(tp=2, trainable=LORA),
        Layout(pp=2, trainable=LORA),
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

TOWER_ALONE = "E|t*4L"
FULL_LAYOUTS: dict[int, list[Layout]] = {
    1: [],
    2: [
        *_with_sgd(
            [
                Layout(pp=2, stages=TOWER_ALONE),
                Layout(pp=2, stages="Et*3|tL"),
                Layout(pp=2, stages="Et*4|L"),
                Layout(pp=2, vpp=2, stages="E|t*2|t|tL"),
                Layout(buckets=True),
                Layout(batch=2),
            ]
        ),
        Layout(pp=2, stages=TOWER_ALONE, trainable=WARM_UP),
        Layout(pp=2, stages=TOWER_ALONE, trainable=("language",)),
        Layout(pp=2, stages=TOWER_ALONE, trainable=("vision", "projector")),
        Layout(pp=2, vpp=2, trainable=WARM_UP),
        Layout(pp=2, buckets=True, stages="Et|t*3L"),
        Layout(tp=2, rows="text"),
        Layout(pp=2, rows="text"),
        Layout(cp=2, rows="text"),
        Layout(rows="text"),
        Layout(pp=2, rows="text", trainable=WARM_UP),
        Layout(tp=2, recompute="selective"),
        Layout(cp=2, recompute="selective", modules=("core_attn",)),
        Layout(pp=2, recompute="full", recompute_layers=1),
        Layout(pp=2, recompute="selective", trainable=WARM_UP),
        Layout(rows="unsupervised"),
        Layout(pp=2, rows="unsupervised"),
        Layout(tp=2, rows="unsupervised"),
        _family(CLIP_MISTRAL, pp=2, stages=TOWER_ALONE),
        *_with_sgd([Layout(cp=2, trainable=LORA), Layout(trainable=LORA)]),
        Layout(tp=2, trainable=LORA, optimizer="sgd", buckets=True),
        Layout(pp=2, vpp=2, trainable=("language_lora",)),
        Layout(pp=2, stages=TOWER_ALONE, trainable=("language_lora",)),
        Layout(tp=2, trainable=("language_lora",), recompute="full"),
        Layout(pp=2, trainable=("language_lora",), recompute="selective", modules=("mlp",)),
        Layout(tp=2, trainable=LORA, lora=("k_proj", "v_proj", "up_proj", "down_proj")),
        _family(SIGLIP_QWEN2, tp=2, trainable=LORA),
        _family(CLIP_MISTRAL, tp=2, trainable=("vision", "projector", "language_lora"), lora=("q_proj", "o_proj")),
    ],
    4: [
        *_with_sgd([Layout(pp=4, stages="E|t|t*2|tL"), Layout(pp=2, stages="Et*3|tL", batch=2)]),
        Layout(pp=4, stages="auto"),
        Layout(pp=2, tp=2, stages=TOWER_ALONE),
        Layout(pp=2, cp=2, stages=TOWER_ALONE),
        Layout(pp=2, tp=2, vision="tensor", stages=TOWER_ALONE),
        Layout(pp=4, trainable=WARM_UP),
        Layout(pp=4, trainable=WARM_UP, stages="E|t|t*2|tL"),
        Layout(tp=2, buckets=True),
        Layout(pp=2, buckets=True),
        Layout(pp=2, batch=2),
        Layout(pp=2, batch=8, rows="text"),
        Layout(cp=2, buckets=True, rows="text"),
        Layout(tp=2, pp=2, rows="unsupervised"),
        _family(SIGLIP_QWEN2, tp=4, trainable=LORA),
        Layout(tp=2, pp=2, bf16=True, trainable=LORA),
    ],
    8: [
        *_with_sgd([Layout(tp=2, pp=2, cp=2, trainable=LORA)]),
        Layout(tp=2, pp=2, vpp=2, cp=2, trainable=LORA),
        Layout(tp=2, pp=2, cp=2, stages=TOWER_ALONE),
        Layout(tp=2, pp=4, stages="E|t|t*2|tL", trainable=WARM_UP),
        Layout(pp=4, stages="Et|t|t|tL", buckets=True),
    ],
}
"""Those that only `make test-full` runs."""
