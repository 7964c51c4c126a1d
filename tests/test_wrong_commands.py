"""Wrong command lines: each ends in one message with what, where, what to do, and leaves nothing behind.

The messages of settings, data and model folders themselves are in test_wrong_inputs.py.
"""

# ruff: noqa: E501  (tables)
from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

from benchmarks.support.random_tokenizer import write_tokenizer
from checkpoint_convert.hf_to_megatron import convert_vlm
from megatron_vlm.cli import GROUPS, main
from tests.data.helpers import image_bytes, mixed_folder
from tests.support.random_models import LANGUAGE_SIZES, clip_vision_model, olmo_model, write_llava_next
from tests.test_wrong_inputs import REMEDY

_MORE_REMEDIES = re.compile(r"\b(must be|pad|export|start)\b", re.IGNORECASE)
"""What else a command says to do, beside the words of messages about data and settings."""

CASES: dict[str, list[tuple[str, str]]] = {
    "import": [
        ("--save new", "--model"), ("--model hf", "--save"), ("--model absent --save new", "absent"), ("--model empty --save new", "empty"),
        ("--model train.json --save new", "train.json"), ("--model decoder --save new", "decoder"), ("--model tower --save new", "tower"),
        ("--model megatron --save new", "megatron"), ("--model hf --save hf", "hf"), ("--model hf --save train.json", "train.json"),
        ("--model hf --save train.json/new", "train.json"), ("--model hf --save .", "already exists"), ("--vision-model tower --save new", "--language-model"),
        ("--language-model decoder --save new", "--vision-model"), ("--model hf --vision-model tower --language-model decoder --save new", "--model"),
        ("--vision-model decoder --language-model decoder --save new", "decoder"), ("--vision-model tower --language-model tower --save new", "tower"),
        ("--vision-model absent --language-model decoder --save new", "absent"), ("--vision-model tower --language-model absent --save new", "absent"),
        ("--vision-model tower --language-model decoder --projector absent --save new", "absent"),
        ("--vision-model tower --language-model decoder --projector image.png --save new", "image.png"),
        ("--vision-model tower --language-model decoder --projector decoder --save new", "decoder"),
        ("--vision-model tower --language-model decoder --projector other --save new", "other"),
        ("--model hf --projector hf --save new", "--projector"), ("--model hf --tokenizer absent --save new", "absent"),
        ("--model hf --tokenizer empty --save new", "empty"), ("--model hf --tokenizer image.png --save new", "image.png"),
        ("--model hf --adapter absent --save new", "absent"), ("--model hf --adapter hf --save new", "hf"), ("--model no_weights --save new", "no_weights"),
        ("--model half --save new", "half"), ("--model no_tokenizer --save new", "no_tokenizer"), ("--model other_tokenizer --save new", "other_tokenizer"),
    ],
    "export": [
        ("--load megatron --save new", "--format"), ("--save new --format llava_next", "--load"), ("--load megatron --format llava_next", "--save"),
        *((f"--load {name} --save new --format llava_next", name) for name in ("absent", "empty", "hf", "train.json", "decoder")),
        ("--load megatron --save new --format gguf", "gguf"), ("--load megatron --save hf --format llava_next", "hf"),
        ("--load megatron --save train.json --format llava_next", "train.json"),
        ("--load megatron --save new --format peft", "megatron"), ("--load megatron --save new --format llava_next --no-merge-lora", "megatron"),
        *((f"--load megatron --save new --format llava_next --shard-gb {size}", "--shard-gb") for size in ("0", "-1", "nan", "inf", "x")),
        ("--load megatron --save new --format llava_next --dtype int8", "--dtype"), ("--load megatron --save new --format llava_next --tokenizer absent", "absent"),
        ("--load megatron --save new --format llava_next --tokenizer empty", "empty"),
        ("--load megatron --save new --format llava_next --tokenizer other_tokenizer", "tokenizer"), ("--load torn --save new --format llava_next", "torn"),
    ],
    "merge": [
        ("--vision hf --language hf --save new", "--projector"),
        *((f"--vision {name} --projector hf --language hf --save new", name) for name in ("absent", "empty", "decoder", "image.png")),
        *((f"--vision hf --projector {name} --language hf --save new", name) for name in ("absent", "empty", "decoder", "image.png", "other")),
        *((f"--vision hf --projector hf --language {name} --save new", name) for name in ("absent", "empty", "tower", "image.png", "torn")),
        ("--vision hf --projector hf --language hf --save hf", "hf"), ("--vision hf --projector hf --language hf --tokenizer absent --save new", "absent"),
    ],
    "verify": [
        ("hf", "B"), ("absent hf", "absent"), ("hf absent", "absent"), ("hf image.png", "image.png"), ("tower decoder", "decoder"),
        ("hf empty", "empty"), ("hf hf --tolerance x", "--tolerance"), ("hf hf --tolerance nan", "--tolerance"), ("hf hf --tolerance -1", "--tolerance"),
        ("hf hf --logits-tolerance nan", "--logits-tolerance"),
    ],
    "ask": [
        ("hf", "question"), ("absent hi", "absent"), ("empty hi", "empty"), ("decoder hi", "decoder"), ("image.png hi", "image.png"), ("torn hi", "torn"),
        ("hf hi --image absent.png", "absent.png"), ("hf hi --image train.json", "train.json"), ("hf hi --image empty", "empty"),
        ("hf hi --max-tokens x", "--max-tokens"), ("hf hi --max-tokens 0", "--max-tokens"), ("hf hi --temperature -1", "temperature"),
        ("hf hi --temperature nan", "temperature"), ("hf hi --top-p 2", "top_p"), ("hf hi --top-p nan", "top_p"), ("hf hi --top-k -1", "top_k"),
        ("hf '<image> hi'", "<image>"), ("hf hi --tensor-model-parallel-size 2", "torchrun"), ("hf hi --tensor-model-parallel-size 0", "size"),
        ("hf hi --inference-max-requests 0", "inference_max_requests"), ("hf hi --bogus", "--bogus"),
    ],
    "serve": [
        ("", "MODEL"), ("absent", "absent"), ("empty", "empty"), ("decoder", "decoder"), ("torn", "torn"), ("hf --load hf", "one model"),
        *((f"hf --port {port}", "--port") for port in ("x", "-1", "70000")), *((f"hf --max-images {number}", "--max-images") for number in ("0", "-1", "x")),
        *((f"hf --max-megapixels {number}", "--max-megapixels") for number in ("0", "nan", "inf")), ("hf --max-request-mb nan", "--max-request-mb"),
        ("hf --max-request-mb inf", "--max-request-mb"), ("hf --request-timeout 0", "--request-timeout"), ("hf --shutdown-timeout -1", "--shutdown-timeout"),
        ("hf --shutdown-timeout nan", "--shutdown-timeout"), ("hf --default-max-tokens 0", "--default-max-tokens"), ("hf --api-key-file absent", "absent"),
        ("hf --api-key-file none.txt", "none.txt"), ("hf --api-key-file image.png", "image.png"), ("hf --host no.such.host.invalid", "no.such.host.invalid"),
        ("hf --pipeline-model-parallel-size 2", "torchrun"),
    ],
    "plan": [
        ("--config absent.yaml", "absent.yaml"), ("--config empty", "empty"), ("--config image.png", "image.png"), ("--config list.yaml", "list.yaml"),
        ("--config recipe.yaml --data-path absent.json", "absent.json"), ("--config recipe.yaml --data-path empty", "empty"),
        ("--config recipe.yaml --data-path bad.json", "bad.json"), ("--config recipe.yaml --data-path image.png", "image.png"),
        ("--config recipe.yaml --image-folder absent", "absent"), ("--config recipe.yaml --tokenizer-model absent", "absent"),
        ("--config recipe.yaml --tokenizer-model empty", "empty"), ("--config recipe.yaml --tokenizer-model other_tokenizer", "tokenizer"),
        ("--config recipe.yaml --chat-template absent", "absent"), ("--config recipe.yaml --chat-template broken.jinja", "chat template"),
        ("--config recipe.yaml --seq-length 16", "seq_length"), ("--config recipe.yaml --global-batch-size 0", "global_batch_size"),
        *((f"--config recipe.yaml --pretrained-checkpoint {name}", name) for name in ("absent", "empty", "decoder", "tower", "torn", "no_weights", "half", "train.json")),
        ("--config recipe.yaml --load absent", "absent"), ("--config recipe.yaml --load hf", "hf"), ("--config recipe.yaml --save train.json", "train.json"),
        ("--config recipe.yaml --valid-data-path absent.json", "absent.json"), ("--config recipe.yaml --cache-dir train.json", "train.json"),
        ("--config recipe.yaml --model.language.hidden-size 64", "hidden_size"), ("--config recipe.yaml --trainable decoder", "trainable"),
        ("--config recipe.yaml --recompute-granularity some", "--recompute-granularity"), ("--config recipe.yaml stray", "stray"),
    ],
    "plan-layout": [
        ("--config recipe.yaml", "--gpus"), ("--gpus 0 --config recipe.yaml", "--gpus"), ("--gpus x --config recipe.yaml", "--gpus"),
        ("--gpus 8 --device TPU --config recipe.yaml", "TPU"), ("--gpus 8 --config absent.yaml", "absent.yaml"),
        *((f"--gpus 8 --memory-gb {number} --config recipe.yaml", "--memory-gb") for number in ("x", "0", "-1", "nan", "inf")),
        *((f"--gpus 8 --tiles-per-row {number} --config recipe.yaml", "--tiles-per-row") for number in ("x", "-1", "nan")),
        *((f"--gpus 8 --document-tokens {number} --config recipe.yaml", "--document-tokens") for number in ("0", "-1", "nan")),
        ("--gpus 8 --top 0 --config recipe.yaml", "--top"), ("--gpus 8 --top -1 --config recipe.yaml", "--top"),
        ("--gpus 8 --config recipe.yaml --seq-length 0", "seq_length"), ("--gpus 8 --memory-gb 0.001 --config recipe.yaml", "no layout fits"),
    ],
    "init": [
        ("--data train.json --output new", "--model"), ("--model hf --output new", "--data"), ("--data train.json --model hf", "--output"),
        *((f"--data {name} --image-folder images --from-scratch tiny --output new", name) for name in ("absent.json", "empty", "image.png", "table.csv", "bad.json")),
        *((f"--data train.json --image-folder images --model {name} --output new", name) for name in ("absent", "empty", "decoder", "tower", "image.png", "no_weights", "torn")),
        ("--data train.json --image-folder absent --from-scratch tiny --output new", "absent"),
        ("--data train.json --image-folder images --from-scratch huge --output new", "huge"),
        ("--data train.json --image-folder images --from-scratch tiny --output hf", "hf"),
        ("--data train.json --image-folder images --from-scratch tiny --output train.json", "train.json"),
        ("--data train.json --image-folder images --from-scratch tiny --output train.json/new", "train.json"),
        ("--data train.json --image-folder images --from-scratch tiny --epochs 0 --output new", "--epochs"),
        ("--data train.json --image-folder images --vision-model tower --output new", "--language-model"),
        ("--data train.json --image-folder images --vision-model decoder --language-model tower --output new", "decoder"),
        ("--data train.json --image-folder images --from-scratch tiny --valid-data absent.json --output new", "absent.json"),
    ],
    "convert-dataset": [
        ("", "KIND"), ("qa", "--input"), ("fly --input table.csv --output new --image-folder images", "fly"),
        *((f"qa --input {name} --output new --image-folder images", name) for name in ("absent.csv", "empty", "image.png", "none.txt", "none.csv", "bad.parquet", "list.yaml")),
        ("qa --input wrong.csv --output new --image-folder images", "missing column"), ("qa --input table.csv --output . --image-folder images", "."),
        ("qa --input table.csv --output table.csv --image-folder images", "table.csv"), ("qa --input table.csv --output image.png/new --image-folder images", "image.png"),
        ("qa --input table.csv --output new --image-folder image.png", "image.png"), ("qa --input table.csv --output new", "--image-folder"),
        *((f"qa --input table.csv --output new --image-folder images --job {job}", "--job") for job in ("x", "0/2", "3/2", "1", "-1/2")),
        *((f"qa --input table.csv --output new --image-folder images --max-rejected {limit}", "--max-rejected") for limit in ("x", "-1", "101%", "nan%", "1.5")),
        ("qa --input table.csv --output new --image-folder images --plugin absent.py", "absent.py"),
        ("qa --input table.csv --output new --image-folder images --plugin image.png", "image.png"),
        ("captions --input table.csv --output new --image-folder images --prompts absent", "absent"),
    ],
    "prepare-shards": [
        ("--output new", "--annotations"), ("--annotations train.json", "--output"), ("--annotations train.json --merge --output new", "--merge"),
        *((f"--annotations {name} --image-folder images --output new", name) for name in ("absent.json", "empty", "image.png", "table.csv", "list.yaml")),
        ("--annotations bad.json --image-folder images --output new", "no sample is valid"), ("--annotations train.json --image-folder images --output image.png", "image.png"),
        ("--annotations train.json --image-folder images --output hf", "hf"), ("--annotations train.json --image-folder images --output image.png/new", "image.png"),
        *((f"--annotations train.json --output new --processes {number}", "--processes") for number in ("0", "-1", "x")), ("--output new --merge", "new"),
        ("--annotations train.json --output new --size-limit 0", "--size-limit"), ("--annotations train.json --output new --job 2/1", "--job"),
        ("--annotations train.json --image-folder absent --output new", "absent"),
    ],
    "upload-shards": [
        ("hf", "s3://"), ("hf bucket/x", "s3://"), ("absent s3://bucket/x", "absent"), ("hf s3://bucket/x", "hf"), ("image.png s3://bucket/x", "image.png"),
        ("hf s3://bucket/x --threads 0", "--threads"), ("hf s3://bucket/x --threads x", "--threads"),
    ],
    "data-report": [
        ("--config recipe.yaml", "--output"), ("--config absent.yaml --output new", "absent.yaml"), ("absent.json --config recipe.yaml --output new", "absent.json"),
        ("image.png --config recipe.yaml --output new", "image.png"), ("--config recipe.yaml --output image.png", "image.png"),
        ("--config recipe.yaml --output new --examples x", "--examples"), ("--config recipe.yaml --output new --examples -1", "--examples"),
        ("--config recipe.yaml --output new --tokenizer-model absent", "absent"), ("--config recipe.yaml --output new --seq-length x", "seq-length"),
    ],
    "show-sample": [
        ("--config recipe.yaml", "--index"), ("--config absent.yaml --index 0", "absent.yaml"), ("--config recipe.yaml --index x", "--index"),
        ("--config recipe.yaml --index -1", "-1"), ("--config recipe.yaml --index 99", "99"), ("--config recipe.yaml --id nobody", "nobody"),
        ("--config recipe.yaml --index 0 --id s0", "--id"), ("--config recipe.yaml --index 0 --data-path bad.json", "bad.json"),
        ("--config recipe.yaml --index 0 --tokenizer-model empty", "empty"), ("--config recipe.yaml --index 0 stray", "stray"),
    ],
    "make-data-folders": [("--stage final", "--stage"), ("--data-root image.png", "image.png")],
    "benchmark-table": [("", "folder"), ("absent", "absent"), ("empty", "empty"), ("image.png", "image.png")],
    "chat": [
        ("", "HOST:PORT"), ("127.0.0.1:x", "127.0.0.1:x"), ("127.0.0.1:1 --image absent.png", "absent.png"), ("127.0.0.1:1 --api-key-file absent", "absent"),
        ("127.0.0.1:1", "127.0.0.1:1"),
    ],
}  # fmt: skip
"""Command -> its arguments, and what its message names."""


RECIPE: dict[str, Any] = {
    "data": {"data_path": ["train.json"], "image_folder": "images", "seq_length": 1024, "num_workers": 0},
    "training": {"global_batch_size": 1, "train_iters": 1, "pretrained_checkpoint": "hf", "save": "run"},
}


LISTS = {".lengths", "new.quarantine.jsonl"}
"""Files that measure data and list what is wrong with them. convert-dataset writes the entries of no row."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound models, data and a recipe, and others that are not."""
    root = tmp_path_factory.mktemp("commands")
    mixed_folder(root, 4).write()
    write_llava_next(root / "hf")
    write_llava_next(root / "other", language=LANGUAGE_SIZES | {"hidden_size": 60})
    convert_vlm(root / "hf", root / "megatron")
    clip_vision_model().save_pretrained(root / "tower")
    olmo_model().save_pretrained(root / "decoder")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(root / "hf" / name, root / "decoder")
    for name, ignored in {
        "no_weights": "*.safetensors",
        "no_tokenizer": "tokenizer*",
        "half": "",
        "other_tokenizer": "",
    }.items():
        shutil.copytree(root / "hf", root / name, ignore=shutil.ignore_patterns(ignored))
    weights = root / "half" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    write_tokenizer(root / "other_tokenizer", 285)
    shutil.copytree(root / "megatron", root / "torn")
    next((root / "torn").rglob("*.distcp")).unlink()
    (root / "empty").mkdir()
    (root / "image.png").write_bytes(image_bytes(9, 9))
    for name, text in {
        "list.yaml": "[1]", "none.txt": "", "none.csv": "", "bad.parquet": "PAR1", "bad.json": '[{"id": "1", "conversations": []}]',
        "table.csv": "image,question,answer\n0_0.png,What?,This\n", "wrong.csv": "picture,ask,say\na.png,What?,This\n", "broken.jinja": "{% for %}",
        "recipe.yaml": json.dumps(RECIPE),
    }.items():  # fmt: skip
        (root / name).write_text(text)
    return root


def leave(code: int) -> NoReturn:
    raise SystemExit(code)


def problem_of(
    command: str, line: str, where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str | None:
    """What is wrong with how a command ends, if anything."""
    case = f"{command} {line}"
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))  # what chat reads
    try:
        code: Any = main([command, *shlex.split(line)])
    except SystemExit as exit:  # argparse
        code = exit.code
    except BaseException as error:
        return f"{case}: {type(error).__name__}: {str(error)[:300]}"
    error = capsys.readouterr().err
    if code not in (1, 2):
        return f"{case}: exit code {code}: {error[:300]}"
    # A usage says what to do, but names every flag, so it does not count as naming the wrong one.
    message = error[error.find("error: ") :] if "usage: " in error else error
    if (
        "Traceback" in error
        or where not in message
        or error.count("error: ") > 1
        or not ("usage: " in error or REMEDY.search(message) or _MORE_REMEDIES.search(message))
    ):
        return f"{case}: {message[-600:]}"
    return None


@pytest.mark.parametrize("command", CASES)
def test_wrong_command_lines(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(os, "_exit", leave)
    before = {path.name for path in folder.iterdir()}
    problems = [problem_of(command, line, where, monkeypatch, capsys) for line, where in CASES[command]]
    found = [problem for problem in problems if problem]
    assert not found, "\n".join(found)
    left = {path.name for path in folder.iterdir()} - before - LISTS
    Path("new").unlink(missing_ok=True)
    assert left == ({"new"} if command == "convert-dataset" else set()), "no other file is left behind"


def test_every_command_has_cases() -> None:
    assert set(CASES) == {name for group in GROUPS.values() for name in group} - {"train"}, "plan is train --dry-run"
    assert sum(map(len, CASES.values())) > 200
