"""What published scripts call before they load a model."""

from __future__ import annotations


def disable_torch_init() -> None:
    """Does nothing, on purpose.

    It used to keep torch from drawing weights that are read from a file the moment after, for the whole process and
    every model made later. transformers does not draw such weights by itself any more.
    """
