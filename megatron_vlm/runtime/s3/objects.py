"""Whole objects and ranges of them: verified reads and writes, listing, removal."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from megatron_vlm.runtime.s3.client import BadTransfer, ObjectMissing, client, join, retry, split

_BLOCK = 1 << 20


def read_bytes(url: str) -> bytes:
    """The content of an object.

    Raises:
        ObjectMissing: the object does not exist.
        S3Error: it could not be read.
    """
    bucket, key = split(url)

    def read() -> bytes:
        response = client().get_object(Bucket=bucket, Key=key)
        data: bytes = response["Body"].read()
        if len(data) != response["ContentLength"]:
            raise BadTransfer(f"received {len(data)} of {response['ContentLength']} bytes")
        return data

    return retry("read", url, read)


def read_into(url: str, start: int, target: memoryview) -> None:
    """Fill `target`, at least one byte, with the content of an object from byte `start` on.

    Raises:
        ObjectMissing: the object does not exist.
        S3Error: it could not be read, or is too short.
    """
    bucket, key = split(url)

    def read() -> None:
        response = client().get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{start + len(target) - 1}")
        received = 0
        for block in iter(lambda: response["Body"].read(_BLOCK), b""):
            if received + len(block) <= len(target):
                target[received : received + len(block)] = block
            received += len(block)
        if received != len(target):
            raise BadTransfer(f"received {received} of {len(target)} bytes from byte {start} on")

    retry("read", url, read)


def write(data: bytes, url: str) -> None:
    """Write an object and verify it: the store checks the MD5, then size and MD5 are read back.

    Raises:
        S3Error: it could not be written, or the stored object differs.
    """
    bucket, key = split(url)
    md5 = hashlib.md5(data, usedforsecurity=False)

    def send() -> None:
        client().put_object(
            Bucket=bucket, Key=key, Body=data, ContentMD5=b64encode(md5.digest()).decode(),
            Metadata={"md5": md5.hexdigest()},
        )  # fmt: skip
        if not _matches(bucket, key, len(data), md5.hexdigest()):
            raise BadTransfer("the stored object differs from what was sent")

    retry("write", url, send)


def holds(url: str, data: bytes) -> bool:
    """Whether the object exists with the size and MD5 of `data`.

    Raises:
        S3Error: the store cannot be queried.
    """
    bucket, key = split(url)
    digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
    try:
        return retry("query", url, lambda: _matches(bucket, key, len(data), digest))
    except ObjectMissing:
        return False


def _matches(bucket: str, key: str, size: int, md5: str) -> bool:
    head = client().head_object(Bucket=bucket, Key=key)
    # The ETag is the MD5, except for encrypted or multipart objects. For those our own metadata entry is used.
    known = head["Metadata"].get("md5") or head["ETag"].strip('"')
    return head["ContentLength"] == size and md5 in (known, head["ETag"].strip('"'))


def copy(source: str, url: str) -> None:
    """Copy an object inside a bucket; the store does it.

    Raises:
        ObjectMissing: the object does not exist.
        S3Error: it could not be copied.
    """
    bucket, key = split(url)
    from_bucket, from_key = split(source)
    origin = {"Bucket": from_bucket, "Key": from_key}
    retry("copy", source, lambda: client().copy_object(Bucket=bucket, Key=key, CopySource=origin))


def remove(url: str) -> None:
    """Remove an object, if there is one.

    Raises:
        S3Error: it could not be removed.
    """
    bucket, key = split(url)
    retry("remove", url, lambda: client().delete_object(Bucket=bucket, Key=key))


def remove_folder(url: str) -> None:
    """Remove all objects below a prefix.

    Raises:
        S3Error: one of them could not be removed.
    """
    # One request each: the checksum that boto3 sends with a request for many is unknown to some stores.
    with ThreadPoolExecutor(8, thread_name_prefix="s3") as threads:
        list(threads.map(lambda name: remove(join(url, name)), list_names(url)))


def size(url: str) -> int | None:
    """Bytes of an object; None if there is none.

    Raises:
        S3Error: the store cannot be queried.
    """
    bucket, key = split(url)
    try:
        head = retry("query", url, lambda: client().head_object(Bucket=bucket, Key=key))
    except ObjectMissing:
        return None
    return int(head["ContentLength"])


def exists(url: str) -> bool:
    """Whether the object exists. Raises as `size` does."""
    return size(url) is not None


def list_names(url: str) -> list[str]:
    """Sorted names of all objects below a prefix, relative to it.

    Raises:
        S3Error: the store cannot be queried.
    """
    bucket, key = split(url.rstrip("/") + "/")

    def pages() -> Iterator[str]:
        for page in client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key):
            yield from (item["Key"].removeprefix(key) for item in page.get("Contents", []))

    return retry("list", url, lambda: sorted(pages()))


def list_folder(url: str) -> list[str]:
    """Sorted names of the objects and prefixes directly below a prefix, without slashes.

    Raises:
        S3Error: the store cannot be queried.
    """
    bucket, key = split(url.rstrip("/") + "/")

    def pages() -> Iterator[str]:
        for page in client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key, Delimiter="/"):
            yield from (item["Key"].removeprefix(key) for item in page.get("Contents", []))
            yield from (item["Prefix"].removeprefix(key).rstrip("/") for item in page.get("CommonPrefixes", []))

    return retry("list", url, lambda: sorted(name for name in pages() if name))
