"""What the serving benchmark compares with: transformers' `generate`, and its server, `transformers serve`."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.support.serving_clients import Ask, Run
from checkpoint_convert.huggingface.llava_next import write_configs
from megatron_vlm.config import ModelConfig
from megatron_vlm.data.processing.tokenizer import Tokenizer
from megatron_vlm.data.processing.tokenizer_training import save_tokenizer
from megatron_vlm.runtime.device import current_device

NUM_SPECIAL = 3
"""Special tokens at the end of the vocabulary: end of sequence, padding, image."""

_START_SECONDS = 120
_SERVE = "from transformers.cli.transformers import main; main()"
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class PeerDidNotStart(Exception):
    """The reason why a peer cannot be measured on this machine."""


@torch.no_grad()
def generate_one_by_one(model: Any, prompts: Sequence[list[int]], new_tokens: int) -> Run:
    """transformers' `generate` for one prompt after the other."""
    first, tokens, started = [], [], time.perf_counter()
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        begun = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
        first.append(time.perf_counter() - begun)
        started += first[-1]  # the first token was timed apart, and is generated again
        done = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
        tokens.append(done[0, len(prompt) :].tolist())
    seconds = time.perf_counter() - started
    return Run(len(prompts) * new_tokens / seconds, first, tokens, sum(first) / seconds)


def write_word_tokenizer(folder: Path, vocab_size: int) -> None:
    """Token n is the word `wn`, so that token ids can be sent as text. The last three ids are special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    eos, pad = "<eos>", "<pad>"
    words = [*(f"w{number}" for number in range(vocab_size - NUM_SPECIAL)), eos, pad]  # `<image>` is not in the file
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=pad))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    save_tokenizer(tokenizer, folder, eos=eos, pad=pad)


def write_model(theirs: Any, model: ModelConfig, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype) -> None:
    """Write the transformers model `theirs` with its processor into the new `folder`."""
    folder.mkdir()
    write_configs(folder, model, tokenizer, dtype)
    theirs.save_pretrained(folder)  # with its own configs


@contextlib.contextmanager
def transformers_serve(folder: Path, threads: int, bf16: bool = False) -> Iterator[Ask]:
    """`transformers serve` with the model that write_model wrote, in a process of its own, which the block's end stops.

    Answers lack special tokens. Raises PeerDidNotStart.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    kept = {name: value for name, value in os.environ.items() if name not in _RANK_VARIABLES}
    device, dtype = current_device().type, "bfloat16" if bf16 else "float32"
    arguments = ["serve", str(folder), "--device", device, "--dtype", dtype, "--port", str(port)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, *arguments],
            env=kept | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
            stdout=log,
            stderr=log,
        )
        try:
            if not _is_ready(process, port):
                log.seek(0)
                lines = [line.strip() for line in log if line.strip()]
                raise PeerDidNotStart(lines[-1] if lines else f"no answer within {_START_SECONDS} s")
            yield lambda prompt, new_tokens: _stream(port, str(folder), prompt, new_tokens)
        finally:
            process.terminate()
            process.wait()


def _is_ready(process: subprocess.Popen[bytes], port: int) -> bool:
    """Wait until the server answers; False if it ends before, or does not in time."""
    until = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < until:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        with contextlib.closing(connection), contextlib.suppress(OSError):
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return True
        time.sleep(0.2)
    return False


def _stream(port: int, model: str, prompt: list[int], new_tokens: int) -> Iterator[int]:
    """Token ids of a streamed completion."""
    text = " ".join(f"w{token}" for token in prompt)
    body = json.dumps({"model": model, "prompt": text, "max_tokens": new_tokens, "stream": True})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"transformers serve: {response.status} {response.read().decode()}")
        for line in response:
            if line.startswith(b"data: {"):
                chunk = json.loads(line.removeprefix(b"data: "))
                if "error" in chunk:
                    raise RuntimeError(f"transformers serve: {chunk['error']}")
                for word in chunk["choices"][0]["text"].split():
                    yield int(word.removeprefix("w"))
