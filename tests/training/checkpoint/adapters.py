"""LoRA adapters in checkpoints: resumed in other layouts, started on a model without any, and rejected where absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import megatron_vlm.runtime.megatron_patches  # noqa: F401

# isort: split
from megatron_vlm.runtime.process_groups import destroy_groups
from megatron_vlm.training.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint
from tests.parallel.layouts import LORA, Layout
from tests.training.checkpoint.small_run import Run


def adapters_resume_in_another_layout(folder: Path) -> dict[str, Any]:
    """Saved after two steps in one layout and loaded in the next: the losses of the third step agree."""
    run = Run(Layout(trainable=LORA), folder)
    run.train(2)
    run.save(2)
    expected = run.train(1)
    destroy_groups()
    found: dict[str, Any] = {"loss": {}}
    for layout in (Layout(tp=2, pp=2, trainable=LORA), Layout(cp=2, trainable=LORA)):
        run = Run(layout, folder)
        run.load()
        run.skip(2)
        found["loss"][layout.name] = run.train(1)[0] / expected[0] - 1
        destroy_groups()
    run = Run(Layout(tp=2), folder)
    try:
        run.load()
    except CheckpointError as error:
        found["without"] = str(error)
    destroy_groups()
    return found


def adapters_begin_on_a_model_without(folder: Path) -> dict[str, Any]:
    """A new run with adapters takes the weights of a model without, and has its loss before the first step."""
    run = Run(Layout(tp=2), folder)
    run.save(0)
    expected = run.train(1)
    destroy_groups()
    run = Run(Layout(tp=2, trainable=LORA), folder)
    checkpoint = latest_checkpoint(str(folder))
    assert checkpoint is not None
    for parameter in (p for chunk in run.chunks for p in chunk.parameters() if not p.requires_grad):
        parameter.data.zero_()
    load_checkpoint(checkpoint, run.chunks, run.recipe)
    losses = run.train(2)
    destroy_groups()
    return {"loss": losses[0] / expected[0] - 1, "moved": losses[1] != losses[0]}
