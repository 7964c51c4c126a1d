"""A function that published scripts call before they load a model."""

from __future__ import annotations


def disable_torch_init() -> None:
    """Does nothing; kept for published scripts.

    It used to disable torch's random initialisation of weights that are loaded right after, for the whole process.
    transformers now skips that initialisation itself.
    """
