"""Datasets of the Hugging Face hub: `hf://datasets/ORG/NAME[@REVISION][/FILE, FOLDER or PATTERN]`.

huggingface_hub, which transformers needs as well, downloads the files once into its own cache. It verifies and resumes
downloads, takes tokens and proxies from its settings, and lets only one process of a machine fetch a file.
"""

from __future__ import annotations

import re
from pathlib import Path

from megatron_vlm.data.errors import DataError

_SCHEME = "hf://"
_URL = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([\w./-]+?))?(?:/(.*))?")
_DATA = ["*.parquet", "*.tar"]
"""What is downloaded if the URL names no file: no images beside annotations, no cards."""


def is_hub(path: object) -> bool:
    """Whether a path is an hf:// URL."""
    return str(path).startswith(_SCHEME)


def download(url: str) -> Path:
    """Download the files that a URL names, those in the cache excepted.

    Returns:
        Their path on this machine: a file, a folder, or a pattern as in the URL.

    Raises:
        DataError: it is no such URL, or the files cannot be downloaded or do not exist.
    """
    found = _URL.fullmatch(url.rstrip("/"))
    if found is None:
        raise DataError(f"{url} is no dataset of the hub: expected hf://datasets/ORG/NAME, perhaps with @REVISION/PATH")
    repository, revision, inside = found.groups()
    try:
        import huggingface_hub
    except ImportError as error:
        raise DataError(f"reading {url} needs huggingface_hub: pip install huggingface_hub") from error
    patterns = [inside, f"{inside.rstrip('/')}/*"] if inside else _DATA
    try:
        folder = huggingface_hub.snapshot_download(
            repository, repo_type="dataset", revision=revision, allow_patterns=patterns
        )
    except Exception as error:  # its own errors, those of its HTTP library, OSError
        what = str(error).strip().replace("\n", " ")[:300] or type(error).__name__
        raise DataError(
            f"{url} cannot be downloaded: {what}. Check the name, the network and, for a gated dataset, your token "
            "(huggingface-cli login)."
        ) from error
    target = Path(folder, inside) if inside else Path(folder)
    if not target.exists() and "*" not in target.name:
        raise DataError(f"{url} does not exist: the dataset has no file of that name. Look at its files on the hub.")
    return target
