"""README.md of an export: the model's sizes, its training, and how to load it.

Everything is read from the checkpoint and its log; what is not known is left out. The user states the licence.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from checkpoint_convert.huggingface.safetensors import TensorSpec
from checkpoint_convert.mapping.families import LANGUAGES, TOWERS
from megatron_vlm.config import Recipe
from megatron_vlm.config.lora import uses_lora
from megatron_vlm.config.training import PARTS
from megatron_vlm.training.checkpoint import Progress
from megatron_vlm.training.metrics import METRICS_FILE

LOSS_ITERATIONS = 10
"""The loss in the card is the mean over this many last iterations."""

_USAGE = {
    "llava_next": """\
from PIL import Image
from transformers import AutoProcessor, LlavaNextForConditionalGeneration

processor = AutoProcessor.from_pretrained("{name}")
model = LlavaNextForConditionalGeneration.from_pretrained("{name}")
content = [{{"type": "image"}}, {{"type": "text", "text": "What is in this image?"}}]
prompt = processor.apply_chat_template([{{"role": "user", "content": content}}], add_generation_prompt=True)
inputs = processor(images=Image.open("image.jpg"), text=prompt, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))
""",
    "instellavl": """\
from transformers import AutoModelForCausalLM, AutoProcessor

processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
""",
}


def write_model_card(
    folder: Path, name: str, load: Path, recipe: Recipe, progress: Progress, format: str, plan: list[TensorSpec]
) -> None:
    """Write README.md.

    Args:
        folder: the folder of the export.
        name: the export's name.
        load: the checkpoint folder, which may hold the log of its run.
        recipe: the checkpoint's recipe, with the parallel layout of the training.
        progress: the checkpoint's progress.
        format: llava_next or instellavl.
        plan: the tensors of the export.
    """
    untrained = ["Converted from other weights, and not trained since."]
    training = _training(load, recipe, progress) if progress.iteration else untrained
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: image-text-to-text",
        "---",
        "",
        f"# {name}",
        "",
        "A vision-language model, trained with megatron-vlm.",
        "",
        *_table(_model(recipe, plan)),
        "",
        "## Training",
        "",
        *training,
        "",
        "## Use",
        "",
        "```python",
        *_USAGE[format].format(name=name).splitlines(),
        "```",
        "",
        "## Licence",
        "",
        "To be stated by the publisher of the model. It depends on the tower, the language model and the data.",
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _table(rows: dict[str, str]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


def _model(recipe: Recipe, plan: list[TensorSpec]) -> dict[str, str]:
    vision, language = recipe.model.vision, recipe.model.language
    parameters = sum(math.prod(tensor.shape) for tensor in plan)
    return {
        "parameters": f"{parameters:,}, {str(plan[0].dtype).removeprefix('torch.')}",
        "vision tower": f"{TOWERS[vision.model_type].architecture}: {vision.num_hidden_layers} layers of width "
        f"{vision.hidden_size:,}, tiles of {vision.image_size} x {vision.image_size} pixels",
        "language model": f"{LANGUAGES[language.model_type].architecture}: {language.num_hidden_layers} layers of "
        f"width {language.hidden_size:,}, vocabulary of {language.vocab_size:,}",
        "images": f"{recipe.data.image_aspect_ratio}, {len(recipe.model.image_grid_pinpoints)} resolutions",
        "context": f"{recipe.data.seq_length:,} tokens, image tokens included",
    }


def _training(load: Path, recipe: Recipe, progress: Progress) -> list[str]:
    training, parallel = recipe.training, recipe.parallel
    frozen = [part for part in PARTS if part not in training.trainable]
    lora = {"LoRA": f"rank {training.lora_r}, alpha {training.lora_alpha:g}, {', '.join(training.lora_target_modules)}"}
    rows = {
        "iterations": f"{progress.iteration:,} of {training.train_iters:,}",
        "rows": f"{progress.consumed_rows:,} of {recipe.data.seq_length:,} tokens, "
        f"{training.global_batch_size:,} per iteration",
        **_logged(load / METRICS_FILE, progress.iteration),
        "trained parts": ", ".join(training.trainable) + (f" (frozen: {', '.join(frozen)})" if frozen else ""),
        **(lora if uses_lora(training) else {}),
        "optimizer": f"{training.optimizer}, peak learning rate {training.lr:g}, {training.lr_decay_style} to "
        f"{training.min_lr:g}, weight decay {training.weight_decay:g}, gradients clipped to {training.clip_grad:g}",
        "precision": "bfloat16 with float32 master weights" if training.bf16 else "float32",
        "parallelism": f"tensor {parallel.tensor_model_parallel_size} x pipeline "
        f"{parallel.pipeline_model_parallel_size} x context {parallel.context_parallel_size}",
        "data": ", ".join(Path(path).name for path in recipe.data.data_path) or "not recorded",
    }
    if training.pretrained_checkpoint:
        rows["started from"] = Path(training.pretrained_checkpoint).name
    return _table(rows)


def _logged(log: Path, iteration: int) -> dict[str, str]:
    """Totals over the run's log; nothing if an iteration is missing from it."""
    found = {}
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else []:
        try:
            values = json.loads(line)
            found[values["iteration"]] = (values["tokens"], values["loss_tokens"], values["lm_loss"])
        except (ValueError, KeyError, TypeError):
            continue  # an incomplete line: the run was killed
    if any(number not in found for number in range(1, iteration + 1)):
        return {}
    tokens, loss_tokens, losses = zip(*(found[number] for number in range(1, iteration + 1)), strict=True)
    last = losses[-LOSS_ITERATIONS:]
    return {
        "tokens": f"{sum(tokens):,}, {sum(loss_tokens):,} of them supervised",
        "loss": f"{sum(last) / len(last):.4f}, mean of the last {len(last)} iterations",
    }
