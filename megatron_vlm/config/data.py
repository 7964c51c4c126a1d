"""Settings of the data: where samples come from and how they are packed into rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

# N is a number, which Literal cannot express.
AspectRatio = Annotated[str, "anyres", "anyres_max_N", "square", "pad"]


@dataclass
class DataConfig:
    """Data sources, tokenizer, tiling, packing and the data loader."""

    data_path: list[str] = field(
        default_factory=list,
        metadata={"help": "Annotation files (.json, .jsonl, .ndjson), shard folders, or one mixture file (.yaml)."},
    )
    valid_data_path: list[str] | None = field(
        default=None, metadata={"help": "Validation data, in the forms of data_path; default: none, or valid_share."}
    )
    valid_share: float = field(
        default=0.0, metadata={"help": "Share of each dataset's samples that is held out of training for validation."}
    )
    image_folder: str | None = field(
        default=None, metadata={"help": "Folder that image paths in annotations start from."}
    )
    data_root: str | None = field(
        default=None, metadata={"help": "Folder or s3:// prefix that relative paths in a mixture file start from."}
    )
    tokenizer_model: str = field(
        default="", metadata={"help": "Folder of a Hugging Face tokenizer, or a sentencepiece .model file."}
    )
    chat_template: str = field(
        default="auto",
        metadata={"help": "The tokenizer's chat template, or else instella (auto); instella; or a Jinja file."},
    )
    seq_length: int = field(default=32768, metadata={"help": "Tokens per row, image tokens included."})
    max_tiles_per_row: int = field(default=64, metadata={"help": "Maximum number of image tiles in a row."})
    image_aspect_ratio: AspectRatio = field(
        default="anyres",
        metadata={
            "help": "Base view and tiles (anyres), at most N tiles' tokens (anyres_max_N), or one tile (square, pad)."
        },
    )
    multi_image_aspect_ratio: Literal["pad", "same"] = field(
        default="pad",
        metadata={
            "help": "Images of a sample with several, under anyres: one padded tile each (pad), or tiled (same)."
        },
    )
    verify_images: bool = field(
        default=False,
        metadata={
            "help": "Decode every image when lengths are measured, to reject damaged ones; else headers are read."
        },
    )
    oversized_samples: Literal["error", "skip", "truncate"] = field(
        default="error",
        metadata={"help": "A sample longer than a row is an error, is skipped, or is truncated after an answer."},
    )
    packing_window: int = field(
        default=50_000, metadata={"help": "Samples packed together; no row has samples of two windows."}
    )
    cost_per_token_squared: float | None = field(
        default=None,
        metadata={"help": "Coefficient a of a row's cost a*sum(l*l) + b*sum(l) + c*tiles; default: the model's FLOPs."},
    )
    cost_per_token: float | None = field(default=None, metadata={"help": "Coefficient b; default: the model's FLOPs."})
    cost_per_tile: float | None = field(default=None, metadata={"help": "Coefficient c; default: the model's FLOPs."})
    allow_changed_order: bool = field(
        default=False,
        metadata={"help": "Resume from a checkpoint even if changed data or packing settings change the sample order."},
    )
    log_samples: bool = field(
        default=False,
        metadata={"help": "Each data-parallel rank writes the ids of the samples it trains on to the save folder."},
    )
    num_workers: int = field(default=2, metadata={"help": "Data loader worker processes per rank."})
    cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder for length indexes and downloaded shards; default: indexes are next to the data."},
    )
    cache_limit: str | None = field(
        default=None,
        metadata={"help": "Disk space for downloaded shards in cache_dir, such as 100gb; default: no limit."},
    )
