"""Answers from a Megatron checkpoint."""
