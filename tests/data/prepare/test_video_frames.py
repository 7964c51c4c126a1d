"""Videos become frames by the published rule, and conversations about them entries with images."""

from __future__ import annotations

import json
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from megatron_vlm.commands.convert_dataset import main
from megatron_vlm.data.prepare.video_frames import frame_indices
from megatron_vlm.data.sources.open_source import open_source
from tests.data.helpers import conversation, image_bytes

RATE, FRAMES = 8, 44


def write_video(path: Path, frames: int = FRAMES, rotation: int = 0) -> Path:
    """Frame i is grey of the brightness 5 i, with B-frames, so that frames are not stored in their order."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 4_000_000
        stream.codec_context.max_b_frames = 2
        stream.time_base = Fraction(1, RATE)
        for number in range(frames):
            pixels = np.full((48, 64, 3), 5 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("frames", "rate", "fps", "upbound", "indices"),
    [
        (44, 8, 1, 0, [0, 8, 16, 24, 32, 40]),
        (44, 8, 2, 0, list(range(0, 44, 4))),
        (44, 7.6, 1, 6, [0, 8, 16, 24, 32, 40]),
        (44, 8, 1, 4, [0, 14, 28, 43]),
        (3, 8, 1, 4, [0]),
        (3, 1, 30, 0, [0, 1, 2]),
    ],
)
def test_the_published_rule(frames: int, rate: float, fps: float, upbound: int, indices: list[int]) -> None:
    assert frame_indices(frames, rate, fps, upbound) == indices


def test_conversations_about_videos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    videos, images = tmp_path / "videos", tmp_path / "images"
    (videos / "extracted").mkdir(parents=True)
    write_video(videos / "a.mp4")
    for number in range(25):
        (videos / "extracted" / f"{number:03d}.png").write_bytes(image_bytes(5, 6, seed=number))
    (videos / "short.mp4").write_bytes((videos / "a.mp4").read_bytes()[:3000])
    images.mkdir()
    (images / "still.png").write_bytes(image_bytes(7, 7))
    rows = [
        {
            "id": "v",
            "video": "a.mp4",
            "conversations": conversation("<image>\nWhat happens?", "It brightens.", "?", "No."),
        },
        {"id": "w", "video": "a.mp4", "conversations": conversation("What is in <video>?", "Grey.")},
        {"id": "f", "video": "extracted", "conversations": conversation("What?", "Noise.")},
        {"id": "i", "image": "still.png", "conversations": conversation("<image>\nWhat?", "Noise.")},
        {"id": "c", "video": "short.mp4", "conversations": conversation("What?", "Nothing.")},
        {"id": "g", "video": "gone.mp4", "conversations": conversation("What?", "Nothing.")},
    ]
    (tmp_path / "in.json").write_text(json.dumps(rows))
    output = tmp_path / "out.jsonl"
    flags = ["--input", str(tmp_path / "in.json"), "--output", str(output), "--image-folder", str(images)]
    assert main(["video", *flags, "--video-folder", str(videos), "--frames-upbound", "4"]) == 0
    source = open_source(output, images)
    assert [source.sample(i).id for i in range(4)] == ["v", "w", "f", "i"] and len(source) == 4
    for index, question in [(0, "<image>\n<image>\n<image>\n<image>\nWhat happens?"),
                            (1, "What is in <image>\n<image>\n<image>\n<image>?")]:  # fmt: skip
        sample = source.sample(index)
        assert sample.turns[0].text == question and sample.measure_images(verify=True) == [(64, 48)] * 4
        shades = [np.asarray(Image.open(sample.open_image(i))).mean() for i in range(4)]
        assert np.allclose(shades, [5 * i for i in (0, 14, 28, 43)], atol=4)
    folder = source.sample(2)
    assert [folder.read_image(i) for i in range(10)] == [image_bytes(5, 6, seed=24 * i // 9) for i in range(10)]
    listed = [json.loads(line) for line in (tmp_path / "out.jsonl.quarantine.jsonl").read_text().splitlines()]
    assert [item["reason"] for item in listed] == ["unreadable video", "missing video"]
    assert "short.mp4" in listed[0]["message"] and "gone.mp4 does not exist" in listed[1]["message"]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "av", None)
        assert main(["video", *flags, "--video-folder", str(videos)]) == 2
    assert "pip install 'megatron-vlm[video]'" in capsys.readouterr().err
