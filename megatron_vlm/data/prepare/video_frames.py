"""Frames of a video, chosen by the rule of the published training.

Of n frames at r per second, every round(r / video_fps)-th is taken. If that is more than `frames_upbound`, that many at
equal distances from the first to the last are taken instead. A folder of frames that were extracted before gives ten at
equal distances.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vlm.data.errors import DataError
from megatron_vlm.data.prepare.tables import RowError

_FRAMES_OF_A_FOLDER = 10
_JPEG_QUALITY = 95
_FRAME_FILES = (".jpg", ".jpeg", ".png", ".webp")


def frame_indices(frames: int, rate: float, video_fps: float, frames_upbound: int) -> list[int]:
    """Indices of the frames to take.

    Args:
        frames: of the video.
        rate: frames per second of the video.
        video_fps: frames to take per second.
        frames_upbound: most frames to take; 0: no limit.
    """
    taken = list(range(0, frames, max(round(rate / video_fps), 1)))
    if 0 < frames_upbound < len(taken):
        return evenly(frames, frames_upbound)
    return taken


def evenly(frames: int, count: int) -> list[int]:
    """Indices of `count` of the frames, from the first to the last, at equal distances rounded down."""
    return [int(index) for index in np.linspace(0, frames - 1, count).astype(int)]


def read_frames(path: Path, video_fps: float, frames_upbound: int) -> list[bytes]:
    """The chosen frames of a video file as JPEG files, or of a folder as its image files.

    Raises:
        RowError: the video is missing, cannot be decoded or has no frame.
        DataError: PyAV is not installed.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in _FRAME_FILES)
        if not files:
            raise RowError("unreadable video", f"folder {path} has no {', '.join(_FRAME_FILES)} files")
        chosen = dict.fromkeys(evenly(len(files), min(_FRAMES_OF_A_FOLDER, len(files))))
        return [files[index].read_bytes() for index in chosen]
    if not path.is_file():
        raise RowError("missing video", f"{path} does not exist")
    try:
        import av
    except ImportError as error:
        raise DataError("reading videos needs PyAV: pip install 'megatron-vlm[video]'") from error
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            rate = float(stream.average_rate or stream.guessed_rate or 1)
            total = sum(packet.size > 0 for packet in container.demux(stream))
        wanted = frame_indices(total, rate, video_fps, frames_upbound)
        found = list(_decode(av, path, wanted))
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise RowError("unreadable video", f"{path}: {type(error).__name__}: {error}") from error
    if len(found) < len(wanted) or not found:
        raise RowError(
            "unreadable video", f"{path}: {len(found)} of {len(wanted)} frames can be decoded: it is not whole"
        )
    return found


def _decode(av: Any, path: Path, wanted: list[int]) -> Iterator[bytes]:
    """The frames with these indices, ascending, in the order of display; an index that occurs twice comes twice."""
    remaining = iter(wanted)
    next_index = next(remaining, None)
    with av.open(str(path)) as container:
        for index, frame in enumerate(container.decode(container.streams.video[0])):
            if next_index is None:
                return
            if index == next_index:
                image = frame.to_image()
                if frame.rotation:
                    image = image.rotate(frame.rotation, expand=True)
                stream = io.BytesIO()
                image.save(stream, "JPEG", quality=_JPEG_QUALITY)
                while index == next_index:
                    yield stream.getvalue()
                    next_index = next(remaining, None)
