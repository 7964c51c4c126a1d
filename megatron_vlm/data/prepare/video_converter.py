"""The converter of conversations about videos."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from megatron_vlm.data.prepare.cells import cell, is_missing, text_cell
from megatron_vlm.data.prepare.converters import Conversations, Entry, column_arguments, entry_of, register
from megatron_vlm.data.prepare.image_store import ImageStore
from megatron_vlm.data.prepare.tables import RowError
from megatron_vlm.data.prepare.video_frames import read_frames
from megatron_vlm.data.processing.conversation import IMAGE_PLACEHOLDER, Turn
from megatron_vlm.data.sources.message_formats import EntryError, read_turns

_VIDEO_PLACEHOLDER = "<video>"


@register
class VideoConversations(Conversations):
    """conversations about videos, whose frames become images; rows without a video are as in `conversations`"""

    name = "video"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        super().add_arguments(parser)
        column_arguments(parser, video="video")
        parser.add_argument(
            "--video-folder", type=Path, default=Path(), metavar="DIR", help="root of the paths of videos"
        )
        parser.add_argument("--video-fps", type=_positive, default=1.0, metavar="N", help="frames taken per second")
        parser.add_argument("--frames-upbound", type=int, default=0, metavar="N", help="most frames; default: no limit")

    def entry(self, row: Entry, images: ImageStore) -> Entry:
        options = self.options
        if is_missing(row.get(options.video_column)):
            return super().entry(row, images)
        column = options.turns_column if options.turns_column in row else "messages"
        try:
            turns, _ = read_turns(cell(row, column), column)
        except EntryError as error:
            raise RowError(error.reason, error.what) from None
        path = options.video_folder / text_cell(row, options.video_column)
        frames = [images.take(frame) for frame in read_frames(path, options.video_fps, options.frames_upbound)]
        return entry_of(row, _with_frames(turns, len(frames)), frames)


def _with_frames(turns: list[Turn], frames: int) -> list[Turn]:
    """One image placeholder for each frame in place of the one that stands for the video, if the questions have one."""
    placeholders = "\n".join([IMAGE_PLACEHOLDER] * frames)
    for number, turn in enumerate(turns):
        for mark in (IMAGE_PLACEHOLDER, _VIDEO_PLACEHOLDER):
            if turn.role == "human" and mark in turn.text:
                return [
                    *turns[:number],
                    Turn(turn.role, turn.text.replace(mark, placeholders, 1)),
                    *turns[number + 1 :],
                ]
    return turns


def _positive(text: str) -> float:
    """For argparse."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number > 0")
    return number
