"""The samples of a folder of annotations as the files that others publish: WebDataset tars, Parquet, saved datasets."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from tests.data.helpers import Folder


def images_of(entry: dict[str, Any]) -> list[str]:
    image = entry.get("image", [])
    return image if isinstance(image, list) else [image]


def write_tar(folder: Folder, path: Path, rows: slice = slice(None)) -> Path:
    """`KEY.json` and `KEY.NUMBER.png` for each sample."""
    with tarfile.open(path, "w") as tar:
        for entry in folder.entries[rows]:
            files = {f"{entry['id']}.json": json.dumps(entry).encode()}
            for number, name in enumerate(images_of(entry)):
                files[f"{entry['id']}.{number}.PNG"] = (folder.images / name).read_bytes()
            for name, content in files.items():
                add_file(tar, f"part/{name}", content)
    return path


def add_file(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    item = tarfile.TarInfo(name)
    item.size = len(content)
    tar.addfile(item, io.BytesIO(content))


def table_of(folder: Folder, several: bool = True, rows: slice = slice(None)) -> Any:
    """An Arrow table with the image feature of Hugging Face: a list of structs, or one struct."""
    import pyarrow

    cell = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    images = []
    for entry in folder.entries[rows]:
        cells = [{"bytes": (folder.images / name).read_bytes(), "path": name} for name in images_of(entry)]
        images.append(cells if several else (cells[0] if cells else None))
    columns = {
        "id": [entry["id"] for entry in folder.entries[rows]],
        "images" if several else "image": pyarrow.array(images, pyarrow.list_(cell) if several else cell),
        "conversations": [entry["conversations"] for entry in folder.entries[rows]],
        "source": ["made"] * len(images),
    }
    return pyarrow.table(columns)


def write_parquet(folder: Folder, path: Path, several: bool = True, rows: slice = slice(None)) -> Path:
    """Row groups of three rows."""
    from pyarrow import parquet

    parquet.write_table(table_of(folder, several, rows), path, row_group_size=3)
    return path


def write_saved_dataset(folder: Folder, path: Path) -> Path:
    """A folder as `Dataset.save_to_disk` writes it, with two Arrow files."""
    import pyarrow

    path.mkdir(parents=True)
    names = [f"data-{number:05d}-of-00002.arrow" for number in range(2)]
    half = len(folder.entries) // 2
    for name, rows in zip(names, (slice(half), slice(half, None)), strict=True):
        table = table_of(folder, rows=rows)
        with pyarrow.ipc.new_stream(path / name, table.schema) as stream:
            stream.write_table(table, max_chunksize=4)
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return path
