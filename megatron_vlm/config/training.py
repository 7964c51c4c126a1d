"""Settings of training, logging and checkpoints, under Megatron-LM's flag names where it has one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

Part = Literal["vision", "projector", "language"]
Trainable = Literal["vision", "projector", "language", "language_lora"]
LossNormalization = Literal["token", "sample", "sqrt"]
LoraModule = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA_MODULES: tuple[LoraModule, ...] = get_args(LoraModule)
"""All linear layers of a decoder layer, under transformers' names."""
RecomputeModule = Literal["core_attn", "mlp"]
DEFAULT_RECOMPUTE_MODULES: tuple[RecomputeModule, ...] = ("mlp",)
PARTS: tuple[Part, ...] = get_args(Part)
"""The parts of a model, in the order of computation."""

AttentionBackend = Literal[
    "auto", "torch_varlen", "flash_attn_2", "flash_attn_3", "transformer_engine", "aiter", "sdpa"
]


@dataclass
class TrainingConfig:
    """Optimization, precision, logging and checkpoints."""

    train_iters: int = field(default=1000, metadata={"help": "Optimizer steps of the whole run."})
    epochs: float | None = field(
        default=None,
        metadata={"help": "Passes over the data, in place of train_iters."},
    )
    global_batch_size: int = field(
        default=16, metadata={"help": "Rows per optimizer step, over all data-parallel ranks."}
    )
    rampup_batch_size: list[int] | None = field(
        default=None,
        metadata={
            "help": "START INCREMENT ROWS: rows per step grow from START to global_batch_size over the first ROWS rows."
        },
    )
    seed: int = field(default=42, metadata={"help": "Seed of the initial weights and of the sample order."})
    bf16: bool = field(default=False, metadata={"help": "Compute in bfloat16, with fp32 master weights."})
    trainable: list[Trainable] = field(
        default_factory=lambda: list(PARTS),
        metadata={"help": "Parts that are trained; language_lora: LoRA on a frozen language model."},
    )
    lora_r: int = field(default=128, metadata={"help": "Rank of the LoRA adapters of language_lora."})
    lora_alpha: float = field(default=256.0, metadata={"help": "LoRA adapters are scaled by lora_alpha / lora_r."})
    lora_target_modules: list[LoraModule] = field(
        default_factory=lambda: list(LORA_MODULES),
        metadata={"help": "Layers with LoRA adapters."},
    )
    loss_normalization: LossNormalization = field(
        default="token",
        metadata={"help": "Each of a sample's n supervised tokens counts 1 (token), 1/n (sample) or 1/sqrt(n) (sqrt)."},
    )
    optimizer: Literal["adam", "sgd"] = field(default="adam", metadata={"help": "Optimizer; adam is AdamW."})
    lr: float = field(default=1e-5, metadata={"help": "Peak learning rate."})
    vision_lr: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the vision tower; default: lr."}
    )
    projector_lr: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the projector; default: lr."}
    )
    language_lr: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the language model; default: lr."}
    )
    min_lr: float = field(default=0.0, metadata={"help": "Learning rate at the end of the decay."})
    lr_decay_style: Literal["cosine", "linear", "constant", "WSD"] = field(
        default="cosine",
        metadata={"help": "Learning rate after warmup; WSD: constant, then a decay over the last iterations."},
    )
    lr_wsd_decay_style: Literal["linear", "cosine", "exponential", "minus_sqrt"] = field(
        default="linear", metadata={"help": "Shape of the decay at the end of WSD."}
    )
    lr_wsd_decay_iters: int | None = field(
        default=None, metadata={"help": "Iterations of the decay at the end of WSD; default: a tenth of train_iters."}
    )
    lr_warmup_fraction: float = field(
        default=0.03, metadata={"help": "Fraction of train_iters over which the learning rate warms up."}
    )
    lr_warmup_iters: int | None = field(
        default=None, metadata={"help": "Iterations of the warmup; default: from lr_warmup_fraction."}
    )
    weight_decay: float = field(
        default=0.0, metadata={"help": "Decoupled weight decay; not applied to biases and norms."}
    )
    vision_weight_decay: float | None = field(
        default=None, metadata={"help": "Weight decay of the vision tower; default: weight_decay."}
    )
    projector_weight_decay: float | None = field(
        default=None, metadata={"help": "Weight decay of the projector; default: weight_decay."}
    )
    language_weight_decay: float | None = field(
        default=None, metadata={"help": "Weight decay of the language model; default: weight_decay."}
    )
    adam_beta1: float = field(default=0.9, metadata={"help": "Adam's beta 1."})
    adam_beta2: float = field(default=0.999, metadata={"help": "Adam's beta 2."})
    adam_eps: float = field(default=1e-8, metadata={"help": "Adam's epsilon."})
    sgd_momentum: float = field(default=0.9, metadata={"help": "Momentum of sgd."})
    clip_grad: float = field(default=1.0, metadata={"help": "Maximum gradient norm; 0 disables clipping."})
    exit_interval: int | None = field(
        default=None, metadata={"help": "Save and stop, to be started again, at each iteration divisible by this."}
    )
    exit_duration_in_mins: float | None = field(
        default=None, metadata={"help": "Save and stop, to be started again, this many minutes after training began."}
    )
    max_skipped_updates: int = field(
        default=10,
        metadata={
            "help": "So many updates in a row that are skipped for a NaN or infinite loss or gradient end the run."
        },
    )
    attention_backend: AttentionBackend = field(
        default="auto", metadata={"help": "Attention kernel; auto takes the fastest that works on this machine."}
    )
    vision_attention_backend: AttentionBackend | None = field(
        default=None, metadata={"help": "Attention kernel of the vision tower; default: attention_backend."}
    )
    transformer_impl: Literal["local", "transformer_engine"] = field(
        default="local",
        metadata={"help": "Linear layers of the language model: megatron-core's own, or Transformer Engine's."},
    )
    fp8_format: Literal["e4m3", "hybrid"] | None = field(
        default=None,
        metadata={
            "help": "FP8 in the language model's qkv, fc1 and fc2 (transformer_engine): e4m3, or e5m2 for gradients."
        },
    )
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = field(
        default="delayed", metadata={"help": "How FP8 tensors are scaled; delayed is the fastest on an H200."}
    )
    loss_spike_factor: float = field(
        default=2.0,
        metadata={"help": "List the samples of an iteration with more than so many times the recent loss; 0: never."},
    )
    recompute_granularity: Literal["full", "selective", "auto"] | None = field(
        default=None,
        metadata={
            "help": "What backward recomputes: layers (full), recompute_modules (selective), or the cheapest that fits "
            "(auto)."
        },
    )
    recompute_modules: list[RecomputeModule] | None = field(
        default=None,
        metadata={"help": "What selective recomputes of each language layer: core_attn, mlp or both; default: mlp."},
    )
    recompute_num_layers: int | None = field(
        default=None,
        metadata={"help": "Language layers of each pipeline stage that full recomputes; default: all."},
    )
    recompute_vision: bool | None = field(
        default=None,
        metadata={"help": "Recompute the layers of the vision tower; default: if recompute_granularity is full."},
    )
    save: str | None = field(
        default=None, metadata={"help": "Folder or s3:// prefix for checkpoints, metrics.jsonl and TensorBoard logs."}
    )
    load: str | None = field(
        default=None,
        metadata={"help": "Checkpoint folder or s3:// prefix to resume from: weights, optimizer, rows; default: save."},
    )
    pretrained_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Initial weights of a new run: a checkpoint's folder or s3:// prefix, or a Hugging Face VLM."
        },
    )
    save_interval: int = field(
        default=1000, metadata={"help": "Iterations between checkpoints; the last iteration is always saved."}
    )
    eval_interval: int | None = field(
        default=None, metadata={"help": "Iterations between evaluations on validation data; default: save_interval."}
    )
    eval_iters: int | None = field(
        default=None,
        metadata={"help": "Rows of an evaluation, in steps of global_batch_size; default: all validation data."},
    )
    eval_generate_samples: int = field(
        default=0,
        metadata={"help": "Validation samples whose first question is answered at each evaluation; 0: none."},
    )
    eval_max_new_tokens: int = field(
        default=64, metadata={"help": "Tokens of each of these answers at most; greedy decoding."}
    )
    best_metric: str | None = field(
        default=None, metadata={"help": "Metric of evaluations whose lowest value is kept in SAVE/best: eval_loss, ..."}
    )
    log_interval: int = field(default=1, metadata={"help": "Iterations between progress lines."})
    manual_gc_interval: int = field(
        default=100,
        metadata={"help": "Iterations between Python's garbage collections, on all ranks at once; 0: Python decides."},
    )
    wandb_project: str | None = field(
        default=None, metadata={"help": "Weights & Biases project that metrics are written to, too."}
    )
    wandb_exp_name: str | None = field(
        default=None, metadata={"help": "Name of the run there; default: the name of the save folder."}
    )
    mlflow_experiment: str | None = field(
        default=None, metadata={"help": "MLflow experiment that metrics are written to, too."}
    )
    mlflow_tracking_uri: str | None = field(
        default=None, metadata={"help": "MLflow server or folder; default: MLflow's own setting."}
    )
    profile_step_start: int | None = field(
        default=None, metadata={"help": "First iteration of a trace of rank 0 in SAVE/profile; default: no trace."}
    )
    profile_step_end: int | None = field(
        default=None, metadata={"help": "Last iteration of the trace; default: profile_step_start."}
    )
    distributed_timeout_minutes: int = field(
        default=10, metadata={"help": "Minutes that a collective may wait for other ranks before it is an error."}
    )
    async_save: bool = field(
        default=True, metadata={"help": "Continue training while a checkpoint is written; the last one is waited for."}
    )
    save_optim: bool = field(
        default=True, metadata={"help": "Save the optimizer state, without which a run cannot be resumed."}
    )
    save_total_limit: int | None = field(
        default=None, metadata={"help": "Newest checkpoints to keep; older ones are removed. Default: all are kept."}
    )
    save_retain_interval: int | None = field(
        default=None, metadata={"help": "Checkpoints of iterations divisible by this are never removed."}
    )

    @property
    def warmup_iters(self) -> int:
        """Iterations over which the learning rate warms up."""
        if self.lr_warmup_iters is not None:
            return self.lr_warmup_iters
        return int(self.lr_warmup_fraction * self.train_iters)

    @property
    def wsd_decay_iters(self) -> int:
        """Iterations of the decay at the end, for lr_decay_style WSD."""
        return max(1, self.train_iters // 10) if self.lr_wsd_decay_iters is None else self.lr_wsd_decay_iters

    @property
    def recomputes_vision(self) -> bool:
        """Whether the layers of the vision tower are recomputed, if it is trained."""
        if self.recompute_vision is None:
            return self.recompute_granularity == "full"
        return self.recompute_vision
