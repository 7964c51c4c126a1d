"""`PUT /api`: the protocol of Megatron-LM's text-generation server, with its names and limits."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, model_validator

from megatron_vlm.inference.request import SamplingParams, TextPrompt
from megatron_vlm.inference.server.backend import Backend
from megatron_vlm.inference.server.errors import api_error
from megatron_vlm.inference.server.generation import Generation
from megatron_vlm.inference.server.openai.common import json_number, token_text
from megatron_vlm.inference.server.schema import STRICT, Text, Zero

_RENAMED = {
    "sentences": "sentences is no longer used: the field is prompts",
    "max_len": "max_len is no longer used: the field is tokens_to_generate",
    "beam_width": "beam search is not supported: leave out beam_width",
}


class GenerateRequest(BaseModel):
    """The body of `PUT /api`."""

    model_config = STRICT

    prompts: list[Text] = Field(min_length=1, max_length=128)
    tokens_to_generate: int = Field(64, ge=0, le=2**31, description="0 needs logprobs.")
    logprobs: bool = Field(False, description="Log-probabilities of all tokens but the first, those of the prompt too.")
    temperature: float = Field(1.0, gt=0, le=100)
    top_k: int = Field(0, ge=0, le=1000, description="1 is greedy decoding; 0 is no limit.")
    top_p: float = Field(0.0, ge=0, le=1, description="0 is no limit; not together with top_k.")
    add_BOS: bool = False
    random_seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop_token: int | None = Field(None, description="A token that ends the answer, besides the end-of-sequence token.")
    stop_on_eol: bool = False
    stop_on_double_eol: bool = False
    no_log: bool = Field(False, description="Accepted; prompts are never logged.")
    # Only these values mean what this server does.
    top_p_decay: Zero = 0.0
    top_p_bound: Zero = 0.0
    prevent_newline_after_colon: Annotated[bool, Field(description="Not supported.")] = False
    length_penalty: float = Field(1.0, description="Accepted; it concerns beam search.")

    @model_validator(mode="before")
    @classmethod
    def _old_names(cls, values: Any) -> Any:
        for name, message in _RENAMED.items():
            if isinstance(values, dict) and name in values:
                raise ValueError(message)
        return values

    @model_validator(mode="after")
    def _together(self) -> GenerateRequest:
        if self.tokens_to_generate == 0 and not self.logprobs:
            raise ValueError("tokens_to_generate = 0 needs logprobs = true")
        if self.top_k and self.top_p:
            raise ValueError("top_k and top_p cannot both be set")
        if "" in self.prompts and not self.add_BOS:
            raise ValueError("an empty prompt needs add_BOS = true")
        if self.prevent_newline_after_colon:
            raise ValueError("prevent_newline_after_colon is not supported")
        return self

    def params(self) -> SamplingParams:
        """Raises ValueError if the stop token is none."""
        stop = [word for word, wanted in (("\n", self.stop_on_eol), ("\n\n", self.stop_on_double_eol)) if wanted]
        return SamplingParams(
            max_new_tokens=self.tokens_to_generate,
            temperature=0.0 if self.top_k == 1 else self.temperature,
            top_k=self.top_k,
            top_p=self.top_p or 1.0,
            seed=self.random_seed,
            stop=tuple(stop),
            stop_token_ids=() if self.stop_token is None else (self.stop_token,),
            logprobs=0 if self.logprobs else None,
            prompt_logprobs=self.logprobs,
        )


def megatron_router(backend: Backend) -> APIRouter:
    """PUT /api"""
    router = APIRouter(tags=["Megatron-LM"])

    @router.put("/api", response_model=None, summary="Continue texts")
    async def generate(body: GenerateRequest, http: Request) -> dict[str, Any]:
        tokenizer = backend.engine.tokenizer
        encoded = []
        for text in body.prompts:
            prompt = TextPrompt(text, add_bos=body.add_BOS)
            encoded.append(await backend.encode(lambda prompt=prompt: prompt, len(text)))  # type: ignore[misc]
        try:
            params = body.params()
        except ValueError as error:
            raise api_error(error) from error
        async with Generation(backend, http, encoded, [params] * len(encoded)) as generation:
            answers = await generation.all_outputs()
        tokens = [
            [*handle.prompt_token_ids, *(output.token_id for output in outputs if output.token_id is not None)]
            for handle, outputs in zip(generation.handles, answers, strict=True)
        ]
        result: dict[str, Any] = {
            "text": [
                text + "".join(output.text_delta for output in outputs)
                for text, outputs in zip(body.prompts, answers, strict=True)
            ],
            "segments": [[token_text(tokenizer, token) for token in ids] for ids in tokens],
            "tokens": tokens,
        }
        if body.logprobs:
            result["logprobs"] = [
                [
                    *(json_number(known.logprob) for known in handle.prompt_logprobs or () if known is not None),
                    *(json_number(output.logprob) for output in outputs if output.logprob is not None),
                ]
                for handle, outputs in zip(generation.handles, answers, strict=True)
            ]
        return result

    return router
