"""A projector alone, as LLaVA's tools save and load it between stages (`--pretrain_mm_mlp_adapter`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from checkpoint_convert.mapping.hf_names import instellavl_name
from checkpoint_convert.model_source import PARTS

FILE = "mm_projector.bin"


def write_projector(folder: Path, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Write mm_projector.bin into `folder`: `model.mm_projector.{0,2}.*` and `model.image_newline`.

    `tensors` has the Hugging Face names of the name map; those of other parts are not read.
    """
    state = {
        instellavl_name(name): tensors[name].to(dtype).clone()  # a view would drag the whole tensor into the file
        for name in tensors
        if name.startswith(PARTS["projector"])
    }
    torch.save(state, folder / FILE)
