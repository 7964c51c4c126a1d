"""Chat templates of tokenizers, rendered by transformers' engine, with a mask of what the assistant says.

Published templates rarely mark the assistant's part ({% generation %}). Where they do not, an answer is found by
rendering the conversation a second time with marks in place of the answers. Its tokens are those of the answer and of
the special token that follows it and ends the turn.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vlm.data.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer

FILE = "chat_template.jinja"
_CONFIG, _OLD_FILE = "tokenizer_config.json", "chat_template.json"
_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_IMAGE = "<image>"
_PROBE = "\ue002"
_MARK = re.compile("\ue000(\\d+)\ue001")
"""Stands for an answer. These characters are for private use: no template trims them, and no text has them."""

# The `instella` template of conversation.py in Jinja. A message's content is text with <image> for each image, or a
# list of parts, of which the images come first, as in training.
INSTELLA = (
    "{{ eos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant', 'system'] %}"
    "{{ raise_exception('roles are user, assistant and system, not ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>\\n' }}"
    "{% if message['content'] is string %}{% set text = message['content'] %}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% set text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ text.strip() + eos_token + '\\n' }}"
    "{% else %}{{ text + '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


class TemplateError(ValueError):
    """A conversation that a chat template does not render, or not in a way that shows its answers."""


@dataclass
class ChatTemplate:
    """The chat template of a tokenizer folder."""

    text: str
    """Jinja, as in transformers."""
    special_tokens: dict[str, str]
    """bos_token, eos_token and others, which the template may name."""
    fast: FastTokenizer
    """Encodes what the template renders; its special strings are special tokens."""
    fingerprint: str = field(init=False)
    """sha256 in hex of what determines the rendered text."""
    _takes_parts: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        from tokenizers import AddedToken

        self.fast.encode_special_tokens = False
        self.fast.add_special_tokens([AddedToken(_IMAGE, special=True, normalized=False)])
        self._image_id = self.fast.token_to_id(_IMAGE)
        strings = [token.content for token in self.fast.get_added_tokens_decoder().values() if token.special]
        self._special = re.compile("|".join(re.escape(string) for string in sorted(strings, key=len, reverse=True)))
        content = json.dumps([self.text, self.special_tokens], sort_keys=True)
        probe, _ = self._run([{"role": "user", "content": _PROBE}], prompt=False)
        self._takes_parts = _PROBE not in probe  # as do the templates of processors
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()

    def encode(
        self, turns: Sequence[tuple[str, str]], image_lengths: Sequence[int], image_token_index: int, prompt: bool
    ) -> tuple[list[int], list[bool], list[int]]:
        """Token ids, which of them the assistant says, and the positions of each image's first token.

        Args:
            turns: (role, text), roles human, gpt and system; `<image>` stands for the next image.
            image_lengths: number of image tokens of each image.
            image_token_index: their id.
            prompt: whether the assistant's turn is begun at the end.

        Raises:
            TemplateError: the template refuses the conversation, or a text has one of its special tokens.
        """
        messages = [{"role": _ROLES.get(role, role), "content": text} for role, text in turns]
        for message in messages:
            found = self._special.search(message["content"].replace(_IMAGE, ""))
            if found:
                what = f"a text has {found.group()!r}, which the chat template uses to end or begin a turn"
                raise TemplateError(f"{what}. Remove it from the text.")
        rendered, spans = self._render(messages, prompt)
        encoding = self.fast.encode(rendered, add_special_tokens=False)
        said = [False] * len(encoding.ids)
        for start, stop in spans:
            first, last = encoding.char_to_token(start), encoding.char_to_token(stop - 1)
            if first is not None:
                said[first : len(said) if last is None else last + 1] = [True] * (
                    (len(said) if last is None else last + 1) - first
                )
        ids: list[int] = []
        mask: list[bool] = []
        starts: list[int] = []
        for number, supervised in zip(encoding.ids, said, strict=True):
            if number == self._image_id:
                starts.append(len(ids))
                if len(starts) > len(image_lengths):
                    break
                ids += [image_token_index] * image_lengths[len(starts) - 1]
                mask += [False] * image_lengths[len(starts) - 1]
            else:
                ids.append(int(number))
                mask.append(supervised)
        if len(starts) != len(image_lengths):
            raise TemplateError(f"the chat template renders {len(starts)} of {len(image_lengths)} images")
        return ids, mask, starts

    def _render(self, messages: list[dict[str, str]], prompt: bool) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and which of it the assistant says."""
        if re.search(r"\{%-?\s*generation", self.text):
            return self._run(messages, prompt, mask=True)
        rendered, _ = self._run(messages, prompt)
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            return rendered, []
        marked = [
            {**message, "content": f"\ue000{number}\ue001"} if number in answers else message
            for number, message in enumerate(messages)
        ]
        pieces = _MARK.split(self._run(marked, prompt)[0])
        spans, text = [], pieces[0]
        for number, following in zip(map(int, pieces[1::2]), pieces[2::2], strict=True):
            content = messages[number]["content"]
            if not rendered.startswith(text + content):
                content = content.strip()
            start, text = len(text), text + content
            end = self._special.match(following.lstrip())
            space = len(following) - len(following.lstrip())
            spans.append((start, len(text) + (space + end.end() if end else 0)))
            text += following
        if text != rendered or len(spans) != len(answers):
            raise TemplateError(
                "the chat template changes answers, so that they cannot be found in its text. Mark them in the "
                "template with {% generation %} and {% endgeneration %}"
            )
        return rendered, spans

    def _run(
        self, messages: list[dict[str, str]], prompt: bool, mask: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """Render with transformers' engine. With `mask`, also where {% generation %} is."""
        from jinja2 import TemplateError as JinjaError
        from transformers.utils.chat_template_utils import render_jinja_template

        chat: list[dict[str, Any]] = [*messages]
        if self._takes_parts:
            chat = [{**message, "content": _parts(message["content"])} for message in messages]
        try:
            (text,), spans = render_jinja_template(
                [chat], chat_template=self.text, return_assistant_tokens_mask=mask, add_generation_prompt=prompt,
                **self.special_tokens,
            )  # fmt: skip
        except (JinjaError, TypeError, ValueError, KeyError) as error:
            raise TemplateError(f"the chat template refuses the conversation: {error}") from error
        return text, spans[0] if mask else []


def _parts(text: str) -> list[dict[str, str]]:
    """A text with placeholders as a list of parts. The template adds the newline after an image."""
    first, *others = text.split(_IMAGE)
    parts = [{"type": "text", "text": first}] if first else []
    for other in others:
        parts.append({"type": "image"})
        if other := other.removeprefix("\n"):
            parts.append({"type": "text", "text": other})
    return parts


def read_chat_template(folder: Path) -> str | None:
    """The chat template of a tokenizer folder, wherever transformers keeps it; None: there is none.

    Raises:
        DataError: a file is damaged.
    """
    if (folder / FILE).is_file():
        return (folder / FILE).read_text(encoding="utf-8")
    for name in (_OLD_FILE, _CONFIG):
        path = folder / name
        if not path.is_file():
            continue
        try:
            template: Any = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
        except (ValueError, AttributeError) as error:
            raise DataError(f"{path} is not a JSON object: {error}. Download the folder again.") from error
        if isinstance(template, list):  # several by name
            named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
            template = named.get("default")
        if isinstance(template, str) and template:
            return template
    return None
