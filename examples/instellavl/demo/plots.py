"""Plot the loss of the three stages, and a sheet of test images with question, answer and attention over the image.

python examples/instellavl/demo/plots.py losses --checkpoints runs/demo/checkpoints --output runs/demo/loss.png
python examples/instellavl/demo/plots.py answers --model runs/demo/hf --answers runs/demo/answers.json
    --image-folder runs/demo/data/images --output runs/demo/answers.png
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

STAGES = ("warmup", "pretrain", "instruct")
SMOOTHING_WINDOW = 20
ROWS, COLUMNS = 6, 4


def smooth(values: list[float]) -> list[float]:
    """Moving average over the last SMOOTHING_WINDOW values."""
    windows = [values[max(0, stop - SMOOTHING_WINDOW) : stop] for stop in range(1, len(values) + 1)]
    return [sum(window) / len(window) for window in windows]


def plot_losses(checkpoints: Path, output: Path) -> None:
    """Plot lm loss over iterations, one panel per stage."""
    figure, axes = plt.subplots(1, len(STAGES), figsize=(13, 4), layout="constrained")
    for axis, stage in zip(axes, STAGES, strict=True):
        lines = [json.loads(line) for line in (checkpoints / stage / "metrics.jsonl").read_text().splitlines()]
        iterations, losses = [line["iteration"] for line in lines], [line["lm_loss"] for line in lines]
        axis.plot(iterations, losses, color="0.8", linewidth=0.8)
        axis.plot(iterations, smooth(losses), color="tab:blue")
        axis.set(title=stage, xlabel="iteration", ylabel="lm loss" if stage == STAGES[0] else "", yscale="log")
        axis.grid(alpha=0.3)
    figure.savefig(output, dpi=120)


def plot_answers(model: Path, answers: Path, image_folder: Path, output: Path, seed: int = 0) -> None:
    """Plot random test questions: the image, the attention over it, and the answer; wrong answers are red."""
    from attention import AttentionMaps  # transformers takes seconds to load, and curves do not need it

    maps = AttentionMaps(model)
    sampled = random.Random(seed).sample(json.loads(answers.read_text(encoding="utf-8")), ROWS * COLUMNS)
    figure, axes = plt.subplots(ROWS, COLUMNS, figsize=(3.4 * COLUMNS, 2.1 * ROWS), layout="constrained")
    for axis, question in zip(axes.flat, sampled, strict=True):
        right = question["answer"] == question["truth"]
        image = Image.open(image_folder / question["image"]).convert("RGB")
        axis.imshow(image, extent=(0, 1, 0, 1))
        axis.imshow(maps.over_image(image, question["text"]).numpy(), extent=(1.05, 2.05, 0, 1), cmap="magma")
        axis.set(xlim=(0, 2.05), ylim=(0, 1))
        axis.set_axis_off()
        answer = question["answer"] if right else f"{question['answer']} (truth: {question['truth']})"
        axis.set_title(f"{question['text']}\n{answer}", fontsize=8, color="black" if right else "tab:red", wrap=True)
    figure.suptitle(
        "Test images, and the attention over them before the answer, averaged over heads and layers (bright: more)"
    )
    figure.savefig(output, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="plot", required=True)
    losses = commands.add_parser("losses")
    losses.add_argument("--checkpoints", type=Path, required=True)
    answers = commands.add_parser("answers")
    answers.add_argument("--model", type=Path, required=True, metavar="DIR", help="exported llava_next folder")
    answers.add_argument("--answers", type=Path, required=True)
    answers.add_argument("--image-folder", type=Path, required=True)
    for command in (losses, answers):
        command.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if options.plot == "losses":
        plot_losses(options.checkpoints, options.output)
    else:
        plot_answers(options.model, options.answers, options.image_folder, options.output)


if __name__ == "__main__":
    main()
