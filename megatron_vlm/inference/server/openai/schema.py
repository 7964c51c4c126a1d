"""Requests of OpenAI's protocol. What would change the answer, but cannot be honoured, is an error."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag, model_validator

from megatron_vlm.inference.server.schema import STRICT, Text, Zero

_MOST_STOP_WORDS = 16
MOST_CHOICES = 16

StopWord = Annotated[Text, Field(min_length=1, max_length=256)]
StopWords = Annotated[list[StopWord], Field(max_length=_MOST_STOP_WORDS)]


def _kind(value: object) -> str:
    """Text or a list; pydantic then reports the problems of that kind only."""
    return "kind:list" if isinstance(value, list) else "kind:text"


Stop = Annotated[Annotated[StopWord, Tag("kind:text")] | Annotated[StopWords, Tag("kind:list")], Discriminator(_kind)]


class StreamOptions(BaseModel):
    model_config = STRICT
    include_usage: bool = False
    """End the stream with the numbers of tokens."""
    include_obfuscation: bool = False
    """Accepted; nothing is added."""


class GenerationRequest(BaseModel):
    """What both kinds of request have."""

    model_config = STRICT

    model: Annotated[Text, Field(max_length=512)] | None = Field(None, description="The served model, or nothing.")
    max_tokens: int | None = Field(None, ge=0, le=2**31, description="New tokens at most.")
    temperature: float | None = Field(None, ge=0, le=100, description="0 is greedy decoding; 1 if not given.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31, description="0 and -1 are no limit.")
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | None = Field(None, description="The answer ends before the first of these texts.")
    stop_token_ids: Annotated[list[int], Field(max_length=_MOST_STOP_WORDS)] | None = None
    ignore_eos: bool | None = Field(None, description="Continue after an end-of-sequence token.")
    n: int | None = Field(None, ge=1, le=MOST_CHOICES, description="Answers to the same prompt.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Only these values mean what this server does.
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    # These change no answer.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None


class TextPart(BaseModel):
    model_config = STRICT
    type: Literal["text"]
    text: Text


class ImageUrl(BaseModel):
    model_config = STRICT
    url: Text = Field(description="data:image/png;base64,..., or an http(s) address if the server allows it.")
    detail: Literal["auto", "low", "high"] | None = Field(None, description="Accepted; every image is tiled alike.")


class ImagePart(BaseModel):
    model_config = STRICT
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Content = Annotated[Annotated[Text, Tag("kind:text")] | Annotated[list[Part], Tag("kind:list")], Discriminator(_kind)]


class Message(BaseModel):
    model_config = STRICT
    role: Text = Field(description="The roles of the chat template.", json_schema_extra={"enum": ["user", "assistant"]})
    content: Content = Field(description="A text, or a list of texts and images.")
    name: Any = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, message: Any) -> Any:
        """Clients send answers back with all the fields that OpenAI's have, of which only content is set."""
        return (
            {name: value for name, value in message.items() if value is not None}
            if isinstance(message, dict)
            else message
        )


class TextFormat(BaseModel):
    model_config = STRICT
    type: Literal["text"]


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`"""

    messages: list[Message] = Field(min_length=1, max_length=1024)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Any = None


TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]


def _prompt_kind(value: object) -> str:
    if not isinstance(value, list):
        return "kind:text"
    if value and isinstance(value[0], str):
        return "kind:texts"
    return "kind:token lists" if value and isinstance(value[0], list) else "kind:tokens"


PromptField = Annotated[
    Annotated[Text, Tag("kind:text")]
    | Annotated[list[Text], Tag("kind:texts"), Field(max_length=128)]
    | Annotated[TokenIds, Tag("kind:tokens")]
    | Annotated[list[TokenIds], Tag("kind:token lists"), Field(max_length=128)],
    Discriminator(_prompt_kind),
]


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`"""

    prompt: PromptField = Field(description="A text, token ids, or a list of either. No chat template is applied.")
    echo: bool | None = Field(None, description="Put the prompt in front of each answer.")
    logprobs: int | None = Field(None, ge=0, le=20, description="Most likely tokens to report at each position.")
    add_BOS: bool = Field(False, description="Begin the prompt with the end-of-sequence token, as in training.")
    best_of: int | None = Field(None, ge=1, le=MOST_CHOICES, description="Must equal n.")
    suffix: None = None
