"""The whole workflow at small size, from a data set to answers. `make demo` runs this script.

    easy-VQA -> annotations -> tokenizer -> shards -> three stages with different layouts -> Hugging Face -> answers

All output is written to runs/demo. Run it from the root of the repository.
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
STEP_TIMEOUT = 1200
"""Seconds after which a step counts as hanging."""
STAGES = {
    "warmup": "projector warm-up, tensor parallel size 2 with sequence parallelism",
    "pretrain": "captions, data parallel size 2 with the distributed optimizer",
    "instruct": "questions, pipeline parallel size 2",
}


class Demo:
    """Runs the steps in order and prints a numbered heading with the elapsed time for each."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.step = 0
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}

    def heading(self, text: str) -> None:
        self.step += 1
        minutes, seconds = divmod(int(time.monotonic() - self.started), 60)
        print(f"\n== {self.step}. {text}   [{minutes}:{seconds:02d}]", flush=True)

    def run(self, *command: str | Path, threads: int = 1) -> None:
        """Run a Python command and show its output; exit if it fails or times out."""
        environment = {**self.environment, "OMP_NUM_THREADS": str(threads)}
        arguments = [sys.executable, *map(str, command)]
        try:
            result = subprocess.run(arguments, cwd=ROOT, env=environment, timeout=STEP_TIMEOUT)
        except subprocess.TimeoutExpired:
            sys.exit(f"demo: step {self.step} took more than {STEP_TIMEOUT // 60} minutes: {' '.join(arguments)}")
        if result.returncode:
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
    for folder, hf_format in ((hf, "llava_next"), (published, "instellavl")):
        demo.run("-m", "checkpoint_convert.megatron_to_hf", "--load", last, "--save", folder, "--format", hf_format)
    demo.heading("loss curve")
    demo.run(HERE / "plots.py", "losses", "--checkpoints", OUTPUT / "checkpoints", "--output", OUTPUT / "loss.png")
    demo.heading("evaluation on the 9,673 test questions, with stock transformers and the exported folder")
    answers, report = OUTPUT / "answers.json", OUTPUT / "report.txt"
    asked = ("--annotations", test, "--image-folder", data / "images")
    demo.run(HERE / "evaluate.py", "--model", hf, *asked, "--output", answers, "--report", report, threads=2)
    sheet = ("--answers", answers, "--image-folder", data / "images", "--output", OUTPUT / "answers.png")
    demo.run(HERE / "plots.py", "answers", *sheet)
    demo.heading("done; all output is in runs/demo")
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
