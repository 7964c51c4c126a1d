"""Engines for Hugging Face folders of each format give the answers of the converted checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from checkpoint_convert import hf_to_megatron
from checkpoint_convert.engine import open_engine
from checkpoint_convert.errors import ConversionError
from megatron_vlm.data.processing.conversation import Turn
from megatron_vlm.inference.request import AnsweredPrompt, SamplingParams
from tests.checkpoint_convert.whole_model import picture
from tests.inference.run_folder import NEW_TOKENS
from tests.inference.run_ranks import CONFIG
from tests.inference.tiny_model import SIZES, random_specs
from tests.instellavl.exports import write_exports
from tests.support.forked_ranks import launch_forked
from tests.support.launch import ROOT
from tests.support.random_models import clip_vision_model, write_llava_next

RUN_FOLDER = ROOT / "tests" / "inference" / "run_folder.py"


def _answers(folder: Path) -> list[list[int]]:
    with open_engine(folder, CONFIG) as engine:
        assert engine is not None
        return engine.generate([spec.prompt() for spec in random_specs(5, 40)], NEW_TOKENS)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    write_exports(folder)
    return folder


@torch.no_grad()
def test_how_likely_a_given_answer_is(exports: Path) -> None:
    """As in transformers: the last tokens of the prompt are those of the answer and the end of sequence."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    prompt = AnsweredPrompt([Turn("human", "<image>\nWhy?"), Turn("gpt", " a red one")], [picture((25, 80))])
    with open_engine(exports / "llava_next", CONFIG) as engine:
        assert engine is not None
        answer = [*engine.tokenizer.encode("a red one"), engine.tokenizer.eos_id]
        handle = engine.submit(prompt, SamplingParams(0, prompt_logprobs=True))
        assert [output.finish_reason for output in handle] == ["length"]
    assert handle.prompt_token_ids[-len(answer) :] == answer
    assert handle.prompt_logprobs is not None
    ours = [token.logprob for token in handle.prompt_logprobs[-len(answer) :] if token is not None]

    model = AutoModelForImageTextToText.from_pretrained(exports / "llava_next", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(exports / "llava_next")
    pixels = processor.image_processor(images=prompt.images, return_tensors="pt")
    ids = torch.tensor([handle.prompt_token_ids])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **pixels).logits[0, -len(answer) - 1 : -1]
    stock = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
    assert ours == pytest.approx(stock.tolist(), abs=1e-4)


def test_folders_and_the_checkpoint_answer_alike(exports: Path, tmp_path: Path) -> None:
    folders = [exports / "llava_next", exports / "instellavl", tmp_path / "checkpoint"]
    assert hf_to_megatron.main(["--model", str(folders[0]), "--save", str(folders[2])]) == 0
    llava_next, instellavl, checkpoint = map(_answers, folders)
    assert llava_next == instellavl == checkpoint
    assert len(set(map(tuple, checkpoint))) == len(checkpoint), "all answers are the same"


def test_a_folder_in_four_processes(tmp_path: Path) -> None:
    """The layers are distributed over two stages, and every tensor is sliced for two ranks."""
    write_llava_next(tmp_path / "folder", language=SIZES)
    launch_forked(RUN_FOLDER, tmp_path / "folder", tmp_path / "out.json", ranks=4, timeout=120)
    assert json.loads((tmp_path / "out.json").read_text()) == _answers(tmp_path / "folder")


def test_a_part_of_a_model_has_no_answers(tmp_path: Path) -> None:
    clip_vision_model().save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match="has only vision: answers need a whole model"), open_engine(tmp_path):
        pass
