"""Imports mosaicml-streaming so that it works with a CPU build of torch. Reading and writing shards do not need it.

It is for those who read shards, ours or the published ones, with mosaicml-streaming itself: the tests and the loader
benchmark do. mosaicml-streaming imports its predefined datasets, which need torchvision, and the torchvision that PyPI
pairs with a CPU build of torch cannot be imported. These datasets are not used here, so they are replaced by empty
modules. The package is installed with --no-deps, because its pins exclude current versions of transformers and numpy
with which it works.
"""

from __future__ import annotations

import sys
import types
from typing import Any

from megatron_vlm.data.shards.published_encodings import register_encodings

_PREDEFINED_DATASETS = ("streaming.vision", "streaming.text", "streaming.multimodal")


def import_streaming() -> Any:
    """The package `streaming`, with the encodings of the published shards registered.

    Raises:
        ImportError: it is not installed. The message contains the install command.
    """
    if "streaming" not in sys.modules:
        for name in _PREDEFINED_DATASETS:
            sys.modules.setdefault(name, types.ModuleType(name))
    try:
        import streaming
    except ImportError as error:
        raise ImportError(
            f"mosaicml-streaming cannot be imported ({error}). Install it and what it needs with: "
            "pip install --no-deps mosaicml-streaming==0.13.0 && "
            "pip install 'zstd<2' 'xxhash<4' 'python-snappy<1' brotli boto3 'catalogue<3' tqdm transformers"
        ) from error
    register_encodings()
    return streaming
