"""The whole workflow at small size, from a data set to answers. `make demo` runs this script.

    easy-VQA -> annotations -> tokenizer -> shards -> three stages with different layouts -> Hugging Face -> answers

Paths are relative to the root of the repository. The same command resumes a demo that was interrupted. Flags are given
as make demo DEMO="--seed 1 --output runs/demo-1".
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from progress import minutes
from steps import Runner, Step

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
OUTPUT = Path("runs/demo")
SEED = 42
PROCESSES = "2"


@dataclass(frozen=True)
class Stage:
    """A run of the trainer."""

    title: str
    sources: tuple[str, ...]
    """Names of its annotations and shards."""
    seconds: float
    """On two quiet cores."""
    recipe: str = ""
    """Default: the stage's name."""
    flags: tuple[str, ...] = ()


STAGES = {
    "language": Stage("the language model on text, data parallel size 2", ("words",), 60),
    "negations": Stage(
        "the language model on text with negations, data parallel size 2", ("negations",), 72,
        "language", ("--train-iters", "300", "--lr-decay-style", "cosine"),
    ),
    "warmup": Stage(
        "projector and tower on captions, data parallel size 2 with the distributed optimizer", ("captions",), 185
    ),
    "pretrain": Stage(
        "captions and balanced questions, data parallel size 2 with the distributed optimizer",
        ("captions", "balanced"), 60,
    ),
    "instruct": Stage("questions, pipeline parallel size 2", ("questions", "balanced"), 85),
}  # fmt: skip
Command = list[str | Path | int]
"""Arguments of Python."""


def steps(output: Path, seed: int) -> Iterator[Step]:
    """All steps, in order."""
    data, tokenizer, shards, checkpoints = (output / name for name in ("data", "tokenizer", "shards", "checkpoints"))
    images, test = data / "images", data / "test.json"
    sources = dict.fromkeys(source for stage in STAGES.values() for source in stage.sources)
    annotations = {name: data / f"{name}.json" for name in sources}

    yield _step(
        "data", "easy-VQA: images, captions and questions", [data], 8,
        [HERE / "easy_vqa.py", "--output", data],
        [HERE / "balanced.py", "--output", data],
    )  # fmt: skip
    yield _step(
        "tokenizer", "tokenizer", [tokenizer], 4,
        [HERE / "tokenizer.py", "--annotations", *annotations.values(), "--output", tokenizer],
    )  # fmt: skip
    prepare = ROOT / "tools" / "prepare_shards.py"
    to_shards: list[Command] = [
        [prepare, "--annotations", file, "--image-folder", images, "--output", shards / name]
        for name, file in annotations.items()
    ]
    yield _step("shards", "shards", [shards], 10, *to_shards)
    previous: Command = []
    for name, stage in STAGES.items():
        recipe, save = HERE / f"{stage.recipe or name}.yaml", checkpoints / name
        paths: Command = ["--data-path", *(shards / source for source in stage.sources)]
        paths += ["--tokenizer-model", tokenizer, "--save", save, *previous]
        step = _step(
            name, f"stage {name}: {stage.title}", [save], stage.seconds,
            ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", PROCESSES,
             "-m", "megatron_vlm.train", "--config", recipe, "--seed", seed, *paths, *stage.flags],
        )  # fmt: skip
        step.checkpoints = save
        step.iterations = _iterations(recipe, stage)
        yield step
        previous = ["--pretrained-checkpoint", save]
    hf, published = output / "hf", output / "instellavl"
    exports: list[Command] = [
        ["-m", "checkpoint_convert.megatron_to_hf", "--load", save, "--save", folder, "--format", hf_format]
        for folder, hf_format in ((hf, "llava_next"), (published, "instellavl"))
    ]
    yield _step("export", "export to Hugging Face", [hf, published], 8, *exports)
    answers, report = output / "answers.json", output / "report.txt"
    asked: Command = ["--model", hf, "--annotations", test, "--image-folder", images]
    step = _step(
        "answers", "the 9,673 test questions, with stock transformers and the exported folder", [answers, report], 75,
        [HERE / "evaluate.py", *asked, "--output", answers, "--report", report],
    )  # fmt: skip
    step.threads = 2
    yield step
    pictures: Command = ["--model", hf, "--answers", answers, "--image-folder", images]
    yield _step(
        "pictures", "loss curves, and answers with the attention over the image",
        [output / "loss.png", output / "answers.png"], 6,
        [HERE / "plots.py", "losses", "--checkpoints", checkpoints, "--output", output / "loss.png"],
        [HERE / "plots.py", "answers", *pictures, "--output", output / "answers.png"],
    )  # fmt: skip


def _iterations(recipe: Path, stage: Stage) -> int:
    flags = dict(zip(stage.flags[::2], stage.flags[1::2], strict=True))
    return int(flags.get("--train-iters") or yaml.safe_load(recipe.read_text("utf-8"))["training"]["train_iters"])


def _step(
    name: str,
    title: str,
    outputs: list[Path],
    weight: float,
    *commands: Command,
) -> Step:
    """A step whose inputs are the demo's files in its commands."""
    files = {argument for command in commands for argument in command if isinstance(argument, Path)}
    inputs = sorted(path for path in files if path.parent == HERE)
    return Step(name, title, [[str(argument) for argument in command] for command in commands], inputs, outputs, weight)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the initial weights and the order; default: {SEED}")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="DIR", help=f"default: {OUTPUT}")
    parser.add_argument("--restart", action="store_true", help="remove the output of earlier runs first")
    options = parser.parse_args()
    os.chdir(ROOT)
    output: Path = options.output
    if options.restart:
        shutil.rmtree(output, ignore_errors=True)
    ran = Runner(ROOT, output, list(steps(output, options.seed))).run()
    records = json.loads((output / "steps.json").read_text(encoding="utf-8")).values()
    wall, processor = (sum(record[name] for record in records) for name in ("seconds", "processor_seconds"))
    print(
        f"\nAll steps took {minutes(wall)}, and {processor:.0f} s of processor time. All output is in {output}:\n"
        f"  loss curves     {output / 'loss.png'}\n"
        f"  answers         {output / 'answers.png'} (some, with the attention), {output / 'answers.json'} (all)\n"
        f"  TensorBoard     tensorboard --logdir {output / 'checkpoints'}\n"
        f"  checkpoints     {output / 'checkpoints'}\n"
        f"  Hugging Face    {output / 'hf'} (llava_next), {output / 'instellavl'} (for the published snippets: "
        "docs/inference.md)\n"
    )
    print((output / "report.txt").read_text(encoding="utf-8").rstrip())
    if not ran:
        print(f"\nNothing was left to do. To start from the beginning: make demo DEMO='{_restart_flags(options)}'")


def _restart_flags(options: argparse.Namespace) -> str:
    seed = f" --seed {options.seed}" if options.seed != SEED else ""
    folder = f" --output {options.output}" if options.output != OUTPUT else ""
    return f"--restart{seed}{folder}"


if __name__ == "__main__":
    main()
