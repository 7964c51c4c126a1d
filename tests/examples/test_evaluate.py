"""The demo's evaluation: scores, and batched answers equal to stock generation one at a time."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import evaluate
import plots
import pytest
import torch
from attention import AttentionMaps
from evaluate import Question
from PIL import Image

from benchmarks.support.random_tokenizer import write_tokenizer
from checkpoint_convert.huggingface.llava_next import write_configs
from megatron_vlm.data.processing.tokenizer import load_tokenizer
from tests.checkpoint_convert.whole_model import model_config, picture
from tests.support.random_models import VISION_SIZES, llava_next_model

QUESTIONS = [
    Question("what is it?", "circle", "a.png"),
    Question("what color is the shape in this image?", "red", "b.png"),
    Question("is there a circle?", "yes", "a.png"),
    Question("is there a dog?", "yes", "b.png"),
    Question("is there no dog?", "no", "c.png"),
]


def test_report() -> None:
    lines = evaluate.report(QUESTIONS, ["circle", "blue", "yes", "yes", "yes"], ["no"] * 5)
    cells = {line.split()[0]: line.split()[1:] for line in lines[1:-1]}
    assert cells["colour"] == ["1", "0.0", "%", "100.0", "%", "100.0", "%", "-100.0", "0.0", "%"]
    assert cells["yes/no"] == ["3", "66.7", "%", "66.7", "%", "100.0", "%", "-33.3", "33.3", "%"]
    assert cells["all"] == ["5", "60.0", "%", "40.0", "%", "100.0", "%", "-40.0", "20.0", "%"]
    assert lines[-1] == "test accuracy 60.0 % (baseline 40.0 %)"


def test_what_the_wording_alone_reaches() -> None:
    """One question has two true answers, one of them twice; the other question has one."""
    questions = [Question("what is it?", truth, "a.png") for truth in ("circle", "circle", "triangle")]
    assert evaluate.wording_baseline(questions) == pytest.approx(200 / 3)
    assert evaluate.wording_baseline([*questions, Question("is there a dog?", "no", "a.png")]) == 75


def test_confusion() -> None:
    lines = evaluate.confusion(QUESTIONS, ["circle", "blue", "yes", "no", "yes"])
    cells = [line.split() for line in lines]
    assert ["red", "other"] in cells
    assert ["red", "0", "1"] in cells
    assert cells[-3:] == [["no", "yes", "other"], ["no", "0", "1", "0"], ["yes", "1", "1", "0"]]


def test_shuffling_keeps_images_and_true_answers() -> None:
    shuffled = evaluate.shuffle_images(QUESTIONS)
    assert [question[:2] for question in shuffled] == [question[:2] for question in QUESTIONS]
    assert Counter(question.image for question in shuffled) == Counter(question.image for question in QUESTIONS)
    assert shuffled != QUESTIONS


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A folder in the converter's format with random weights, and images of several sizes."""
    folder, tokenizer = tmp_path_factory.mktemp("hf"), tmp_path_factory.mktemp("tokenizer")
    model = llava_next_model(image_token_index=write_tokenizer(tokenizer))
    model.save_pretrained(folder)
    write_configs(folder, model_config(model), load_tokenizer(tokenizer), torch.float32)
    for number, (name, size) in enumerate({"a.png": (40, 40), "b.png": (60, 30), "c.png": (30, 90)}.items()):
        picture(size, seed=number).save(folder / name)
    return SimpleNamespace(folder=folder)


def test_answers_equal_stock_generation(exported: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "BATCH_SIZE", 2)
    model = evaluate.Model(exported.folder)
    model.encode_images(["a.png", "b.png", "c.png"], exported.folder)
    answers = model.answer(QUESTIONS)
    assert answers == [_stock_answer(model, question, exported.folder) for question in QUESTIONS]
    assert any(answers)


def _stock_answer(model: Any, question: Question, folder: Path) -> str:
    """Generate with the processor, image and text together, batch size 1."""
    content = [{"type": "image"}, {"type": "text", "text": question.text}]
    text = model.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = model.processor(images=Image.open(folder / question.image), text=text, return_tensors="pt")
    ids = model.model.generate(**inputs, max_new_tokens=evaluate.MAX_NEW_TOKENS, do_sample=False)
    answer = ids[0, inputs["input_ids"].shape[1] :]
    return str(model.processor.tokenizer.decode(answer, skip_special_tokens=True)).strip()


@pytest.fixture(scope="module")
def one_tile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported folder with random weights whose images have one square tile, as the demo's have."""
    folder, tokenizer = tmp_path_factory.mktemp("hf"), tmp_path_factory.mktemp("tokenizer")
    side = VISION_SIZES["image_size"]
    model = llava_next_model(image_token_index=write_tokenizer(tokenizer), pinpoints=[[side, side]])
    model.save_pretrained(folder)
    write_configs(folder, model_config(model), load_tokenizer(tokenizer), torch.float32)
    picture((side, side)).save(folder / "a.png")
    return folder


def test_attention_is_over_the_patches(one_tile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of base view and tile together, without the newlines; averaged over heads and layers."""
    maps = AttentionMaps(one_tile)
    image = Image.open(one_tile / "a.png")
    stock = maps.over_image(image, "what is it?")
    vision = maps.model.config.vision_config
    grid = vision.image_size // vision.patch_size
    assert stock.shape == (grid, grid)
    assert 0 < stock.sum() < 1 and (stock > 0).all()

    class Numbered:
        """Attention that says which image token it is of, in two layers with two heads."""

        config = maps.model.config

        def __call__(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
            is_image = input_ids[0] == self.config.image_token_index
            weights = torch.where(is_image, is_image.cumsum(0) - 1, 0).float().expand(1, 2, len(is_image), -1)
            return SimpleNamespace(attentions=(weights, 3 * weights))

    monkeypatch.setattr(maps, "model", Numbered())
    base = torch.arange(grid * grid).view(grid, grid)
    tile = grid * grid + torch.arange(grid * (grid + 1)).view(grid, grid + 1)[:, :grid]
    assert torch.equal(maps.over_image(image, "what is it?"), 2.0 * (base + tile))
    with pytest.raises(ValueError, match="not one square tile"):
        maps.over_image(image.resize((2 * vision.image_size, vision.image_size)), "what is it?")


def test_plots(one_tile: Path, tmp_path: Path) -> None:
    for stage in plots.STAGES:
        (tmp_path / stage).mkdir()
        lines = [json.dumps({"iteration": i, "lm_loss": 2 / i}) + "\n" for i in range(1, 30)]
        (tmp_path / stage / "metrics.jsonl").write_text("".join(lines))
    plots.plot_losses(tmp_path, tmp_path / "loss.png")
    rows = [{"text": "what?", "truth": "red", "image": "a.png", "answer": answer} for answer in ("red", "blue")]
    (tmp_path / "answers.json").write_text(json.dumps(rows * plots.ROWS * plots.COLUMNS))
    plots.plot_answers(one_tile, tmp_path / "answers.json", one_tile, tmp_path / "answers.png")
    for name in ("loss.png", "answers.png"):
        assert Image.open(tmp_path / name).width > 600


def test_loss_curve_is_a_moving_average() -> None:
    assert plots.smooth([4.0, 2.0]) == [4.0, 3.0]
    assert plots.smooth([1.0] * 50)[-1] == 1.0
