"""mosaicml-streaming, imported so that it works beside a CPU build of torch.

Importing the package runs its catalogues of ready-made datasets, which need torchvision; the torchvision that PyPI
pairs with a CPU build of torch does not import. The catalogues are not used here, so empty modules stand in for them.
The package's own pins exclude current transformers and numpy although it runs with both: it is installed with
--no-deps.
"""

from __future__ import annotations

import sys
import types
from typing import Any

from megatron_vlm.data.shards.published_encodings import register_encodings

_CATALOGUES = ("streaming.vision", "streaming.text", "streaming.multimodal")


def import_streaming() -> Any:
    """The package `streaming`, with the encodings of the published shards added to its own.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    if "streaming" not in sys.modules:
        for name in _CATALOGUES:
            sys.modules.setdefault(name, types.ModuleType(name))
    try:
        import streaming
    except ImportError as error:
        raise ImportError(
            f"shards are read and written with mosaicml-streaming, which cannot be imported ({error}). "
            "Install it with: pip install --no-deps mosaicml-streaming==0.13.0 && "
            "pip install 'zstd<2' 'xxhash<4' 'python-snappy<1' brotli boto3 'catalogue<3' tqdm transformers"
        ) from error
    register_encodings()
    return streaming
