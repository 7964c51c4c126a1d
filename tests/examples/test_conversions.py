"""The example of each kind of conversion writes annotations that training reads."""

from __future__ import annotations

import json
from pathlib import Path

import conversions
import easy_vqa

from megatron_vlm.commands import convert_dataset
from megatron_vlm.data.prepare.converters import CONVERTERS
from megatron_vlm.data.sources.annotations import parse_annotation


def test_each_kind(wheel: Path, tmp_path: Path) -> None:
    examples = conversions.Examples(tmp_path, wheel)
    converted = {}
    for kind, source, flags in examples.inputs():
        output = tmp_path / f"{kind}.out.jsonl"
        arguments = ["--input", str(source), "--output", str(output), "--image-folder", str(examples.images), *flags]
        assert convert_dataset.main([kind, *arguments]) == 0 and not Path(f"{output}.quarantine.jsonl").exists()
        converted[kind] = [json.loads(line) for line in output.read_text().splitlines()]
        for index, entry in enumerate(converted[kind]):
            parse_annotation(entry, index, kind)
            assert (examples.images / entry["image"]).is_file()
    assert set(converted) == set(CONVERTERS) - {"video"}, "easy-VQA has none"
    asked = [entry["conversations"][0]["value"] for entry in converted["qa"]]
    assert asked == [f"<image>\n{question.text}\nAnswer with one word." for question in examples.questions]
    image = examples.images / converted["qa"][0]["image"]
    assert image.read_bytes() == examples.image_bytes[examples.questions[0].image]  # unchanged bytes
    for kind in ("conversations", "merge"):  # one conversation with all questions about an image
        answers = [[t["value"] for t in e["conversations"] if t["from"] == "gpt"] for e in converted[kind]]
        assert sum(map(len, answers)) == len(examples.questions) and max(map(len, answers)) > easy_vqa.MAX_TURNS
    captions = [(entry["image"], entry["conversations"][1]["value"]) for entry in converted["captions"]]
    assert len(set(captions)) == len(captions) > conversions.IMAGES  # no duplicates, several captions per image
    assert converted["ocr"][0]["conversations"][1]["value"] == "\n".join(conversions._PAGE)
    assert {len(entry["conversations"]) for entry in converted["choice"]} == {4}
