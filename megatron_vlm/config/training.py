"""How it is trained, logged and saved, in Megatron-LM's own flag names where it has one."""

from __future__ import annotations

from dataclasses import dataclass, field

PARTS = ("vision", "projector", "language")


@dataclass
class TrainingConfig:
    """Optimization, numerics, logging and checkpoints."""

    train_iters: int = field(default=1000, metadata={"help": "optimizer steps in the whole run"})
    global_batch_size: int = field(default=16, metadata={"help": "rows per optimizer step, over all data ranks"})
    seed: int = field(default=42, metadata={"help": "seed of the weights and of the data order"})
    bf16: bool = field(default=False, metadata={"help": "compute in bfloat16 with fp32 master weights"})
    trainable: list[str] = field(
        default_factory=lambda: list(PARTS),
        metadata={"choices": PARTS, "help": "parts that are trained; all others stay bit for bit the same"},
    )
    optimizer: str = field(default="adam", metadata={"choices": ("adam", "sgd"), "help": "adam is AdamW"})
    lr: float = field(default=1e-5, metadata={"help": "peak learning rate"})
    vision_lr: float | None = field(default=None, metadata={"help": "peak learning rate of the tower; default: lr"})
    projector_lr: float | None = field(
        default=None, metadata={"help": "peak learning rate of the projector; default: lr"}
    )
    min_lr: float = field(default=0.0, metadata={"help": "learning rate at the end"})
    lr_decay_style: str = field(
        default="cosine", metadata={"choices": ("cosine", "linear", "constant"), "help": "decay"}
    )
    lr_warmup_fraction: float = field(default=0.03, metadata={"help": "share of the run in which the rate rises"})
    weight_decay: float = field(default=0.0, metadata={"help": "decoupled weight decay; not on biases and norms"})
    adam_beta1: float = field(default=0.9, metadata={"help": "Adam's beta 1"})
    adam_beta2: float = field(default=0.999, metadata={"help": "Adam's beta 2"})
    adam_eps: float = field(default=1e-8, metadata={"help": "Adam's epsilon"})
    sgd_momentum: float = field(default=0.9, metadata={"help": "momentum of sgd"})
    clip_grad: float = field(default=1.0, metadata={"help": "gradient norm is clipped to this; 0: not clipped"})
    recompute_granularity: str | None = field(
        default=None, metadata={"choices": ("full", "selective"), "help": "activations recomputed in backward"}
    )
    save: str | None = field(
        default=None, metadata={"help": "folder for checkpoints, metrics.jsonl and TensorBoard logs"}
    )
    load: str | None = field(
        default=None,
        metadata={"help": "checkpoint folder to go on from: weights, optimizer, data position; default: save"},
    )
    pretrained_checkpoint: str | None = field(
        default=None, metadata={"help": "checkpoint folder whose weights a new run starts from"}
    )
    save_interval: int = field(
        default=1000, metadata={"help": "iterations between checkpoints; one is always saved last"}
    )
    log_interval: int = field(default=1, metadata={"help": "iterations between progress lines"})
    distributed_timeout_minutes: int = field(
        default=10, metadata={"help": "a collective that waits longer is an error"}
    )
