"""lmms-eval's messages, texts and generation settings as prompts and sampling parameters of the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_vlm.data.processing.conversation import IMAGE_PLACEHOLDER, Turn, encode_conversation, encode_prompt
from megatron_vlm.data.processing.image_io import decode_image, upright_rgb
from megatron_vlm.data.processing.image_tokens import num_image_tokens
from megatron_vlm.data.processing.tiling import ImageGeometry
from megatron_vlm.inference.engine import Engine
from megatron_vlm.inference.request import AnsweredPrompt, Prompt, SamplingParams

MAX_NEW_TOKENS = 1024
"""Where a task sets no max_new_tokens; the published evaluation had the same."""
_ROLES = {"user": "human", "assistant": "gpt"}
_DEFAULT_STOP = "\n\n"
"""lmms-eval gives it as a stop word to tasks that have none. Its models do not stop there, nor did the published one: a
blank line would truncate an answer."""


def prompt_from_messages(messages: Sequence[Mapping[str, Any]]) -> Prompt:
    """A chat of lmms-eval: roles user, assistant and system, whose content is a list of texts and images.

    Images that stand before the text get a line each, as in training; others stay where they are. A system message
    becomes the beginning of the next question, because the chat template has no such role.

    Raises:
        ValueError: a content or role that the model does not take, such as a video.
    """
    turns: list[Turn] = []
    images: list[Image.Image] = []
    system = ""
    for message in messages:
        text, found = _text_and_images(message["content"])
        if message["role"] == "system":
            system += f"{text}\n"
            continue
        if message["role"] not in _ROLES:
            raise ValueError(f"role {message['role']!r}: the model knows {', '.join(_ROLES)} and system")
        turns.append(Turn(_ROLES[message["role"]], system + text))
        images += found
        system = ""
    return Prompt(turns, images)


def prompt_from_text(text: str, visuals: Sequence[Any]) -> Prompt:
    """A question and its images, which stand where `<image>` is in the text, or in front of it."""
    content: list[dict[str, Any]] = [{"type": "image", "url": visual} for visual in visuals]
    return prompt_from_messages([{"role": "user", "content": [*content, {"type": "text", "text": text}]}])


def _text_and_images(content: str | Sequence[Mapping[str, Any]]) -> tuple[str, list[Image.Image]]:
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    for part in parts:
        if part["type"] not in ("text", "image"):
            raise ValueError(f"the task has a {part['type']}: the model takes text and images")
    images = [read_image(part["url"]) for part in parts if part["type"] == "image"]
    texts = [part["text"] for part in parts if part["type"] == "text"]
    if sum(text.count(IMAGE_PLACEHOLDER) for text in texts) == len(images):
        return "".join(texts), images  # the task has placed its images itself, or has none
    leading, question = "", ""
    for part in parts:
        if part["type"] == "text":
            question += part["text"].replace(IMAGE_PLACEHOLDER, "")  # it stands for no image
        elif question.strip() and len(images) > 1:
            question += f" {IMAGE_PLACEHOLDER} "
        else:
            leading += f"{IMAGE_PLACEHOLDER}\n"
            question += " " if question.strip() else ""
    return leading + question, images


def read_image(visual: Any) -> Image.Image:
    """An upright RGB image from a Pillow image, the path of a file, bytes, or a row of a data set with either.

    Raises:
        ValueError: none of these.
        ImageUnreadable: the bytes are no image.
    """
    if isinstance(visual, Mapping):
        visual = visual.get("bytes") or visual.get("path")
    if isinstance(visual, Image.Image):
        return upright_rgb(visual)
    if isinstance(visual, str | Path):
        return decode_image(Path(visual).read_bytes())
    if isinstance(visual, bytes):
        return decode_image(visual)
    raise ValueError(f"the task gives a {type(visual).__name__} as an image: give a Pillow image or the path of a file")


def sampling_params(settings: Mapping[str, Any]) -> SamplingParams:
    """A task's generation_kwargs. Greedy unless do_sample or a temperature asks for more.

    Raises ValueError for values out of range, and for beam search, which the engine does not have.
    """
    if (beams := settings.get("num_beams") or 1) > 1:
        raise ValueError(f"num_beams is {beams}: beam search is not supported; use 1")
    temperature = float(settings.get("temperature") or 0)
    if settings.get("do_sample") and "temperature" not in settings:
        temperature = 1.0
    until = settings.get("until") or []
    words = [until] if isinstance(until, str) else until
    return SamplingParams(
        max_new_tokens=int(settings.get("max_new_tokens") or MAX_NEW_TOKENS),
        temperature=temperature if settings.get("do_sample", True) else 0.0,
        top_k=int(settings.get("top_k") or 0),
        top_p=float(settings.get("top_p") or 1),
        repetition_penalty=float(settings.get("repetition_penalty") or 1),
        seed=settings.get("seed"),
        stop=tuple(word for word in words if word and word != _DEFAULT_STOP),
    )


def num_tokens(prompt: Prompt, engine: Engine) -> int:
    """Number of tokens of a prompt, image tokens included. Errors as in prompts.encode of the engine."""
    model = engine.recipe.model
    geometry = ImageGeometry.of(model, engine.recipe.data.image_aspect_ratio)
    lengths = [num_image_tokens(image.size, geometry) for image in prompt.images]
    encode = encode_conversation if isinstance(prompt, AnsweredPrompt) else encode_prompt
    return len(encode(prompt.turns, engine.tokenizer, lengths, model.image_token_index).ids)
