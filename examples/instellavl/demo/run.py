"""The main job at small size, from a dataset to answers: what `make demo` runs.

    easy-VQA -> annotations -> tokenizer -> shards -> three stages, each in another layout -> Hugging Face -> answers

Everything it makes lies in runs/demo. Run it from the root of the project.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
OUTPUT = Path("runs/demo")
PROCESSES = "2"
A_STEP_AT_MOST = 1200
"""Seconds; a step that takes longer hangs."""
STAGES = {
    "warmup": "projector warm-up, tensor parallel over 2 processes with sequence parallelism",
    "pretrain": "captions, data parallel over 2 processes with the distributed optimizer",
    "instruct": "questions, two pipeline stages",
}


class Demo:
    """Runs the steps one after the other and says how far it is."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.step = 0
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}

    def heading(self, text: str) -> None:
        self.step += 1
        minutes, seconds = divmod(int(time.monotonic() - self.started), 60)
        print(f"\n== {self.step}. {text}   [{minutes}:{seconds:02d}]", flush=True)

    def run(self, *command: str | Path, threads: int = 1) -> None:
        """Run a Python command of this project, its output shown as it comes; end the demo if it fails."""
        environment = {**self.environment, "OMP_NUM_THREADS": str(threads)}
        arguments = [sys.executable, *map(str, command)]
        try:
            done = subprocess.run(arguments, cwd=ROOT, env=environment, timeout=A_STEP_AT_MOST)
        except subprocess.TimeoutExpired:
            sys.exit(f"demo: step {self.step} took more than {A_STEP_AT_MOST // 60} minutes: {' '.join(arguments)}")
        if done.returncode:
            sys.exit(f"demo: step {self.step} failed, see above: {' '.join(arguments)}")

    def torchrun(self, *command: str | Path) -> None:
        self.run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", PROCESSES, *command)


def main() -> None:
    demo = Demo()
    shutil.rmtree(ROOT / OUTPUT, ignore_errors=True)
    data, tokenizer = OUTPUT / "data", OUTPUT / "tokenizer"
    hf, published = OUTPUT / "hf", OUTPUT / "instellavl"
    captions, questions, test = (data / f"{name}.json" for name in ("captions", "questions", "test"))

    demo.heading("easy-VQA: images, captions and questions")
    demo.run(HERE / "easy_vqa.py", "--output", data)
    demo.heading("tokenizer")
    demo.run(HERE / "tokenizer.py", "--annotations", captions, questions, "--output", tokenizer)
    demo.heading("shards")
    for entries in (captions, questions):
        written = OUTPUT / "shards" / entries.stem
        paths = ("--annotations", entries, "--image-folder", data / "images", "--output", written)
        demo.run(ROOT / "tools" / "prepare_shards.py", *paths)
    for stage, what in STAGES.items():
        demo.heading(f"stage {stage}: {what}")
        demo.torchrun("-m", "megatron_vlm.train", "--config", HERE / f"{stage}.yaml")
    demo.heading("export to Hugging Face")
    last = OUTPUT / "checkpoints" / "instruct"
    for folder, dialect in ((hf, "llava_next"), (published, "instellavl")):
        demo.run("-m", "checkpoint_convert.megatron_to_hf", "--load", last, "--save", folder, "--format", dialect)
    demo.heading("pictures of the training")
    demo.run(HERE / "pictures.py", "losses", "--checkpoints", OUTPUT / "checkpoints", "--output", OUTPUT / "loss.png")
    demo.heading("answers to the 9,673 test questions, with stock transformers from the exported folder alone")
    answers, report = OUTPUT / "answers.json", OUTPUT / "report.txt"
    asked = ("--annotations", test, "--image-folder", data / "images")
    demo.run(HERE / "evaluate.py", "--model", hf, *asked, "--output", answers, "--report", report, threads=2)
    sheet = ("--answers", answers, "--image-folder", data / "images", "--output", OUTPUT / "answers.png")
    demo.run(HERE / "pictures.py", "answers", *sheet)
    demo.heading("done; it is all in runs/demo")
    print(
        f"  loss curve      {OUTPUT / 'loss.png'}\n"
        f"  answers         {OUTPUT / 'answers.png'} (a sheet), {answers} (all)\n"
        f"  TensorBoard     tensorboard --logdir {OUTPUT / 'checkpoints'}\n"
        f"  checkpoints     {OUTPUT / 'checkpoints'}\n"
        f"  Hugging Face    {hf} (llava_next), {published} (for the published snippets: docs/inference.md)\n"
    )
    print((ROOT / report).read_text().rstrip())


if __name__ == "__main__":
    main()
