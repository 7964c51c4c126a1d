"""Samples during training: the answers of the saved checkpoint, in every layout, and nothing of the run changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_vlm import train as train_command
from megatron_vlm.data.processing.conversation import Turn
from megatron_vlm.inference.load import load_engine
from megatron_vlm.inference.request import Prompt
from megatron_vlm.runtime.launch import process_group
from megatron_vlm.text_generation import ask
from tests.inference.run_training_samples import COMPARED, LAYOUTS, NEW_TOKENS, SAMPLES, answers, train
from tests.support.launch import launch
from tests.training.tiny_run import metrics, write_recipe

RUN_RANKS = Path(__file__).with_name("run_training_samples.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with samples in every layout, and without in some."""
    folder = tmp_path_factory.mktemp("samples")
    recipe = write_recipe(folder)
    with process_group():
        train(str(recipe), folder, "one")
    two_ranks = [layout for layout in LAYOUTS if layout != "one"]
    launch(RUN_RANKS, recipe, folder, *two_ranks, ranks=2, timeout=120)
    return folder


def _annotation(folder: Path, sample_id: str) -> dict[str, Any]:
    (file,) = (folder / "data").glob("*.json*")
    (entry,) = [entry for entry in json.loads(file.read_text()) if entry["id"] == sample_id]
    return dict(entry)


def _images(folder: Path, entry: dict[str, Any]) -> list[Path]:
    names = entry.get("image", [])
    (images,) = (folder / "data").glob("images*")
    return [images / name for name in ([names] if isinstance(names, str) else names)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_answers_are_those_of_the_checkpoint(folder: Path, layout: str) -> None:
    lines = answers(folder / layout)
    assert [line["iteration"] for line in lines] == [1] * SAMPLES + [2] * SAMPLES + [3] * SAMPLES
    assert [line["id"] for line in lines[:SAMPLES]] == [line["id"] for line in lines[-SAMPLES:]]
    prompts = []
    for line in lines[-SAMPLES:]:
        entry = _annotation(folder, line["id"])
        question, answer = (turn["value"] for turn in entry["conversations"][:2])
        assert (line["question"], line["answer"]) == (question, answer.strip())
        images = [Image.open(path).convert("RGB") for path in _images(folder, entry)]
        prompts.append(Prompt([Turn("human", question)], images))
    assert {len(prompt.images) for prompt in prompts} > {0}, "there are samples with images"
    with load_engine(folder / layout) as engine:
        assert engine is not None
        expected = engine.answer(prompts, NEW_TOKENS)
    assert [line["generated"] for line in lines[-SAMPLES:]] == expected
    assert any(expected) and len({line["generated"] for line in lines}) > 3, "answers differ"


@pytest.mark.parametrize("layout", COMPARED)
def test_a_run_with_samples_is_bit_for_bit_one_without(folder: Path, layout: str) -> None:
    save, without = folder / layout, folder / f"{layout}-without"
    ranks = 1 if layout == "one" else 2
    for rank in range(ranks):
        assert (save / f"digest-{rank}").read_text() == (without / f"digest-{rank}").read_text()
    for line, other in zip(metrics(save), metrics(without), strict=True):
        for name in ("lm_loss", "grad_norm", "eval_loss"):
            assert line[name] == other[name]
        assert line["generation_seconds"] > 0 and other["generation_seconds"] == 0
    assert not (without / "generated_samples.jsonl").exists()


def test_ask_gives_the_same_answer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = next(line for line in answers(folder / "one")[-SAMPLES:] if line["question"].count("<image>") == 1)
    (image,) = _images(folder, _annotation(folder, line["id"]))
    question = line["question"].removeprefix("<image>\n")
    command = [str(folder / "one"), question, "--image", str(image), "--max-tokens", str(NEW_TOKENS)]
    assert ask.main(command) == 0
    assert capsys.readouterr().out.strip() == line["generated"].strip()


def test_the_command_generates_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: Exception) -> None:
        raise error

    monkeypatch.setattr(train_command, "_fail", fail)  # it would end this process
    save = folder / "command"
    flags = ["--train-iters", "1", "--valid-share", "0.2", "--eval-generate-samples", "2", "--num-workers", "0"]
    assert train_command.main(["--config", str(folder / "recipe.yaml"), "--save", str(save), *flags]) == 0
    assert [line["iteration"] for line in answers(save)] == [1, 1]


def test_tensorboard_has_an_image_and_the_texts(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "one" / "tensorboard"), {"images": 0, "tensors": 0})
    events.Reload()
    assert events.Tags()["images"] == [f"generated_samples/{number}" for number in range(SAMPLES)]
    shown = events.Images("generated_samples/1")
    assert [event.step for event in shown] == [1, 2, 3]
    assert shown[0].encoded_image_string.startswith(b"\x89PNG")
    texts = events.Tensors("generated_samples/1/text_summary")
    text = texts[-1].tensor_proto.string_val[0].decode()
    line = answers(folder / "one")[-SAMPLES + 1]
    assert f"    {line['answer']}" in text and all(f"    {part}" in text for part in line["question"].splitlines())
