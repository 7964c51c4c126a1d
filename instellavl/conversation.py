"""Conversations as text, in the template of the training.

|||IP_ADDRESS|||<|user|>
{question}
<|assistant|>
{answer}|||IP_ADDRESS|||
<|user|>
...
"""

from __future__ import annotations

import dataclasses
from enum import Enum, auto

from .constants import END_OF_TURN


class SeparatorStyle(Enum):
    """How turns are joined."""

    INSTELLA = auto()


@dataclasses.dataclass
class Conversation:
    """Alternating messages of two roles, the user first."""

    roles: tuple[str, str] = ("<|user|>\n", "<|assistant|>\n")
    messages: list[list[str | None]] = dataclasses.field(default_factory=list)
    """[role, text]; None is the answer to generate."""
    sep: str = "\n"
    """After a question."""
    sep2: str = END_OF_TURN + "\n"
    """After an answer."""
    sep_style: SeparatorStyle = SeparatorStyle.INSTELLA
    version: str = "instella"
    system: str = ""

    def append_message(self, role: str, message: str | None) -> None:
        """Add a turn; None is the answer to generate."""
        self.messages.append([role, message])

    def get_prompt(self) -> str:
        """The conversation as text, with `<image>` for each image.

        Raises:
            ValueError: an unknown role, or a question that is None.
        """
        text = END_OF_TURN
        for role, message in self.messages:
            if role == self.roles[0] and message is not None:
                text += f"{role}{message}{self.sep}"
            elif role == self.roles[1]:
                text += role if message is None else f"{role}{message.strip()}{self.sep2}"
            elif role == self.roles[0]:
                raise ValueError("a question is missing: only the answer to generate may be None")
            else:
                raise ValueError(f"unknown role {role!r}: roles are {self.roles[0]!r} and {self.roles[1]!r}")
        return text

    def copy(self) -> Conversation:
        """A copy with its own list of messages."""
        return dataclasses.replace(self, messages=[list(message) for message in self.messages])


conv_templates: dict[str, Conversation] = {"instella": Conversation()}
default_conversation = conv_templates["instella"]
