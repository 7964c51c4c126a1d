"""Shards in an S3-compatible store: verified transfers, with errors that are errors of the data."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from megatron_vlm.data.errors import DataError
from megatron_vlm.runtime.s3 import client, objects
from megatron_vlm.runtime.s3.client import is_remote, join

__all__ = ["ObjectMissing", "download", "exists", "is_remote", "is_uploaded", "join", "list_names", "read_bytes",
           "upload"]  # fmt: skip

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_BLOCK = 1 << 20


class ObjectMissing(DataError):
    """The object does not exist."""


def _with_data_errors(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            return function(*args, **kwargs)
        except client.ObjectMissing as error:
            raise ObjectMissing(str(error)) from error
        except client.S3Error as error:
            raise DataError(str(error)) from error

    return call


read_bytes = _with_data_errors(objects.read_bytes)
exists = _with_data_errors(objects.exists)
list_names = _with_data_errors(objects.list_names)


@_with_data_errors
def download(url: str, target: Path, size: int | None = None, sha1: str | None = None) -> None:
    """Download an object to a file and verify it.

    Args:
        url: of the object.
        target: overwritten if it exists.
        size: expected bytes; default: the size that the store reports.
        sha1: expected hash in hex; default: not checked.

    Raises:
        ObjectMissing: the object does not exist.
        DataError: it could not be read, or its size or hash is wrong.
    """
    bucket, key = client.split(url)

    def fetch() -> None:
        response = client.client().get_object(Bucket=bucket, Key=key)
        digest, received = hashlib.sha1(usedforsecurity=False), 0
        expected = response["ContentLength"] if size is None else size
        with open(target, "r+b" if target.exists() else "wb") as file:
            for block in iter(lambda: response["Body"].read(_BLOCK), b""):
                received += len(block)
                if received <= expected:  # never exceed the space reserved in the cache
                    file.write(block)
                    digest.update(block)
            file.truncate()
        if received != expected:
            raise client.BadTransfer(
                f"received {received} bytes, expected {expected}: the object is truncated or was replaced"
            )
        if sha1 is not None and digest.hexdigest() != sha1:
            raise client.BadTransfer("its sha1 differs from the index: the object is damaged or was replaced")

    client.retry("read", url, fetch)


@_with_data_errors
def upload(source: bytes | Path, url: str) -> None:
    """Upload an object and verify it: the store checks the MD5, then size and MD5 are read back.

    Raises:
        DataError: it could not be written, or the stored object differs.
    """
    objects.write(source if isinstance(source, bytes) else source.read_bytes(), url)


@_with_data_errors
def is_uploaded(source: Path, url: str) -> bool:
    """Whether the object exists with the size and MD5 of a file.

    Raises:
        DataError: the store cannot be queried.
    """
    return objects.holds(url, source.read_bytes())
