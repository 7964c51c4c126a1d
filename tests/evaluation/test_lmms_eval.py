"""lmms-eval with the installed project, on tasks of its own, in an environment with what this much of it imports."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from checkpoint_convert.engine import open_engine
from checkpoint_convert.huggingface.config import model_from_llava_next, read_config
from megatron_vlm.data.processing.conversation import Turn
from megatron_vlm.data.processing.tiling import ImageGeometry
from megatron_vlm.data.processing.tokenizer import load_tokenizer
from megatron_vlm.evaluation.prompts import prompt_from_text
from megatron_vlm.inference.prompts import encode
from megatron_vlm.inference.request import AnsweredPrompt
from tests.checkpoint_convert.whole_model import picture
from tests.evaluation.local_task import CHOICES, QUESTIONS, questions, write_tasks
from tests.inference.server.running import run_server
from tests.instellavl.exports import write_exports
from tests.support.environments import Environment, evaluation_environment
from tests.support.launch import ROOT

pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]

PUBLISHED = "conv_template=instella,model_name=instellavl"
"""Of the published command; --task, --batch_size and the log options below are its, too."""


class Work(NamedTuple):
    """An environment, and a folder with exports of a random model and tasks."""

    environment: Environment
    folder: Path

    def evaluate(
        self,
        output: str,
        *arguments: str,
        model: str = "instellavl",
        launcher: tuple[str, ...] = (),
        tasks: Path | None = None,
    ) -> list[dict[str, Any]]:
        """What lmms-eval logs about each question, in order; `tasks` is the tasks' folder."""
        launched = [str(self.environment.folder / "bin" / launcher[0]), *launcher[1:]] if launcher else []
        where = ["--include_path", str(tasks or self.folder / "tasks"), "--output_path", str(self.folder / output)]
        command = ["-m", "lmms_eval", "--model", model, "--batch_size", "1", "--log_samples", *where]
        program = launched or [self.environment.python]
        done = self.environment.run_program(*program, *command, *arguments, timeout=500)
        assert done.returncode == 0, done.stdout + done.stderr
        found = sorted((self.folder / output).rglob("*_samples_*.jsonl"))
        assert len(found) == 1, done.stdout + done.stderr
        samples = sorted((json.loads(line) for line in found[0].read_text().splitlines()), key=lambda s: s["doc_id"])
        assert [sample["doc_id"] for sample in samples] == list(range(QUESTIONS))
        return samples


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    folder = tmp_path_factory.mktemp("evaluation")
    write_exports(folder)
    write_tasks(folder / "tasks")
    return Work(evaluation_environment(folder / "environments"), folder)


def test_the_published_command(work: Work) -> None:
    arguments = ("--task", "local_answers", "--log_samples_suffix", "instellavl")
    model = f"pretrained={work.folder / 'instellavl'},{PUBLISHED}"
    samples = work.evaluate("one", "--model_args", model, *arguments)
    with open_engine(work.folder / "instellavl") as engine:
        assert engine is not None
        expected = engine.answer([prompt_from_text(*question) for question in questions()], 6)
    assert [sample["filtered_resps"] for sample in samples] == [answer.strip() for answer in expected]
    assert len(set(expected)) > QUESTIONS // 2, "most answers are the same"

    # On a machine without GPUs, accelerate starts several processes only with --multi_gpu.
    launcher = ("accelerate", "launch", "--multi_gpu", "--num_processes=2")
    assert work.evaluate("two", "--model_args", model, *arguments, launcher=launcher) == samples


def test_the_demos_task_gets_the_answers_of_its_evaluation(work: Work) -> None:
    """Paths of the task are relative to the working directory, which is the environment's folder."""
    data, demo = work.environment.folder / "runs" / "demo" / "data", ROOT / "examples" / "instellavl" / "demo"
    (data / "images").mkdir(parents=True)
    for number in range(QUESTIONS):
        picture((20, 20), seed=number).save(data / "images" / f"{number}.png")

    def write_questions(truths: list[str]) -> None:
        turns = [(f"what is shape {n}?", truth) for n, truth in enumerate(truths)]
        entries = [
            {
                "image": f"{number}.png",
                "conversations": [{"from": "human", "value": f"<image>\n{text}"}, {"from": "gpt", "value": truth}],
            }
            for number, (text, truth) in enumerate(turns)
        ]
        (data / "test.json").write_text(json.dumps(entries))

    write_questions(["yes"] * QUESTIONS)
    asked = ["--annotations", data / "test.json", "--image-folder", data / "images"]
    export, answers_file = work.folder / "llava_next", data / "answers.json"
    done = work.environment.run(demo / "evaluate.py", "--model", export, *asked, "--output", answers_file)
    assert done.returncode == 0, done.stderr
    answers = [row["answer"] for row in json.loads(answers_file.read_text())]
    assert len(set(answers)) > QUESTIONS // 2, "most answers are the same"

    write_questions([answer if number % 2 else "yes" for number, answer in enumerate(answers)])
    samples = work.evaluate(
        "demo", "--model_args", f"pretrained={export}", "--tasks", "easy_vqa", tasks=demo / "lmms_eval"
    )
    assert [sample["filtered_resps"] for sample in samples] == answers
    (results,) = (work.folder / "demo").rglob("*_results.json")
    scores = json.loads(results.read_text())["results"]["easy_vqa"]
    assert scores["accuracy,none"] == (QUESTIONS // 2) / QUESTIONS
    assert scores["yes/no,none"] == 0


def test_its_openai_model_asks_our_server(work: Work) -> None:
    with open_engine(work.folder / "instellavl") as engine:
        assert engine is not None
        expected = engine.answer([prompt_from_text(*question) for question in questions()], 6)
        with run_server(engine) as server:
            model_args = f"base_url={server.url}/v1,model_version=tiny,api_key=none,num_concurrent=4,timeout=60"
            samples = work.evaluate("openai", "--model_args", model_args, "--task", "local_answers", model="openai")
    assert [sample["filtered_resps"] for sample in samples] == [answer.strip() for answer in expected]


@torch.no_grad()
def test_losses_of_given_answers_are_those_of_transformers(work: Work) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = work.folder / "llava_next"
    samples = work.evaluate(
        "choices", "--model_args", f"pretrained={folder}", "--tasks", "local_choices", "--force_simple"
    )
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    config = model_from_llava_next(read_config(folder), "config.json")
    for sample, (text, images) in zip(samples, questions(), strict=True):
        pixels = processor.image_processor(images=images, return_tensors="pt") if images else {}
        for choice, reported in zip(CHOICES, sample["filtered_resps"], strict=True):
            prompt = prompt_from_text(text, images)
            answered = AnsweredPrompt([*prompt.turns, Turn("gpt", choice)], prompt.images)
            encoded = encode(answered, tokenizer, ImageGeometry.of(config, "anyres"), config)
            ids = torch.tensor([encoded.ids])
            answer = ids[0, -len(tokenizer.encode(choice)) - 1 :]
            all_logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **pixels).logits[0]
            logits = all_logits[-len(answer) - 1 : -1]
            loss, greedy = reported  # logged as texts
            assert float(loss) == pytest.approx(float(torch.nn.functional.cross_entropy(logits, answer)), rel=1e-4)
            assert greedy == str(bool((logits.argmax(-1) == answer).all()))


def test_what_is_wrong_is_said(work: Work) -> None:
    arguments = ("-m", "lmms_eval", "--model", "instellavl", "--tasks", "local_answers", "--include_path")
    command = (*arguments, str(work.folder / "tasks"), "--model_args")
    for model_args, message in {
        "pretrained=nowhere": "nowhere is not a model: it has neither config.json",
        f"pretrained={work.folder / 'instellavl'},colour=red": "model_args has colour, which the model instellavl does",
        f"pretrained={work.folder / 'instellavl'},conv_template=vicuna": "conv_template is 'vicuna'",
    }.items():
        done = work.environment.run(*command, model_args)
        assert message in done.stdout + done.stderr


def test_the_model_is_listed(work: Work) -> None:
    listing: subprocess.CompletedProcess[str] = work.environment.run(
        "-c", "from lmms_eval.models import get_model as get; print(get('instellavl'), get('megatron_vlm', True))"
    )
    assert "lmms_model.InstellaVLChat'> <class 'megatron_vlm.evaluation.lmms_model.InstellaVL'>" in listing.stdout
