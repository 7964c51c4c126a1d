"""The connection to an S3-compatible store: client, retries, and errors that name the object.

The endpoint is `S3_ENDPOINT_URL` or boto3's own setting. Credentials come from boto3's usual chain (environment, shared
files, instance roles).
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_SCHEME = "s3://"
_PERMANENT_ERRORS = {"400", "401", "403", "404", "AccessDenied", "InvalidAccessKeyId", "InvalidRange", "NoSuchBucket",
                     "NoSuchKey", "NoSuchUpload", "SignatureDoesNotMatch"}  # fmt: skip
"""Error codes that are not retried."""


class S3Error(OSError):
    """A request that failed; the message names the object and what to do."""


class ObjectMissing(S3Error, FileNotFoundError):
    """The object does not exist."""


class BadTransfer(Exception):
    """The transferred bytes are incomplete or damaged; the request is tried again."""


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


def is_remote(path: object) -> bool:
    """Whether a path is an s3:// URL."""
    return str(path).startswith(_SCHEME)


def join(url: str, name: str) -> str:
    """The URL of the object `name` below a prefix."""
    return f"{url.rstrip('/')}/{name}"


def split(url: str) -> tuple[str, str]:
    """Bucket and key of a URL."""
    bucket, _, key = url.removeprefix(_SCHEME).partition("/")
    if not bucket:
        raise S3Error(f"{url} has no bucket: expected s3://bucket/folder")
    return bucket, key


@lru_cache(maxsize=1)
def client_of(process: int, timeout: float) -> Any:
    """The client of a process. Its cache is cleared where the environment changes, in tests."""
    import boto3
    from botocore.config import Config

    config = Config(
        connect_timeout=min(timeout, 10.0),
        read_timeout=timeout,
        retries={"total_max_attempts": 1},  # `retry` does it, and also detects incomplete responses
        max_pool_connections=32,
        # Stores other than Amazon's may not support boto3's own checksums. We check Content-MD5 and sizes.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    endpoint = os.environ.get("S3_ENDPOINT_URL")
    try:
        return boto3.session.Session().client("s3", endpoint_url=endpoint, config=config)
    except ValueError as error:
        raise S3Error(f"S3_ENDPOINT_URL is {endpoint!r}: expected an address like https://host:port") from error


def client() -> Any:
    """boto3's client of this process. A forked process must not share connections with its parent."""
    return client_of(os.getpid(), retry_policy.timeout)


def retry(what: str, url: str | Path, action: Callable[[], Result]) -> Result:
    """Run `action` on an object, with retries and exponential backoff.

    Raises:
        ObjectMissing: the object does not exist.
        S3Error: access is denied, or all attempts failed.
    """
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    for attempt in range(1, retry_policy.attempts + 1):
        try:
            return action()
        except S3Error:
            raise
        except NoCredentialsError as error:
            raise S3Error(f"cannot {what} {url}: no credentials. Set AWS_ACCESS_KEY_ID and its secret.") from error
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            if code in ("404", "NoSuchKey"):
                raise ObjectMissing(f"{url} does not exist") from error
            if code in _PERMANENT_ERRORS:
                raise S3Error(f"cannot {what} {url}: {error}") from error
            failure: Exception = error
        except (BotoCoreError, OSError, BadTransfer) as error:
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
    raise S3Error(f"cannot {what} {url}, tried {retry_policy.attempts} times, last error {reason}") from failure
