"""Large objects in parts, ranges in parallel, and paths, against a real S3 server."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from megatron_vlm.runtime.s3 import ObjectMissing, S3Error, client, objects
from megatron_vlm.runtime.s3.multipart import abort_uploads, writing
from megatron_vlm.runtime.s3.path import S3Path, storage_path
from megatron_vlm.runtime.s3.ranges import ByteRange, read_ranges
from tests.support.s3_server import BUCKET, Fault, Proxy, fast_retries

FOLDER = f"s3://{BUCKET}/folder"
PART = 5 << 20
"""The smallest that a store accepts."""


@pytest.fixture
def proxy(one_store: Proxy) -> Iterator[Proxy]:
    with fast_retries(one_store, attempts=3, timeout=2.0):
        yield one_store


def uploads() -> int:
    return len(client.client().list_multipart_uploads(Bucket=BUCKET).get("Uploads", []))


def test_parts_become_one_object(proxy: Proxy) -> None:
    content = random.Random(1).randbytes(3 * PART + 1000)
    proxy.faults.append(Fault("error", "partNumber=2", 1, "PUT"))
    with writing(f"{FOLDER}/large", PART) as stream:
        stream.write(content[:10])
        stream.write(memoryview(content)[10:])
        assert stream.tell() == len(content)
    assert objects.read_bytes(f"{FOLDER}/large") == content
    with writing(f"{FOLDER}/exact", PART) as stream:
        stream.write(content[: 2 * PART])
    with writing(f"{FOLDER}/small", PART) as stream:
        stream.write(b"abc")
    assert objects.read_bytes(f"{FOLDER}/exact") == content[: 2 * PART]
    assert objects.read_bytes(f"{FOLDER}/small") == b"abc" and uploads() == 0


def test_completed_upload_whose_answer_was_lost(proxy: Proxy) -> None:
    proxy.faults.append(Fault("disconnect", "uploadId", 1, "POST"))
    with writing(f"{FOLDER}/large", PART) as stream:
        stream.write(bytes(PART + 1))
    assert len(objects.read_bytes(f"{FOLDER}/large")) == PART + 1


def test_failed_upload_leaves_nothing(proxy: Proxy) -> None:
    proxy.faults.append(Fault("error", "partNumber=2", 3, "PUT"))
    expected = f"cannot write part 2 of {FOLDER}/large, tried 3 times"
    with pytest.raises(S3Error, match=expected), writing(f"{FOLDER}/large", PART) as stream:
        stream.write(bytes(9 * PART))
    assert not objects.exists(f"{FOLDER}/large") and uploads() == 0


def test_uploads_of_a_killed_process_are_removed(proxy: Proxy) -> None:
    for name in ("folder/one", "elsewhere/two"):
        client.client().create_multipart_upload(Bucket=BUCKET, Key=name)
    abort_uploads(FOLDER)
    assert uploads() == 1
    abort_uploads(f"s3://{BUCKET}/elsewhere")


def test_ranges_are_read_in_order(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    content = random.Random(2).randbytes(10_000)
    objects.write(content, f"{FOLDER}/file")
    monkeypatch.setattr("megatron_vlm.runtime.s3.ranges._PIECE_BYTES", 700)
    monkeypatch.setattr("megatron_vlm.runtime.s3.ranges._AHEAD_BYTES", 3000)
    proxy.faults.append(Fault("truncate", "folder/file", 1))
    wanted = [(0, 10), (5000, 3000), (10, 1), (9000, 1000)]
    found = list(read_ranges(ByteRange(f"{FOLDER}/file", *part) for part in wanted))
    assert found == [content[start : start + length] for start, length in wanted]
    with pytest.raises(S3Error, match=f"cannot read {FOLDER}/file"):
        list(read_ranges([ByteRange(f"{FOLDER}/file", 9999, 2)]))


def test_paths(proxy: Proxy) -> None:
    folder = storage_path(FOLDER + "/")
    assert isinstance(folder, S3Path) and str(folder) == FOLDER and not folder.is_dir()
    (folder / "a" / "one").write_bytes(b"1")
    (folder / "two").write_bytes(b"2")
    assert [path.name for path in folder.iterdir()] == ["a", "two"] and folder.is_dir()
    assert (folder / "two").with_name("a") / "one" == S3Path(f"{FOLDER}/a/one")
    assert (folder / "a/one").read_text() == "1" and not (folder / "a").is_file()
    with pytest.raises(FileNotFoundError, match=f"{FOLDER}/three does not exist"):
        (folder / "three").read_bytes()
    with pytest.raises(ObjectMissing):
        objects.copy(f"{FOLDER}/three", f"{FOLDER}/four")


def test_errors_name_the_bucket(proxy: Proxy) -> None:
    with pytest.raises(S3Error, match="cannot list s3://absent/x: .*NoSuchBucket"):
        list(S3Path("s3://absent/x").iterdir())
    with pytest.raises(S3Error, match="s3:///x has no bucket"):
        S3Path("s3:///x").read_bytes()
