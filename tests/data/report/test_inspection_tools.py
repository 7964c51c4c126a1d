"""tools/show_sample.py and tools/data_report.py on a small mixture."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from megatron_vlm.commands import data_report, show_sample
from megatron_vlm.config import parse_command_line
from megatron_vlm.data.dataset import open_dataset
from megatron_vlm.data.processing.tokenizer import load_tokenizer
from megatron_vlm.data.report.sections import template_section
from tests.data.helpers import Folder, image_bytes, mixed_folder, tiny_tokenizer_folder
from tests.training.tiny_run import MODEL


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """recipe.yaml and mix.yaml over two annotation files, one of them with suspicious samples."""
    root = tmp_path_factory.mktemp("data")
    mixed_folder(root, 60).write("good.json")
    odd = Folder(root)
    odd.add("gone", "<image> hi", "yes", image="gone.png")
    odd.add("empty", "hi", "")
    odd.add("twin", "hello", "there")
    odd.add("twin of it", "hello", "there")
    odd.add("long", "<image>\n" + "word " * 300, "yes", image="0_0.png")
    (odd.images / "line.png").write_bytes(image_bytes(500, 9))
    odd.add("line", "<image>\n<b>What?</b>", "A line.", image="line.png")
    odd.write("odd.jsonl")
    (root / "mix.yaml").write_text("datasets: [{json_path: good.json, repeat: 2}, {json_path: odd.jsonl}]")
    recipe = {
        "model": MODEL,
        "data": {
            "data_path": [str(root / "good.json")],
            "data_root": str(root),
            "image_folder": str(odd.images),
            "tokenizer_model": str(tiny_tokenizer_folder(root / "tokenizer")),
            "seq_length": 192,
            "max_tiles_per_row": 16,
            "num_workers": 0,
            "oversized_samples": "skip",
        },
        "training": {"global_batch_size": 1},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


def test_a_sample_as_text_and_as_json(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool, config = show_sample, ("--config", str(root / "recipe.yaml"))
    assert tool.main(["--index", "2", *config]) == 0
    text = capsys.readouterr().out
    assert text.startswith("sample 2: 's2' of ") and "2_1.png" in text and "It is 2." in text
    assert tool.main(["--id", "s2", "--json", *config]) == 0
    view = json.loads(capsys.readouterr().out)
    assert len(view["ids"]) == len(view["labels"]) == len(view["positions"])
    assert [view["spans"][0]["start"], view["spans"][-1]["stop"]] == [0, len(view["ids"])]
    assert all(image["num_tokens"] == image["positions"] > 0 for image in view["images"])  # both names
    assert [len(view["images"]), sum(span["kind"] == "image" for span in view["spans"])] == [2, 2]
    for span in view["spans"]:
        labels = view["labels"][span["start"] : span["stop"]]
        assert all(label == -100 for label in labels) if span["kind"] != "answer" else -100 not in labels
        assert (500 in view["ids"][span["start"] : span["stop"]]) == (span["kind"] == "image")
    assert "".join(span["text"] for span in view["spans"] if span["kind"] == "answer").startswith("It is 2.")


def test_samples_that_cannot_be_shown(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool, config = show_sample, ("--config", str(root / "recipe.yaml"))
    odd = ("--data-path", str(root / "odd.jsonl"))
    for arguments, message in [
        (["--index", "60", *config], "there is no sample 60 among 60"),
        (["--id", "nobody", *config], "there is no sample 'nobody'"),
        (["--id", "gone", *config, *odd], "gone.png"),
        (["--index", "0", "--config", "absent.yaml"], "absent.yaml"),
    ]:
        assert tool.main(arguments) == 2
        assert message in capsys.readouterr().err


def test_a_report(root: Path, tmp_path: Path) -> None:
    tool = data_report
    arguments = [str(root / "mix.yaml"), "--config", str(root / "recipe.yaml"), "--output", str(tmp_path / "r")]
    assert tool.main([*arguments, "--examples", "70"]) == 0
    page = (tmp_path / "r" / "index.html").read_text()
    plots = re.findall(r'<img alt="([^"]+)" src="data:image/png;base64,([^"]+)"', page)
    assert len(plots) == 8 and plots[-1][0] == "the tokens of some rows"
    for alt, data in plots:
        assert np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("L")).std() > 5, alt  # not blank
    assert page.count("data:image/jpeg") > 40  # thumbnails of the examples
    assert not re.search(r'href|src="(?!data:)|src=[^"]', page)  # no other file is needed
    assert "repeat:2" in page and "<span class=answer>A line." in page and "<span class=image>[image, " in page
    suspects = [json.loads(line) for line in (tmp_path / "r" / "suspects.jsonl").read_text().splitlines()]
    reasons = {(suspect["sample_id"], suspect["reason"]) for suspect in suspects}
    assert reasons >= {
        ("gone", "missing image"),
        ("empty", "empty answer"),
        ("twin of it", "duplicate"),
        ("long", "longer than a row"),
        ("line", "odd image size"),
    }
    assert all(name in page for name, _ in reasons)


def section_of(page: str, heading: str) -> str:
    """Text of a section of the report, without tags."""
    found = re.search(rf"<section><h2>{heading}</h2>(.*?)</section>", page, re.S)
    assert found, heading
    return re.sub(r"<[^>]+>", " ", re.sub(r"<img[^>]+>", "", found[1])).replace("  ", " ")


@pytest.mark.parametrize("action", ["error", "truncate"])
def test_what_truncation_and_skipping_lose(root: Path, tmp_path: Path, action: str) -> None:
    """As training counts it, whatever the recipe chooses."""
    folder = Folder(tmp_path)
    for number in range(4):
        folder.add(f"short{number}", "hi", "yes")
    folder.add("two", "hi", "word " * 10, "more", "word " * 300)
    folder.add("one", "hi", "word " * 400)
    path = folder.write("long.json")
    settings = ["--config", str(root / "recipe.yaml"), "--image-folder", str(folder.images)]
    counts = {}
    for how in ("skip", "truncate"):
        recipe, _ = parse_command_line([*settings, "--data-path", str(path), "--oversized-samples", how])
        counts[how] = open_dataset(recipe, is_logging_rank=False)
    lengths = counts["skip"].tokens
    assert data_report.main([str(path), *settings, "--oversized-samples", action, "--output", str(tmp_path / "r")]) == 0
    page = (tmp_path / "r" / "index.html").read_text()
    text = section_of(page, "Samples longer than a row")
    dropped = counts["truncate"].counts["tokens_dropped"]
    assert counts["truncate"].counts["truncated"] == 1 and dropped > 0
    assert f"oversized_samples is {action}: " in text
    assert f"truncate loses {dropped + lengths[5]:,} tokens" in text and f"skip {lengths[4:].sum():,} tokens" in text
    assert text.split()[-6:] == [f"{n:,}" for n in (2, 1, dropped, 1, lengths[5], lengths[4:].sum())]
    packed = counts["truncate" if action == "truncate" else "skip"]
    assert f"{int(packed.usable.sum())} samples in " in page, "the packed rows are those of training"


def test_the_template_and_the_scripts_of_the_texts(root: Path, tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.add("latin", "<image>\nWhat?", "Ja, schön", image=folder.image("a.png", 9, 9))
    folder.add("mixed", "你好 ok", "Привет, мир")
    folder.add("none", "1 + 1?", "2")
    tokenizer = tiny_tokenizer_folder(tmp_path / "tokenizer")
    settings = ["--config", str(root / "recipe.yaml"), "--image-folder", str(folder.images), "--output", str(tmp_path)]
    settings = [str(folder.write()), *settings, "--tokenizer-model", str(tokenizer)]
    assert data_report.main(settings) == 0
    page = (tmp_path / "index.html").read_text()
    assert "Instella, that of the published training, because" in section_of(page, "Chat template")
    scripts = section_of(page, "Language of the texts")
    assert re.search(r"dataset +Latin +Cyrillic +Han \(Chinese, Japanese\) +samples without letters", scripts)
    letters = {"Latin": 4 + 2 + 5 + 2, "Cyrillic": 9, "Han": 2}
    shares = [f"{100 * count / sum(letters.values()):.2f} %" for count in letters.values()]
    assert re.search(r" +".join(["all", *map(re.escape, shares), "1"]), scripts)
    template = "{% for m in messages %}<b>{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    (tokenizer / "chat_template.jinja").write_text(template)
    shown = section_of(template_section(load_tokenizer(tokenizer), "auto"), "Chat template")
    assert f"That of the tokenizer {tokenizer}" in shown and "&lt;b&gt;{{ m.role }}" in shown


def test_data_cannot_inject_html(root: Path, tmp_path: Path) -> None:
    evil = Folder(tmp_path)
    script = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>\udc80"
    image = evil.image("<b onmouseover=alert(1)>.png", 9, 9)
    evil.add(script, "<image>" + script.strip("\udc80"), "</span></div>" + script.strip("\udc80"), image=image)
    evil.add(script + "2", "<image>", "yes", image=script)
    evil.add("long", "word " * 4000, "yes")
    (tmp_path / "<i>.json").write_bytes(evil.write().read_bytes())
    tool = data_report
    output = tmp_path / "out"
    assert tool.main([str(tmp_path / "<i>.json"), "--config", str(root / "recipe.yaml"), "--output", str(output),
                      "--image-folder", str(evil.images), "--seq-length", "30000"]) == 0  # fmt: skip
    page = (output / "index.html").read_text()
    seen = Elements()
    seen.feed(page)
    assert not seen.names & {"script", "i", "b onmouseover"} and not seen.attributes & {"onerror", "onmouseover"}
    assert page.count("&lt;script&gt;") >= 4 and "characters …]" in page and "default-src 'none'" in page


class Elements(HTMLParser):
    """Names of the elements and attributes that a browser would find in a page."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}


def test_a_report_without_matplotlib(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = data_report
    monkeypatch.setattr(tool.importlib.util, "find_spec", lambda name: None)
    assert tool.main(["--config", str(root / "recipe.yaml"), "--output", str(tmp_path)]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_short_names() -> None:
    short = data_report.short_names
    assert short(["a/b.json", "c/d/"]) == ["b.json", "d"]
    assert short(["s3://x/warmup/a", "s3://x/instruct/a"]) == ["warmup/a", "instruct/a"]
    assert short(["a", "a"]) == ["a", "a"]
