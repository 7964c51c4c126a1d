"""The same answers from a Megatron checkpoint and from transformers on the folder exported from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_convert import hf_to_megatron, megatron_to_hf
from megatron_vlm.data.processing.conversation import Turn
from megatron_vlm.inference.engine import GenerationEngine, Prompt, load_engine, read_prompts
from tests.checkpoint_convert.whole_model import SINGLE, TALL, WIDE, picture
from tests.support.random_models import GROUPED_QUERY_SIZES, write_llava_next

NEW_TOKENS = 12
PROMPTS = [
    Prompt([Turn("human", "<image>\nWhat is the colour?")], [picture(WIDE)]),
    Prompt([Turn("human", "Describe this image.")]),
    Prompt([Turn("human", "<image>\n<image>\nIs there a dog?")], [picture(TALL, 1), picture(SINGLE, 2)]),
    Prompt(
        [Turn("human", "<image>\nA circle?"), Turn("gpt", "yes"), Turn("human", "A red one? yes, no")],
        [picture(SINGLE, 3)],
    ),
]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[GenerationEngine, Path]]:
    folder = tmp_path_factory.mktemp("engine")
    reference = write_llava_next(folder / "source", language=GROUPED_QUERY_SIZES)
    with torch.no_grad():
        reference.lm_head.weight[269] *= 3  # so that some answers end by themselves
    reference.save_pretrained(folder / "source")
    assert hf_to_megatron.main(["--model", str(folder / "source"), "--save", str(folder / "megatron")]) == 0
    export = ["--load", str(folder / "megatron"), "--save", str(folder / "exported"), "--format", "llava_next"]
    assert megatron_to_hf.main(export) == 0
    with load_engine(folder / "megatron") as engine:
        yield engine, folder / "exported"


# What a stranger does with the folder: no code of ours, no network.
STRANGER = """
import json, sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, new_tokens = sys.argv[1], int(sys.argv[2])
processor = AutoProcessor.from_pretrained(folder)
model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
prompts = json.load(sys.stdin)
texts = [processor.apply_chat_template(p["messages"], add_generation_prompt=True) for p in prompts]
images = [Image.open(path) for p in prompts for path in p["images"]]
inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
made = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)[:, inputs["input_ids"].shape[1]:]
print(json.dumps({
    "answers": made.tolist(),
    "eos": model.generation_config.eos_token_id,
    "classes": [type(model).__name__, type(processor).__name__],
    "not loaded": [list(keys) for keys in report.values()],
    "ours": [name for name in sys.modules if name.startswith(("megatron", "checkpoint_convert"))],
}))
"""


def _ask_a_stranger(folder: Path, prompts: list[Prompt]) -> dict[str, Any]:
    roles = {"human": "user", "gpt": "assistant"}
    asked = []
    for number, prompt in enumerate(prompts):
        paths = [str(folder.parent / f"{number}-{k}.png") for k in range(len(prompt.images))]
        for image, path in zip(prompt.images, paths, strict=True):
            image.save(path)
        messages = [{"role": roles[turn.role], "content": turn.text} for turn in prompt.turns]
        asked.append({"messages": messages, "images": paths})
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(folder), str(NEW_TOKENS)],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=200,
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def _until_end(ids: list[int], eos: int) -> list[int]:
    return ids[: ids.index(eos) + 1] if eos in ids else ids


def test_batch_gives_the_tokens_of_stock_transformers(both: tuple[GenerationEngine, Path]) -> None:
    engine, folder = both
    told = _ask_a_stranger(folder, PROMPTS)
    assert told["classes"] == ["LlavaNextForConditionalGeneration", "LlavaNextProcessor"]
    assert not any(told["not loaded"])
    assert not told["ours"]
    answers = engine.generate(PROMPTS, NEW_TOKENS)
    assert answers == [_until_end(ids, told["eos"]) for ids in told["answers"]]
    lengths = {len(answer) for answer in answers}
    assert NEW_TOKENS in lengths, "one answer is cut off"
    assert min(lengths) < NEW_TOKENS, "one ends by itself"


def test_alone_is_as_in_a_batch(both: tuple[GenerationEngine, Path]) -> None:
    engine, _ = both
    assert [engine.generate([prompt], NEW_TOKENS)[0] for prompt in PROMPTS] == engine.generate(PROMPTS, NEW_TOKENS)


@torch.no_grad()
def test_cache_gives_the_tokens_of_no_cache(both: tuple[GenerationEngine, Path]) -> None:
    engine, _ = both
    for prompt in PROMPTS:
        assert _greedy_without_cache(engine, prompt) == engine.generate([prompt], NEW_TOKENS)[0]


def _greedy_without_cache(engine: GenerationEngine, prompt: Prompt) -> list[int]:
    """The whole row again for every token."""
    model, end = engine.model, engine.tokenizer.eos_id
    batch = read_prompts([prompt], engine.recipe.model, "anyres", engine.tokenizer)
    made: list[int] = []
    while len(made) < NEW_TOKENS and end not in made:
        tokens = torch.cat([batch.tokens, torch.tensor(made, dtype=torch.int64)])
        row = replace(batch, tokens=tokens, positions=torch.arange(len(tokens)), cu_seqlens=[0, len(tokens)])
        hidden = model.language_model.decode(model.embed(row), model.packed_sequence(row))
        made.append(int(model.language_model.logits(hidden, torch.tensor([len(tokens) - 1])).argmax()))
    return made


def test_text_of_an_answer_has_no_special_tokens(both: tuple[GenerationEngine, Path]) -> None:
    engine, _ = both
    answers = engine.answer(PROMPTS, NEW_TOKENS)
    assert len(answers) == len(PROMPTS)
    assert not any("IP_ADDRESS" in answer for answer in answers)
    assert engine.generate([], NEW_TOKENS) == []


def test_a_wrong_prompt_is_named(both: tuple[GenerationEngine, Path]) -> None:
    engine, _ = both
    with pytest.raises(ValueError, match="prompt 1: 1 <image> placeholders for 0 images"):
        engine.generate([PROMPTS[1], Prompt([Turn("human", "<image>\nWhat?")])], NEW_TOKENS)
