"""A projector alone, in the file that LLaVA saves and loads between stages (`--pretrain_mm_mlp_adapter`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from checkpoint_convert.mapping.hf_names import instellavl_name, model_part

FILE = "mm_projector.bin"


def write_projector(folder: Path, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Write mm_projector.bin into `folder`: `model.mm_projector.{0,2}.*` and `model.image_newline`.

    `tensors` has the parameter map's Hugging Face names; tensors of other parts are not read.
    """
    state = {
        instellavl_name(name): tensors[name].to(dtype).clone()  # torch.save writes the whole storage of a view
        for name in tensors
        if model_part(name) == "projector"
    }
    torch.save(state, folder / FILE)
