"""What is read and how it becomes rows."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class DataConfig:
    """Where samples come from and how they are packed."""

    data_path: list[str] = field(
        default_factory=list,
        metadata={"help": "annotation files (.json, .jsonl), shard folders, or one mixture (.yaml)"},
    )
    image_folder: str | None = field(
        default=None, metadata={"help": "folder that image paths in annotations start from"}
    )
    data_root: str | None = field(
        default=None, metadata={"help": "folder or s3:// prefix that relative paths inside mixtures start from"}
    )
    tokenizer_model: str = field(
        default="", metadata={"help": "folder of a Hugging Face tokenizer, or a sentencepiece .model file"}
    )
    seq_length: int = field(default=32768, metadata={"help": "tokens in a row, image positions included"})
    max_tiles_per_row: int = field(default=64, metadata={"help": "image tiles in a row at most"})
    image_aspect_ratio: str = field(
        default="anyres",
        metadata={
            "choices": ("anyres", "anyres_max_N", "square", "pad"),
            "help": "base view and tiles, if need be reduced to N tiles' positions; or one tile",
        },
    )
    oversized_samples: str = field(
        default="refuse",
        metadata={
            "choices": ("refuse", "skip", "cut"),
            "help": "longer than a row: an error, left out, or cut after an answer",
        },
    )
    packing_window: int = field(default=50_000, metadata={"help": "samples that are packed together"})
    cost_per_token_squared: float | None = field(
        default=None, metadata={"help": "a of a row's cost a*sum(l*l) + b*sum(l) + c*tiles; default: its FLOPs"}
    )
    cost_per_token: float | None = field(default=None, metadata={"help": "b of it; default: FLOPs"})
    cost_per_tile: float | None = field(default=None, metadata={"help": "c of it; default: FLOPs"})
    allow_changed_order: bool = field(
        default=False,
        metadata={"help": "go on from a checkpoint though data or packing changed, and with them the order"},
    )
    log_samples: bool = field(
        default=False, metadata={"help": "each data rank lists the samples it trains on, in the save folder"}
    )
    num_workers: int = field(default=2, metadata={"help": "processes per rank that read and decode"})
    cache_dir: str | None = field(
        default=None,
        metadata={"help": "where length indexes and shards of S3 are kept; default: indexes next to the data"},
    )
    cache_limit: str | None = field(
        default=None, metadata={"help": "what shards of S3 may take in cache_dir, as in 100gb; default: no limit"}
    )
