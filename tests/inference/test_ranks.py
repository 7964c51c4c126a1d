"""Tensor- and pipeline-parallel engines give the answers of one process, and all of them those of transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.inference.engine import load_engine
from tests.inference.run_ranks import CONFIG, generate_at_random_times
from tests.inference.tiny_model import PromptSpec, random_specs, write_tiny_model
from tests.support.forked_ranks import launch_forked

RUN_RANKS = Path(__file__).with_name("run_ranks.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    write_tiny_model(folder)
    return folder


def _generate(folder: Path, specs: list[PromptSpec], new_tokens: int, ranks: int, *layouts: str) -> dict[str, Any]:
    """Layout -> the outputs of its engine; those of a second copy of the model under another name."""
    specs_file, out = folder / "specs.json", folder / "out"
    for file in folder.glob("out*"):
        file.unlink()
    specs_file.write_text(json.dumps([asdict(spec) for spec in specs]))
    command = [RUN_RANKS, folder / "megatron", specs_file, out, str(new_tokens), *layouts]
    launch_forked(*command, ranks=ranks, timeout=60 + 10 * len(specs))
    results: dict[str, Any] = {}
    for file in sorted(folder.glob("out*")):
        for layout, result in json.loads(file.read_text()).items():
            results[layout if layout not in results else f"{layout}, {file.name}"] = result
    assert [result["leaked"] for result in results.values()] == [0] * len(results)
    return results


def test_two_ranks_give_the_answers_of_one(folder: Path) -> None:
    specs = random_specs(9, 80)
    with load_engine(folder / "megatron", CONFIG) as engine:
        assert engine is not None
        one = generate_at_random_times(engine, specs, 10)
    results = _generate(folder, specs, 10, 2, "2x1x1x1", "1x2x1x1", "1x2x2x1", "1x1x1x2", "1x1x1x1")
    assert len(results) == 6, "a model of one rank has two engines on two"
    for layout, result in results.items():
        for alone, answer in zip(one["answers"], result["answers"], strict=True):
            assert answer["tokens"] == alone["tokens"], layout
            assert answer["logprobs"] == pytest.approx(alone["logprobs"], rel=0, abs=1e-4), layout


# Stock transformers, one prompt at a time; the top two log-probabilities of each step are kept.
STOCK_SCRIPT = """
import json, sys
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
torch.set_num_threads(1)
folder, new_tokens = sys.argv[1], int(sys.argv[2])
processor = AutoProcessor.from_pretrained(folder)
model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
model.generation_config.eos_token_id = None
answers = []
for prompt in json.load(sys.stdin):
    text = processor.apply_chat_template(prompt["messages"], add_generation_prompt=True)
    images = [Image.open(path) for path in prompt["images"]]
    inputs = processor(images=images or None, text=text, return_tensors="pt")
    done = model.generate(
        **inputs, max_new_tokens=new_tokens, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    logprobs = torch.cat(done.logits).float().log_softmax(-1)
    tokens = done.sequences[0, inputs["input_ids"].shape[1]:]
    best = logprobs.topk(2).values
    answers.append({
        "tokens": tokens.tolist(),
        "logprobs": logprobs.gather(1, tokens[:, None])[:, 0].tolist(),
        "margins": (best[:, 0] - best[:, 1]).tolist(),
        "prompt_tokens": inputs["input_ids"].shape[1],
    })
print(json.dumps(answers))
"""


def _generate_with_transformers(folder: Path, specs: list[PromptSpec], new_tokens: int) -> list[dict[str, Any]]:
    prompts = []
    for spec in specs:
        prompt = spec.prompt()
        paths = [str(folder / f"{spec.seed}-{number}.png") for number in range(len(prompt.images))]
        for image, path in zip(prompt.images, paths, strict=True):
            image.save(path)
        prompts.append({"messages": [{"role": "user", "content": prompt.turns[0].text}], "images": paths})
    done = subprocess.run(
        [sys.executable, "-c", STOCK_SCRIPT, str(folder / "exported"), str(new_tokens)],
        input=json.dumps(prompts),
        capture_output=True,
        text=True,
        timeout=1500,
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    answers: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return answers


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_long_answers_of_random_batches_are_those_of_transformers(folder: Path) -> None:
    from checkpoint_convert import megatron_to_hf

    export = ["--load", str(folder / "megatron"), "--save", str(folder / "exported"), "--format", "llava_next"]
    assert megatron_to_hf.main(export) == 0
    specs = random_specs(104, 555)
    expected = _generate_with_transformers(folder, specs, 128)
    lengths = sorted(answer["prompt_tokens"] for answer in expected)
    assert lengths[0] < 30
    assert 1900 < lengths[-1] < 2100
    results = _generate(folder, specs, 128, 1, "1x1x1x1") | _generate(folder, specs, 128, 2, "2x1x1x1", "1x2x1x1")
    for layout, result in results.items():
        assert max(answer["running"] for answer in result["answers"]) >= 12, "few requests ran together"
        differences = {
            spec: difference
            for spec, stock, answer in zip(specs, expected, result["answers"], strict=True)
            if (difference := _difference(stock, answer))
        }
        assert not differences, layout


def _difference(stock: dict[str, Any], answer: dict[str, Any]) -> str | None:
    """Where tokens or log-probabilities differ, up to a step where the top two of transformers are within 1e-4."""
    assert len(answer["tokens"]) == len(stock["tokens"]) == 128
    assert answer["prompt_tokens"] == stock["prompt_tokens"]
    for step, (token, other) in enumerate(zip(answer["tokens"], stock["tokens"], strict=True)):
        if token != other:
            margin = stock["margins"][step]
            return None if margin <= 1e-4 else f"token {step} is {token}, not {other}, by a margin of {margin}"
        error = abs(answer["logprobs"][step] - stock["logprobs"][step])
        if error > 1e-3:
            return f"the log-probability of token {step} differs by {error}"
    return None
