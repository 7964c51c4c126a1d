"""Checkpoints in an object store: which are whole, whatever was interrupted, and what is removed."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_vlm.runtime.s3 import S3Error, objects
from megatron_vlm.runtime.s3.path import S3Path
from megatron_vlm.training.checkpoint import CheckpointError, latest_checkpoint, load_common, read_metadata
from megatron_vlm.training.checkpoint.destination import S3Destination, destination_of
from megatron_vlm.training.checkpoint.folder import RECIPE, TRACKER, whole_checkpoints
from megatron_vlm.training.checkpoint.trusted_metadata import METADATA
from tests.data.helpers import tiny_tokenizer_folder
from tests.support.s3_server import BUCKET, Fault, Proxy, fast_retries
from tests.training.checkpoint.test_trusted_metadata import Hostile

FOLDER = S3Path(f"s3://{BUCKET}/run")


@pytest.fixture
def proxy(one_store: Proxy) -> Iterator[Proxy]:
    with fast_retries(one_store, attempts=2, timeout=5.0):
        yield one_store


@pytest.fixture
def destination(proxy: Proxy) -> S3Destination:
    made = destination_of(f"{FOLDER}/")
    assert isinstance(made, S3Destination)
    return made


def write(destination: S3Destination, iteration: int, content: str = "{}") -> S3Path:
    """What looks like the files of a checkpoint, all of them."""
    path = destination.begin(iteration)
    destination.empty(path)
    for name in (METADATA, "__0_0.distcp", RECIPE):
        destination.write(path / name, content.encode())
    return path


def make(destination: S3Destination, iteration: int, content: str = "{}") -> S3Path:
    return destination.publish(write(destination, iteration, content), iteration)


def names() -> list[str]:
    return objects.list_folder(str(FOLDER))


def test_newest_whole_one(destination: S3Destination) -> None:
    assert latest_checkpoint(FOLDER) is None
    ten, twenty = make(destination, 10), make(destination, 20)
    objects.remove(f"{write(destination, 30)}/{RECIPE}")
    assert latest_checkpoint(FOLDER) == twenty
    (FOLDER / TRACKER).write_bytes(b"10")
    assert latest_checkpoint(str(FOLDER)) == ten
    (FOLDER / TRACKER).write_bytes(b"30")
    assert latest_checkpoint(FOLDER) == twenty
    assert destination.begin(30) == FOLDER / "iter_0000030", "what is not whole is written again"


def test_saved_again(destination: S3Destination, proxy: Proxy) -> None:
    """The older one is whole until the new one is, and goes afterwards."""
    make(destination, 10, "old")
    again = write(destination, 10, "new")
    recipe = (again / RECIPE).read_bytes()
    objects.remove(str(again / RECIPE))
    found = latest_checkpoint(FOLDER)
    assert found is not None and (found / RECIPE).read_text() == "old"
    (again / RECIPE).write_bytes(recipe)
    found = latest_checkpoint(FOLDER)
    assert found == again and (found / RECIPE).read_text() == "new", "killed before the older one was removed"
    assert destination.publish(again, 10) == again and names() == ["iter_0000010.2", TRACKER]
    assert make(destination, 10, "newest") == FOLDER / "iter_0000010.3" and names() == ["iter_0000010.3", TRACKER]


def test_old_ones_are_removed_marker_first(destination: S3Destination, proxy: Proxy) -> None:
    for iteration in range(5, 45, 5):
        make(destination, iteration)
    (FOLDER / TRACKER).write_bytes(b"15")
    proxy.requests.clear()
    destination.remove_old(2, 20)
    assert [iteration for iteration, _ in whole_checkpoints(FOLDER)] == [15, 20, 35, 40]
    assert len(names()) == 5
    removed = [path for method, path in proxy.requests if method == "DELETE"]
    assert removed[0].endswith("iter_0000005/recipe.json")


def test_what_cannot_be_removed_goes_later(destination: S3Destination, proxy: Proxy) -> None:
    make(destination, 10)
    make(destination, 20)
    failed = destination.begin(30)
    destination.write(failed / "__0_0.distcp", b"1")
    proxy.faults.append(Fault("error", "iter_", 10**9, "DELETE"))
    destination.discard(failed)
    destination.remove_old(1, None)
    assert latest_checkpoint(FOLDER) == FOLDER / "iter_0000020" and "iter_0000030" in names()
    proxy.faults.clear()
    make(destination, 40)
    assert names() == ["iter_0000020", "iter_0000040", TRACKER]


def test_a_failed_save_that_is_done_again_is_not_removed(destination: S3Destination, proxy: Proxy) -> None:
    proxy.faults.append(Fault("error", "iter_", 10**9, "DELETE"))
    failed = destination.begin(10)
    destination.write(failed / "__0_0.distcp", b"1")
    destination.discard(failed)
    proxy.faults.clear()
    assert make(destination, 10) == failed and latest_checkpoint(FOLDER) == failed


def test_no_permission_to_write_is_known_at_the_start(destination: S3Destination, proxy: Proxy) -> None:
    destination.recover()
    assert names() == []
    proxy.faults.append(Fault("error", "run", 10**9, "PUT"))
    with pytest.raises(S3Error, match=f"cannot write {FOLDER}/.write-check"):
        destination.recover()


def test_tokenizer_copy_that_was_interrupted_is_completed(destination: S3Destination, tmp_path: Path) -> None:
    source = tiny_tokenizer_folder(tmp_path / "source")
    destination.keep_tokenizer(source, "auto")
    kept = objects.list_names(f"{FOLDER}/tokenizer")
    assert kept == sorted(["chat_template.jinja", *(path.name for path in source.iterdir())]) and len(kept) > 2
    objects.remove(f"{FOLDER}/tokenizer/{kept[0]}")
    destination.keep_tokenizer(source, "auto")
    assert objects.list_names(f"{FOLDER}/tokenizer") == kept


def test_hostile_files_run_no_code(proxy: Proxy, tmp_path: Path) -> None:
    proof = tmp_path / "code was run"
    (FOLDER / METADATA).write_bytes(pickle.dumps(Hostile(proof)))
    torch.save({"progress": Hostile(proof)}, tmp_path / "common.pt")
    (FOLDER / "common.pt").write_bytes((tmp_path / "common.pt").read_bytes())
    with pytest.raises(CheckpointError, match="mkdir, which no checkpoint's metadata needs"):
        read_metadata(FOLDER)
    with pytest.raises(CheckpointError, match="made to run code"):
        load_common(FOLDER)
    assert not proof.exists()


def test_unreachable_store_is_not_called_damage(proxy: Proxy) -> None:
    proxy.faults.append(Fault("error", "run", 10**9, "GET"))
    (FOLDER / "common.pt").write_bytes(b"")
    for read in (read_metadata, load_common):
        with pytest.raises(CheckpointError, match=f"^cannot read {FOLDER}/.*, tried 2 times"):
            read(FOLDER)
