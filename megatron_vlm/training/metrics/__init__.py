"""Metrics of a run: what each step counted and took, reduced over ranks, and where it is written."""

from megatron_vlm.training.metrics.answers import Answer
from megatron_vlm.training.metrics.log import METRICS_FILE
from megatron_vlm.training.metrics.processor import MetricsProcessor
from megatron_vlm.training.metrics.profiler import ProfilerWindow

__all__ = ["METRICS_FILE", "Answer", "MetricsProcessor", "ProfilerWindow"]
