"""Objects in any S3-compatible store: read, written and verified, with retries and errors that name the object.

The endpoint is boto3's own setting or `S3_ENDPOINT_URL`; credentials come from boto3's usual chain (environment, shared
files, instance roles).
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from megatron_vlm.data.errors import DataError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_SCHEME = "s3://"
_BLOCK = 1 << 20
_HOPELESS = {"400", "401", "403", "404", "AccessDenied", "InvalidAccessKeyId", "NoSuchBucket", "NoSuchKey",
             "SignatureDoesNotMatch"}  # fmt: skip
"""Answers that another attempt does not change."""


@dataclass
class Patience:
    """How long a store is waited for."""

    attempts: int = 6
    first_delay: float = 0.5
    """Seconds before the second attempt; doubled for each further one, and varied so that ranks do not come at once."""
    timeout: float = 60.0
    """Seconds without a byte after which an attempt has failed."""


patience = Patience()
"""Of this process and those forked from it."""


class ObjectMissing(DataError):
    """There is no such object."""


class _Short(Exception):
    """Fewer bytes came than were promised."""


def is_remote(path: str | Path) -> bool:
    """Whether a path is in an S3 store."""
    return str(path).startswith(_SCHEME)


def join(url: str, name: str) -> str:
    """The object `name` below a prefix."""
    return f"{url.rstrip('/')}/{name}"


def _split(url: str) -> tuple[str, str]:
    bucket, _, key = url.removeprefix(_SCHEME).partition("/")
    if not bucket:
        raise DataError(f"{url} names no bucket: expected s3://bucket/folder")
    return bucket, key


@lru_cache(maxsize=1)
def _client_of(process: int, timeout: float) -> Any:
    import boto3
    from botocore.config import Config

    config = Config(
        connect_timeout=min(timeout, 10.0),
        read_timeout=timeout,
        retries={"total_max_attempts": 1},  # retries are made here, where a short answer is noticed too
        max_pool_connections=32,
        # boto3 adds checksums of its own that other stores than Amazon's may not know; ours are Content-MD5 and sizes.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    endpoint = os.environ.get("S3_ENDPOINT_URL")
    try:
        return boto3.session.Session().client("s3", endpoint_url=endpoint, config=config)
    except ValueError as error:
        raise DataError(f"S3_ENDPOINT_URL is {endpoint!r}: expected an address like https://host:port") from error


def _client() -> Any:
    """A client of this process: connections must not be shared with the process it was forked from."""
    return _client_of(os.getpid(), patience.timeout)


def _persist(what: str, url: str, action: Callable[[], Result]) -> Result:
    """Do something with an object, again with growing pauses when it fails.

    Raises:
        ObjectMissing: there is no such object.
        DataError: it is not allowed, or failed every time.
    """
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    for attempt in range(1, patience.attempts + 1):
        try:
            return action()
        except NoCredentialsError as error:
            raise DataError(f"cannot {what} {url}: no credentials. Set AWS_ACCESS_KEY_ID and its secret.") from error
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            if code in ("404", "NoSuchKey"):
                raise ObjectMissing(f"{url} does not exist") from error
            if code in _HOPELESS:
                raise DataError(f"cannot {what} {url}: {error}") from error
            failure: Exception = error
        except (BotoCoreError, OSError, _Short) as error:
            failure = error
        except Exception as error:
            if type(error).__module__.partition(".")[0] not in ("urllib3", "http"):
                raise
            failure = error  # the connection broke while the body was read
        told = f"{type(failure).__name__}: {failure}"
        if attempt < patience.attempts:
            delay = patience.first_delay * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)
            logger.warning("%s %s failed (%s); attempt %d follows in %.1f s", what, url, told, attempt + 1, delay)
            time.sleep(delay)
    raise DataError(f"cannot {what} {url}, tried {patience.attempts} times, last {told}") from failure


def read_bytes(url: str) -> bytes:
    """A whole object.

    Raises:
        ObjectMissing: there is none.
        DataError: it could not be read.
    """
    bucket, key = _split(url)

    def read() -> bytes:
        answer = _client().get_object(Bucket=bucket, Key=key)
        data: bytes = answer["Body"].read()
        if len(data) != answer["ContentLength"]:
            raise _Short(f"{len(data)} of {answer['ContentLength']} bytes came")
        return data

    return _persist("read", url, read)


def download(url: str, target: Path, size: int | None = None, sha1: str | None = None) -> None:
    """Copy an object to a file, verified.

    Args:
        url: of the object.
        target: overwritten.
        size: bytes it must have; default: those the store says.
        sha1: hex, that it must have; default: not looked at.

    Raises:
        ObjectMissing: there is no such object.
        DataError: it could not be read, or is not what it should be.
    """
    bucket, key = _split(url)

    def fetch() -> None:
        answer = _client().get_object(Bucket=bucket, Key=key)
        digest, came = hashlib.sha1(usedforsecurity=False), 0
        expected = answer["ContentLength"] if size is None else size
        with open(target, "r+b" if target.exists() else "wb") as file:
            for block in iter(lambda: answer["Body"].read(_BLOCK), b""):
                came += len(block)
                if came <= expected:  # never more than the place that was reserved
                    file.write(block)
                    digest.update(block)
            file.truncate()
        if came != expected:
            raise _Short(f"{came} bytes came where {expected} were expected: truncated, or not the file of the index")
        if sha1 is not None and digest.hexdigest() != sha1:
            raise _Short("its sha1 is not that of the index: damaged, or not the file of the index")

    _persist("read", url, fetch)


def upload(source: bytes | Path, url: str) -> None:
    """Write an object and see that it arrived whole: the store checks its MD5, and is asked for its size afterwards.

    Raises:
        DataError: it could not be written, or is not what was sent.
    """
    bucket, key = _split(url)
    data = source if isinstance(source, bytes) else source.read_bytes()
    md5 = hashlib.md5(data, usedforsecurity=False)

    def send() -> None:
        _client().put_object(
            Bucket=bucket, Key=key, Body=data, ContentMD5=b64encode(md5.digest()).decode(),
            Metadata={"md5": md5.hexdigest()},
        )  # fmt: skip
        if not _is_there(bucket, key, len(data), md5.hexdigest()):
            raise _Short("the store does not show what was sent")

    _persist("write", url, send)


def is_stored(source: Path, url: str) -> bool:
    """Whether an object is already there, of the size and MD5 of a file.

    Raises:
        DataError: the store could not be asked.
    """
    bucket, key = _split(url)
    data = source.read_bytes()
    digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
    try:
        return _persist("look at", url, lambda: _is_there(bucket, key, len(data), digest))
    except ObjectMissing:
        return False


def _is_there(bucket: str, key: str, size: int, md5: str) -> bool:
    head = _client().head_object(Bucket=bucket, Key=key)
    # An ETag is the MD5 unless the object was encrypted or sent in parts; then our own note is relied on.
    known = head["Metadata"].get("md5") or head["ETag"].strip('"')
    return head["ContentLength"] == size and md5 in (known, head["ETag"].strip('"'))


def exists(url: str) -> bool:
    """Whether there is such an object.

    Raises:
        DataError: the store could not be asked.
    """
    bucket, key = _split(url)
    try:
        _persist("look at", url, lambda: _client().head_object(Bucket=bucket, Key=key))
    except ObjectMissing:
        return False
    return True


def list_names(url: str) -> list[str]:
    """Names of all objects below a prefix, relative to it, sorted.

    Raises:
        DataError: the store could not be asked.
    """
    bucket, key = _split(url.rstrip("/") + "/")

    def pages() -> Iterator[str]:
        for page in _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key):
            yield from (item["Key"].removeprefix(key) for item in page.get("Contents", []))

    return _persist("list", url, lambda: sorted(pages()))
