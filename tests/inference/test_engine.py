"""The engine gives the same answers as transformers on the exported folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checkpoint_convert import hf_to_megatron, megatron_to_hf
from megatron_vlm.data.processing.conversation import Turn
from megatron_vlm.inference.engine import GenerationEngine, Prompt, read_prompts
from megatron_vlm.inference.load import load_engine
from tests.checkpoint_convert.whole_model import SINGLE, TALL, WIDE, picture
from tests.support.random_models import GROUPED_QUERY_SIZES, write_llava_next
from tests.support.stock_transformers import ask_stock

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
def engine_and_export(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[GenerationEngine, Path]]:
    folder = tmp_path_factory.mktemp("engine")
    reference = write_llava_next(folder / "source", language=GROUPED_QUERY_SIZES)
    with torch.no_grad():
        reference.lm_head.weight[269] *= 3  # so that some answers end with it
    reference.save_pretrained(folder / "source")
    assert hf_to_megatron.main(["--model", str(folder / "source"), "--save", str(folder / "megatron")]) == 0
    export = ["--load", str(folder / "megatron"), "--save", str(folder / "exported"), "--format", "llava_next"]
    assert megatron_to_hf.main(export) == 0
    with load_engine(folder / "megatron") as engine:
        yield engine, folder / "exported"


# Stock transformers on the exported folder, without this project's code and without network.
STOCK_SCRIPT = """
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
generated = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)[:, inputs["input_ids"].shape[1]:]
print(json.dumps({
    "answers": generated.tolist(),
    "eos": model.generation_config.eos_token_id,
    "classes": [type(model).__name__, type(processor).__name__],
    "not loaded": [list(keys) for keys in report.values()],
    "our modules": [name for name in sys.modules if name.startswith(("megatron", "checkpoint_convert"))],
}))
"""


def _until_end(ids: list[int], eos: int) -> list[int]:
    return ids[: ids.index(eos) + 1] if eos in ids else ids


def test_a_batch_has_the_tokens_of_stock_transformers(engine_and_export: tuple[GenerationEngine, Path]) -> None:
    engine, folder = engine_and_export
    stock = ask_stock(STOCK_SCRIPT, folder, PROMPTS, NEW_TOKENS, folder.parent, timeout=200)
    assert stock["classes"] == ["LlavaNextForConditionalGeneration", "LlavaNextProcessor"]
    assert not any(stock["not loaded"])
    assert not stock["our modules"]
    answers = engine.generate(PROMPTS, NEW_TOKENS)
    assert answers == [_until_end(ids, stock["eos"]) for ids in stock["answers"]]
    lengths = {len(answer) for answer in answers}
    assert NEW_TOKENS in lengths, "no answer reached the maximum length"
    assert min(lengths) < NEW_TOKENS, "no answer ended with the end-of-sequence token"


def test_a_batch_of_one_has_the_same_answers(engine_and_export: tuple[GenerationEngine, Path]) -> None:
    engine, _ = engine_and_export
    assert [engine.generate([prompt], NEW_TOKENS)[0] for prompt in PROMPTS] == engine.generate(PROMPTS, NEW_TOKENS)


@torch.no_grad()
def test_the_cache_does_not_change_tokens(engine_and_export: tuple[GenerationEngine, Path]) -> None:
    engine, _ = engine_and_export
    for prompt in PROMPTS:
        assert _greedy_without_cache(engine, prompt) == engine.generate([prompt], NEW_TOKENS)[0]


def _greedy_without_cache(engine: GenerationEngine, prompt: Prompt) -> list[int]:
    """Process the whole row again for every token."""
    model, end = engine.model, engine.tokenizer.eos_id
    batch = read_prompts([prompt], engine.recipe.model, "anyres", engine.tokenizer)
    generated: list[int] = []
    while len(generated) < NEW_TOKENS and end not in generated:
        tokens = torch.cat([batch.tokens, torch.tensor(generated, dtype=torch.int64)])
        row = replace(batch, tokens=tokens, positions=torch.arange(len(tokens)), cu_seqlens=[0, len(tokens)])
        hidden = model.language_model.decode(model.embed(row), model.packed_sequence(row))
        generated.append(int(model.language_model.logits(hidden, torch.tensor([len(tokens) - 1])).argmax()))
    return generated


def test_answers_have_no_special_tokens(engine_and_export: tuple[GenerationEngine, Path]) -> None:
    engine, _ = engine_and_export
    answers = engine.answer(PROMPTS, NEW_TOKENS)
    assert len(answers) == len(PROMPTS)
    assert not any("IP_ADDRESS" in answer for answer in answers)
    assert engine.generate([], NEW_TOKENS) == []


def test_a_wrong_prompt_is_named(engine_and_export: tuple[GenerationEngine, Path]) -> None:
    engine, _ = engine_and_export
    with pytest.raises(ValueError, match="prompt 1: 1 <image> placeholders for 0 images"):
        engine.generate([PROMPTS[1], Prompt([Turn("human", "<image>\nWhat?")])], NEW_TOKENS)
