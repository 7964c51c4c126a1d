"""An object that is written like a file, in parts: neither disk nor memory ever holds all of it."""

from __future__ import annotations

import hashlib
import io
import logging
from base64 import b64encode
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_vlm.runtime.s3 import objects
from megatron_vlm.runtime.s3.client import BadTransfer, ObjectMissing, S3Error, client, retry, split

logger = logging.getLogger(__name__)

PART_BYTES = 32 << 20
"""Stores allow 10,000 parts, so that an object may have 312 GiB."""
_UPLOADS = 4


@contextmanager
def writing(url: str, part_bytes: int | None = None) -> Iterator[io.RawIOBase]:
    """A stream whose bytes become the object `url` when the block ends without an error; else nothing appears.

    Parts are sent by threads while the next one is filled: at most five parts are in memory. An object smaller than one
    part is sent as a whole.

    Args:
        url: of the object.
        part_bytes: size of a part, at least 5 MiB for most stores; default: `PART_BYTES`.

    Raises:
        S3Error: it could not be written.
    """
    stream = _Parts(url, part_bytes or PART_BYTES)
    try:
        yield stream
        stream.complete()
    except BaseException:
        stream.abort()
        raise


def upload_file(source: Path, url: str) -> None:
    """Send a file of any size; one that grows meanwhile, as far as it was when its end was reached.

    Raises:
        S3Error: it could not be written.
        OSError: it could not be read.
    """
    with source.open("rb") as file, writing(url) as stream:
        while block := file.read(1 << 20):
            stream.write(block)


class _Parts(io.RawIOBase):
    def __init__(self, url: str, part_bytes: int) -> None:
        self._url, self._part_bytes = url, part_bytes
        self._bucket, self._key = split(url)
        self._buffer, self._size = bytearray(), 0
        self._upload: str | None = None
        self._threads = ThreadPoolExecutor(_UPLOADS, thread_name_prefix="s3")
        self._pending: deque[Future[str]] = deque()
        self._tags: list[str] = []
        """Of the parts that are stored, in order."""

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def write(self, data: Any) -> int:
        """All of it. Raises S3Error where an earlier part could not be sent."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), self._part_bytes):
            self._append(view[start : start + self._part_bytes])
        return len(view)

    def _append(self, view: memoryview) -> None:
        """At most one part."""
        room = self._part_bytes - len(self._buffer)
        self._buffer += view[:room]
        if len(view) >= room:
            self._send()
            self._buffer += view[room:]
        self._size += len(view)

    def _send(self) -> None:
        if self._upload is None:
            self._upload = retry("write", self._url, self._begin)
        while len(self._pending) >= _UPLOADS:
            self._tags.append(self._pending.popleft().result())
        number = len(self._tags) + len(self._pending) + 1
        self._pending.append(self._threads.submit(self._send_part, number, self._buffer))
        self._buffer = bytearray()

    def _begin(self) -> str:
        begun: str = client().create_multipart_upload(Bucket=self._bucket, Key=self._key)["UploadId"]
        return begun

    def _send_part(self, number: int, data: bytearray) -> str:
        md5 = b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()

        def send() -> str:
            answer = client().upload_part(
                Bucket=self._bucket, Key=self._key, UploadId=self._upload, PartNumber=number, Body=data,
                ContentMD5=md5,
            )  # fmt: skip
            tag: str = answer["ETag"]
            return tag

        return retry(f"write part {number} of", self._url, send)

    def complete(self) -> None:
        if self._upload is None:
            objects.write(bytes(self._buffer), self._url)
        else:
            if self._buffer:
                self._send()
            self._tags += [part.result() for part in self._pending]
            retry("write", self._url, self._join_parts)
        self._threads.shutdown()

    def _join_parts(self) -> None:
        parts = [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(self._tags, 1)]
        try:
            client().complete_multipart_upload(
                Bucket=self._bucket, Key=self._key, UploadId=self._upload, MultipartUpload={"Parts": parts}
            )
        except client().exceptions.NoSuchUpload:
            pass  # an attempt before this one, whose answer was lost, may have done it
        stored = client().head_object(Bucket=self._bucket, Key=self._key)["ContentLength"]
        if stored != self._size:
            raise BadTransfer(f"{stored} of {self._size} bytes are stored")

    def abort(self) -> None:
        """Let the store forget the parts; it may not be reachable."""
        self._threads.shutdown(cancel_futures=True)
        if self._upload is not None:
            _abort(self._url, self._bucket, self._key, self._upload)


def abort_uploads(url: str) -> None:
    """Let the store forget what killed processes had sent of objects below a prefix.

    Raises:
        S3Error: the store cannot be queried.
    """
    bucket, key = split(url.rstrip("/") + "/")

    def unfinished() -> list[tuple[str, str]]:
        pages = client().get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=key)
        return [(upload["Key"], upload["UploadId"]) for page in pages for upload in page.get("Uploads", [])]

    for name, upload in retry("list the uploads of", url, unfinished):
        _abort(url, bucket, name, upload)


def _abort(url: str, bucket: str, key: str, upload: str) -> None:
    try:
        retry(
            "abort the upload of",
            url,
            lambda: client().abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload),
        )
    except ObjectMissing:
        pass
    except S3Error as error:
        logger.warning("%s. Its parts stay in the store until its life-cycle rule removes them", error)
