"""The same prompts to engines in several layouts and to stock transformers, and where their answers differ.

As a command, for a model that is there already, with 104 random prompts of 128 new tokens:

    python -m tests.inference.compare_with_transformers CHECKPOINT EXPORTED_FOLDER
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tests.inference.tiny_model import PromptSpec, random_specs
from tests.support.forked_ranks import launch_forked
from tests.support.stock_transformers import ask_stock

RUN_RANKS = Path(__file__).with_name("run_ranks.py")
NEW_TOKENS = 128
MAX_MARGIN, MAX_ERROR = 1e-4, 1e-3
"""A token may differ where the log-probabilities of transformers' best two differ by no more; and a log-probability."""


def generate(folder: Path, specs: list[PromptSpec], new_tokens: int, ranks: int, *layouts: str) -> dict[str, Any]:
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


def difference(stock: dict[str, Any], answer: dict[str, Any]) -> str | None:
    """Where tokens or log-probabilities differ, up to a step where transformers' top two are within MAX_MARGIN."""
    assert len(answer["tokens"]) == len(stock["tokens"]) == NEW_TOKENS
    assert answer["prompt_tokens"] == stock["prompt_tokens"]
    for step, (token, other) in enumerate(zip(answer["tokens"], stock["tokens"], strict=True)):
        if token != other:
            margin = stock["margins"][step]
            return None if margin <= MAX_MARGIN else f"token {step} is {token}, not {other}, by a margin of {margin}"
        error = abs(answer["logprobs"][step] - stock["logprobs"][step])
        if error > MAX_ERROR:
            return f"the log-probability of token {step} differs by {error}"
    return None


def compare(folder: Path, specs: list[PromptSpec]) -> tuple[list[int], list[str]]:
    """The model in FOLDER/megatron, in random batches, with the same in FOLDER/exported, one prompt at a time.

    Returns:
        Tokens of each prompt, and where an answer differs: of one process, of TP 2 and of PP 2.
    """
    prompts = [spec.prompt() for spec in specs]
    expected = ask_stock(STOCK_SCRIPT, folder / "exported", prompts, NEW_TOKENS, folder, timeout=1500)
    results = generate(folder, specs, NEW_TOKENS, 1, "1x1x1x1")
    results |= generate(folder, specs, NEW_TOKENS, 2, "2x1x1x1", "1x2x1x1")
    found = []
    for layout, result in results.items():
        assert max(answer["running"] for answer in result["answers"]) >= 12, "few requests ran together"
        for spec, stock, answer in zip(specs, expected, result["answers"], strict=True):
            if text := difference(stock, answer):
                found.append(f"{layout}, {spec}: {text}")
    return [answer["prompt_tokens"] for answer in expected], found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder of Megatron checkpoints")
    parser.add_argument("exported", type=Path, help="the same model, exported as llava_next")
    parser.add_argument("--most-words", type=int, default=555, help="words of the longest prompt")
    parser.add_argument("--most-images", type=int, default=2, help="1 if only transformers tiles several images")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "megatron").symlink_to(options.checkpoint.resolve())
        (folder / "exported").symlink_to(options.exported.resolve())
        specs = random_specs(104, options.most_words)
        specs = [replace(spec, num_images=min(spec.num_images, options.most_images)) for spec in specs]
        lengths, found = compare(folder, specs)
    print(f"{len(lengths)} prompts of {min(lengths)} to {max(lengths)} tokens, {NEW_TOKENS} new tokens each")
    print("\n".join(found) or "one process, TP 2 and PP 2 give transformers' tokens and log-probabilities")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
