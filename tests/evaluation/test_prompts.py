"""Messages and settings of lmms-eval as the engine takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_vlm.evaluation.prompts import (
    MAX_NEW_TOKENS,
    prompt_from_messages,
    prompt_from_text,
    read_image,
    sampling_params,
)
from tests.checkpoint_convert.whole_model import picture

IMAGES = [picture((20 + i, 30), i) for i in range(3)]


def user(*parts: str | Image.Image) -> list[dict[str, Any]]:
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "url": p} for p in parts]
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    ("parts", "expected"),
    {
        "text": (["Why?"], "Why?"),
        "one image": ([IMAGES[0], "Why?"], "<image>\nWhy?"),
        "two images": ([IMAGES[0], IMAGES[1], "Why?"], "<image>\n<image>\nWhy?"),
        "one image in the text": (["Look", IMAGES[0], "here"], "<image>\nLook here"),
        "images in the text": (["A", IMAGES[0], "or", IMAGES[1], "?"], "A <image> or <image> ?"),
        "placed by the task": ([IMAGES[0], IMAGES[1], "A <image>, B <image>"], "A <image>, B <image>"),
        "a placeholder without image": (["What does <image> mean in HTML?"], "What does  mean in HTML?"),
        "more placeholders than images": ([IMAGES[0], "<image> and <image>"], "<image>\n and "),
    }.values(),
)
def test_where_images_stand(parts: list[str | Image.Image], expected: str) -> None:
    prompt = prompt_from_messages(user(*parts))
    assert [(turn.role, turn.text) for turn in prompt.turns] == [("human", expected)]
    assert [image.size for image in prompt.images] == [part.size for part in parts if isinstance(part, Image.Image)]


def test_roles() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        *user(IMAGES[0], "Why?"),
        {"role": "assistant", "content": [{"type": "text", "text": "So."}]},
        *user("Really?"),
    ]
    turns = prompt_from_messages(messages).turns
    assert turns == [("human", "Be brief.\n<image>\nWhy?"), ("gpt", "So."), ("human", "Really?")]
    with pytest.raises(ValueError, match="role 'tool'"):
        prompt_from_messages([{"role": "tool", "content": "x"}])
    with pytest.raises(ValueError, match="the task has a video: the model takes text and images"):
        prompt_from_messages([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}])


def test_text_with_images() -> None:
    prompt = prompt_from_text("Why?", IMAGES[:2])
    assert prompt.turns[0].text == "<image>\n<image>\nWhy?"
    assert len(prompt.images) == 2


def test_images_are_upright_and_rgb(tmp_path: Path) -> None:
    rotated, exif = Image.new("L", (30, 20), 7), Image.Exif()
    exif[0x0112] = 6
    rotated.save(tmp_path / "a.jpg", exif=exif)
    data = (tmp_path / "a.jpg").read_bytes()
    for source in (Image.open(tmp_path / "a.jpg"), str(tmp_path / "a.jpg"), data, {"bytes": data, "path": None}):
        image = read_image(source)
        assert (image.mode, image.size) == ("RGB", (20, 30)), source
    with pytest.raises(ValueError, match="a float as an image"):
        read_image(1.0)


def test_settings_of_a_task() -> None:
    params = sampling_params({"until": ["\n\n", "ASSISTANT:"], "max_new_tokens": 16, "num_beams": 1, "top_p": None})
    assert (params.max_new_tokens, params.temperature, params.stop) == (16, 0, ("ASSISTANT:",))
    assert sampling_params({"until": None}).max_new_tokens == MAX_NEW_TOKENS
    assert sampling_params({"until": "stop"}).stop == ("stop",)
    assert sampling_params({"temperature": 0.7}).temperature == 0.7
    assert sampling_params({"temperature": 0.7, "do_sample": False}).temperature == 0
    assert sampling_params({"do_sample": True, "top_k": 5}).temperature == 1
    with pytest.raises(ValueError, match="beam search is not supported"):
        sampling_params({"num_beams": 4})
