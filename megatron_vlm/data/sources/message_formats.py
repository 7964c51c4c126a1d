"""The forms in which datasets write a conversation, read as turns.

| form | example of a turn |
|---|---|
| LLaVA | `{"from": "human", "value": "<image>\\nWhat?"}` |
| chat messages | `{"role": "user", "content": "What?"}` |
| content lists | `{"role": "user", "content": [{"type": "image", "path": "a"}, {"type": "text", "text": "What?"}]}` |
| pairs | `{"user": "What?", "assistant": "This."}` |
| columns | `{"from": ["human", "gpt"], "value": ["What?", "This."]}` in place of the list |

Each of them may also be a JSON string.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from megatron_vlm.data.processing.conversation import IMAGE_PLACEHOLDER, Turn

ROLES = {"system": "system", "human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "model": "gpt"}
"""Names of roles in datasets -> roles of turns."""
_MAX_SHOWN = 100
_IMAGE_PARTS = ("image", "image_url")
_IMAGE_VALUES = ("image", "path", "url", "image_url")


class EntryError(Exception):
    """What is wrong with an entry, before its id and file are known. `reason` is one of a fixed set."""

    def __init__(self, reason: str, what: str, remedy: str) -> None:
        super().__init__(f"{reason}: {what}. {remedy}")
        self.reason = reason
        self.what = what
        self.remedy = remedy


def read_turns(conversation: Any, key: str) -> tuple[list[Turn], list[Any]]:
    """All turns as written, and the images that content lists name, in their order.

    Args:
        conversation: in any form of the table above.
        key: where it was found, for error messages.

    Raises:
        EntryError: it has none of the forms, or a turn has no role or no text.
    """
    if isinstance(conversation, str):
        try:
            conversation = json.loads(conversation)
        except (ValueError, RecursionError) as error:
            what = f"{key} is a text that is no JSON ({error})"
            raise EntryError("no conversation", what, "Write a list of turns.") from None
    if isinstance(conversation, dict):
        conversation = _from_columns(conversation, key)
    if not isinstance(conversation, list) or not conversation:
        raise EntryError("no conversation", f"{key} is absent or empty", "Add a question and its answer.")
    images: list[Any] = []
    return list(_turns(conversation, images)), images


def _from_columns(columns: dict[str, Any], key: str) -> list[dict[str, Any]]:
    values = list(columns.values())
    if not values or not all(isinstance(value, list) and len(value) == len(values[0]) for value in values):
        what = f"{key} is an object with the keys {', '.join(map(str, columns))}"
        raise EntryError("no conversation", what, "Write a list of turns.")
    return [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]


def _turns(messages: list[Any], images: list[Any]) -> Iterator[Turn]:
    number = 0
    for message in messages:
        if not isinstance(message, dict):
            raise EntryError("unknown role", f"turn {number} is {shown(message)}", "Write an object with a role.")
        author = message.get("from", message.get("role"))
        said = [(author, message.get("value", message.get("content")))]
        if author is None and {"user", "assistant"} <= message.keys():
            said = [("user", message["user"]), ("assistant", message["assistant"])]
        for role, value in said:
            if not isinstance(role, str) or role not in ROLES:
                what = f"turn {number} is from {shown(role)}"
                raise EntryError("unknown role", what, "Roles are human (user), gpt (assistant) and system.")
            yield Turn(ROLES[role], _text(value, number, images))
            number += 1


def _text(value: Any, number: int, images: list[Any]) -> str:
    """The text of a turn, with a placeholder for each image of a content list."""
    if isinstance(value, list):
        value = "\n".join(_part(part, number, images) for part in value)
    if not isinstance(value, str):
        raise EntryError("no text", f"turn {number} has the value {shown(value)}", "Set it to a string.")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON escapes may encode a lone surrogate, which no tokenizer accepts
        what = f"turn {number} has a lone surrogate, which is no character"
        raise EntryError("no text", what, "Fix the text.") from None
    return value


def _part(part: Any, number: int, images: list[Any]) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind in _IMAGE_PARTS:
        image = next((part[name] for name in _IMAGE_VALUES if part.get(name) is not None), None)
        if isinstance(image, dict):
            image = image.get("url", image)
        if image is not None:
            images.append(image)
        return IMAGE_PLACEHOLDER
    what = f"turn {number} has the content part {shown(part)}"
    raise EntryError("no text", what, "Parts are of type text, with a text, or of type image.")


def shown(value: Any) -> str:
    """A value in an error message, abbreviated."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
