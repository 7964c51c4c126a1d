"""Answers of stock transformers, from a script in a process of its own without network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_vlm.inference.request import Prompt

_ROLES = {"human": "user", "gpt": "assistant"}


def ask_stock(
    script: str, model: Path, prompts: Sequence[Prompt], new_tokens: int, scratch: Path, timeout: float
) -> Any:
    """Run `script MODEL NEW_TOKENS` in the folder of the model, and return the JSON of its last printed line.

    Its standard input is a JSON list of {"messages": for the chat template, "images": paths}; the images are written
    into the folder `scratch`.
    """
    requests = []
    for number, prompt in enumerate(prompts):
        paths = [str(scratch / f"{number}-{k}.png") for k in range(len(prompt.images))]
        for image, path in zip(prompt.images, paths, strict=True):
            image.save(path)
        messages = [{"role": _ROLES[turn.role], "content": turn.text} for turn in prompt.turns]
        requests.append({"messages": messages, "images": paths})
    done = subprocess.run(
        [sys.executable, "-c", script, str(model), str(new_tokens)],
        input=json.dumps(requests),
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=model,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
