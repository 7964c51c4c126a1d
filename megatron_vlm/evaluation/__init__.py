"""Scores on benchmarks: a model plug-in for lmms-eval."""
