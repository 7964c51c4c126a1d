"""Where a run stands."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Progress:
    """Position of a run in its data, and what a resumed run is checked against."""

    iteration: int = 0
    consumed_rows: int = 0
    tokenizer_fingerprint: str = ""
    plan_inputs: str = ""
    """What determines the order of rows, as JSON (data.plan_fingerprint); empty in checkpoints of older versions."""
    best_metric: float | None = None
    """Lowest value of training.best_metric so far."""
