"""Verified reads and writes of objects in any S3-compatible store, with retries and errors that name the object.

The endpoint is `S3_ENDPOINT_URL` or boto3's own setting. Credentials come from boto3's usual chain (environment, shared
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
_PERMANENT_ERRORS = {"400", "401", "403", "404", "AccessDenied", "InvalidAccessKeyId", "NoSuchBucket", "NoSuchKey",
                     "SignatureDoesNotMatch"}  # fmt: skip
"""Error codes that are not retried."""


@dataclass
class RetryPolicy:
    """Attempts, delays and timeouts of requests."""

    attempts: int = 6
    first_delay: float = 0.5
    """Seconds before the second attempt. Doubles with each attempt; jittered, so that ranks do not retry in step."""
    timeout: float = 60.0
    """Seconds without data after which an attempt fails."""


retry_policy = RetryPolicy()
"""Of this process and those forked from it."""


class ObjectMissing(DataError):
    """The object does not exist."""


class _BadTransfer(Exception):
    """The transferred bytes are incomplete or damaged."""


def is_remote(path: str | Path) -> bool:
    """Whether a path is an s3:// URL."""
    return str(path).startswith(_SCHEME)


def join(url: str, name: str) -> str:
    """The URL of the object `name` below a prefix."""
    return f"{url.rstrip('/')}/{name}"


def _split(url: str) -> tuple[str, str]:
    bucket, _, key = url.removeprefix(_SCHEME).partition("/")
    if not bucket:
        raise DataError(f"{url} has no bucket: expected s3://bucket/folder")
    return bucket, key


@lru_cache(maxsize=1)
def _client_of(process: int, timeout: float) -> Any:
    import boto3
    from botocore.config import Config

    config = Config(
        connect_timeout=min(timeout, 10.0),
        read_timeout=timeout,
        retries={"total_max_attempts": 1},  # `_retry` does it, and also detects incomplete responses
        max_pool_connections=32,
        # Stores other than Amazon's may not support boto3's own checksums. We check Content-MD5 and sizes.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    endpoint = os.environ.get("S3_ENDPOINT_URL")
    try:
        return boto3.session.Session().client("s3", endpoint_url=endpoint, config=config)
    except ValueError as error:
        raise DataError(f"S3_ENDPOINT_URL is {endpoint!r}: expected an address like https://host:port") from error


def _client() -> Any:
    """The client of this process. A forked process must not share connections with its parent."""
    return _client_of(os.getpid(), retry_policy.timeout)


def _retry(what: str, url: str, action: Callable[[], Result]) -> Result:
    """Run `action` on an object, with retries and exponential backoff.

    Raises:
        ObjectMissing: the object does not exist.
        DataError: access is denied, or all attempts failed.
    """
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    for attempt in range(1, retry_policy.attempts + 1):
        try:
            return action()
        except NoCredentialsError as error:
            raise DataError(f"cannot {what} {url}: no credentials. Set AWS_ACCESS_KEY_ID and its secret.") from error
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            if code in ("404", "NoSuchKey"):
                raise ObjectMissing(f"{url} does not exist") from error
            if code in _PERMANENT_ERRORS:
                raise DataError(f"cannot {what} {url}: {error}") from error
            failure: Exception = error
        except (BotoCoreError, OSError, _BadTransfer) as error:
            failure = error
        except Exception as error:
            if type(error).__module__.partition(".")[0] not in ("urllib3", "http"):
                raise
            failure = error  # the connection broke during the transfer
        reason = f"{type(failure).__name__}: {failure}"
        if attempt < retry_policy.attempts:
            delay = retry_policy.first_delay * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)
            logger.warning("%s %s failed (%s); attempt %d in %.1f s", what, url, reason, attempt + 1, delay)
            time.sleep(delay)
    raise DataError(f"cannot {what} {url}, tried {retry_policy.attempts} times, last error {reason}") from failure


def read_bytes(url: str) -> bytes:
    """The content of an object.

    Raises:
        ObjectMissing: the object does not exist.
        DataError: it could not be read.
    """
    bucket, key = _split(url)

    def read() -> bytes:
        response = _client().get_object(Bucket=bucket, Key=key)
        data: bytes = response["Body"].read()
        if len(data) != response["ContentLength"]:
            raise _BadTransfer(f"received {len(data)} of {response['ContentLength']} bytes")
        return data

    return _retry("read", url, read)


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
    bucket, key = _split(url)

    def fetch() -> None:
        response = _client().get_object(Bucket=bucket, Key=key)
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
            raise _BadTransfer(
                f"received {received} bytes, expected {expected}: the object is truncated or was replaced"
            )
        if sha1 is not None and digest.hexdigest() != sha1:
            raise _BadTransfer("its sha1 differs from the index: the object is damaged or was replaced")

    _retry("read", url, fetch)


def upload(source: bytes | Path, url: str) -> None:
    """Upload an object and verify it: the store checks the MD5, then size and MD5 are read back.

    Raises:
        DataError: it could not be written, or the stored object differs.
    """
    bucket, key = _split(url)
    data = source if isinstance(source, bytes) else source.read_bytes()
    md5 = hashlib.md5(data, usedforsecurity=False)

    def send() -> None:
        _client().put_object(
            Bucket=bucket, Key=key, Body=data, ContentMD5=b64encode(md5.digest()).decode(),
            Metadata={"md5": md5.hexdigest()},
        )  # fmt: skip
        if not _matches(bucket, key, len(data), md5.hexdigest()):
            raise _BadTransfer("the stored object differs from what was sent")

    _retry("write", url, send)


def is_uploaded(source: Path, url: str) -> bool:
    """Whether the object exists with the size and MD5 of a file.

    Raises:
        DataError: the store cannot be queried.
    """
    bucket, key = _split(url)
    data = source.read_bytes()
    digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
    try:
        return _retry("query", url, lambda: _matches(bucket, key, len(data), digest))
    except ObjectMissing:
        return False


def _matches(bucket: str, key: str, size: int, md5: str) -> bool:
    head = _client().head_object(Bucket=bucket, Key=key)
    # The ETag is the MD5, except for encrypted or multipart objects. For those our own metadata entry is used.
    known = head["Metadata"].get("md5") or head["ETag"].strip('"')
    return head["ContentLength"] == size and md5 in (known, head["ETag"].strip('"'))


def exists(url: str) -> bool:
    """Whether the object exists.

    Raises:
        DataError: the store cannot be queried.
    """
    bucket, key = _split(url)
    try:
        _retry("query", url, lambda: _client().head_object(Bucket=bucket, Key=key))
    except ObjectMissing:
        return False
    return True


def list_names(url: str) -> list[str]:
    """Sorted names of all objects below a prefix, relative to it.

    Raises:
        DataError: the store cannot be queried.
    """
    bucket, key = _split(url.rstrip("/") + "/")

    def pages() -> Iterator[str]:
        for page in _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key):
            yield from (item["Key"].removeprefix(key) for item in page.get("Contents", []))

    return _retry("list", url, lambda: sorted(pages()))
