"""Over 200 kinds of wrong data, settings and model folders: each ends in one message with what, where, what to do."""

# ruff: noqa: E501  (tables)
from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoint_convert.errors import ConversionError
from checkpoint_convert.megatron.files import imported_recipe
from checkpoint_convert.model_config import VLM_FORMATS
from checkpoint_convert.model_source import open_source
from megatron_vlm.config import ConfigError, check_recipe, parse_command_line
from megatron_vlm.data.errors import DataError
from megatron_vlm.data.processing.tokenizer import load_tokenizer
from megatron_vlm.data.sources.mixture import open_mixture
from megatron_vlm.data.sources.sample_source import AnnotationSource
from tests.config.conftest import SMALL
from tests.data.helpers import image_bytes, tiny_tokenizer_folder

REMEDY = re.compile(
    r"(?i)\b(use|set|convert|give|write|fix|remove|choose|did you mean|check|replace|download|copy|raise|create|add|rename|move|"
    r"change|save|train|leave|end|expected|supported|roles are|must alternate|correct|install|missing|relative to)\b"
)
ASK, ANSWER = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}
IMAGE = {"from": "human", "value": "<image> hi"}


def entry(*turns: Any, **more: Any) -> dict[str, Any]:
    return {"id": "bad", "conversations": list(turns), **more}


ENTRIES: list[Any] = [
    None, 5, 1.5, True, "text", [], ["a"], {}, {"id": "bad"}, {"id": 5, "conversations": None}, entry(),
    entry(ASK), entry(ANSWER), entry(ASK, ASK), entry(ASK, ANSWER, ANSWER), entry(ASK, ASK, ANSWER),
    entry(ASK, {"from": "gpt", "value": ""}), entry(ASK, {"from": "gpt", "value": " \n"}),
    *(entry(ASK, {"from": "gpt", "value": value}) for value in (None, 5, True, {}, {"text": "x"}, [5], ["x"], float("nan"))),
    *(entry({"from": role, "value": "hi"}, ANSWER) for role in (None, "", "robot", "tool", 5, ["human"], "Human", "bot")),
    entry("hi", "yes"), entry(["human", "hi"]), entry(None), entry(5),
    *({"id": "bad", "conversations": value} for value in ("hi", "[", "[1]", 5, True, {"a": 1}, {"from": ["human"]})),
    entry({"from": "human"}, ANSWER), entry({"value": "hi"}, ANSWER), entry({"text": "hi"}, ANSWER),
    entry({"from": "human", "value": "\ud800"}, ANSWER), entry(ASK, {"from": "gpt", "value": "\udfff"}),
    entry(ASK, {"from": "gpt", "value": "<image>"}), entry({"from": "system", "value": "x"}, ANSWER),
    entry({"from": "system", "value": "<image>"}, ASK, ANSWER), entry(ASK, ANSWER, {"from": "system", "value": "x"}),
    entry(IMAGE, ANSWER), entry(ASK, ANSWER, image="good.png"), entry(IMAGE, ANSWER, image=["good.png"] * 2),
    entry(IMAGE, IMAGE, ANSWER, image="good.png"), entry(IMAGE, ANSWER, image="good.png", images=["other.png"]),
    *(entry(IMAGE, ANSWER, image=value) for value in (5, True, {"path": "x"}, [None], [5], " ", ["a", ""], {"bytes": "x"})),
    *(entry(IMAGE, ANSWER, image=value) for value in ("absent.png", "folder", "text.png", "empty.png", "half.png")),
    *(entry(IMAGE, ANSWER, image=value) for value in ("half.jpg", "a\0b", "\ud800", "a" * 5000, "good.png/x", "huge.png")),
    *(entry(IMAGE, ANSWER, image=value) for value in ("http://x/a.png", "https://x/a", "s3://b/a.png", "data:image/png;base64,x")),
    *(entry(ASK, ANSWER, **{key: "a.png"}) for key in ("image_path", "img", "img_path", "picture", "photo", "Image", "file_name")),
    *(entry(ASK, ANSWER, **{key: "https://x/1"}) for key in ("image_url", "photo_link", "img_src")),
    entry(ASK, ANSWER, pictures=["a.png"]), entry(ASK, ANSWER, frames=[{"path": "1.jpg"}]), entry(IMAGE, ANSWER, video="a.mp4"),
    {"id": "bad", "question": "hi", "answer": "yes"}, {"id": "bad", "text": "hi"}, {"id": "bad", "messages": []},
    {"id": "bad", "messages": ["hi"]}, {"id": "bad", "messages": [{"role": "user", "content": [{"type": "audio"}]}]},
    {"id": "bad", "messages": [{"role": "user", "content": [{"text": "hi"}]}]},
    {"id": "bad", "messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "x"}]},
    {"id": "bad", "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x", "name": 5}], "image": "x"},
]  # fmt: skip

FILES: dict[str, bytes] = {
    "a.json": b"", "b.json": b" ", "c.json": b"{}", "d.json": b"[]", "e.json": b"[1", "f.json": b"[1 2]", "g.json": b"[1]]",
    "h.json": b"null", "i.json": b'"x"', "j.json": b"5", "k.json": b"\xff\xfe[\0]\0", "l.json": b"<html>",
    "m.json": b"PK\x03\x04", "n.json": b"[" * 100_000, "o.jsonl": b"", "p.jsonl": b"\n\n", "q.ndjson": b"\n",
    "r.jsonl": b"\xff\xfe{\0}\0", "s.txt": b"[]", "t.csv": b"a,b\n", "u": b"[]", "v.parquet": b"PAR1", "w.zip": b"PK",
    "x.yaml": b"[", "y.yaml": b"[]", "z.yaml": b"datasets: []", "aa.yaml": b"datasets: 5", "ab.yaml": b"other: 1",
    "ac.yaml": b"datasets: [{}]", "ad.yaml": b"datasets: [{json_path: 5}]", "ae.yaml": b"datasets: [a.json]",
    "af.yaml": b"datasets: [{json_path: a.json, shard_path: b}]", "ag.yaml": b"datasets: [{json_path: absent.json}]",
    "ah.yaml": b"datasets: [{json_path: a.json, repeat: -1}]", "ai.yaml": b"datasets: [{json_path: a.json, choose: x}]",
    "aj.yaml": b"datasets: [{json_path: a.json, sampling_strategy: 'first:x'}]", "ak.yaml": b"a: 1\na: 2", "al.yaml": b"\xff",
    "am.yaml": b"datasets: [{json_path: a.json, choose: 1, repeat: 2}]", "an.yaml": b"{",
}  # fmt: skip

INDEXES: list[bytes] = [
    b"", b"[]", b"{}", b"5", b'{"version": 2}', b'{"version": 2, "shards": 5}', b'{"version": 2, "shards": [{}]}',
    b'{"version": 2, "shards": []}', b'{"version": 2, "shards": [{"raw_data": {"basename": "x"}}]}',
]  # fmt: skip

SETTINGS: list[tuple[str, Any]] = [
    *((key, value) for key in ("training.lr", "training.train_iters", "data.seq_length") for value in ("x", [], {}, 0, -1)),
    *((f"training.{key}", value) for key in ("global_batch_size", "save_interval", "log_interval") for value in (0, "x", 1.5)),
    *((f"parallel.{key}_parallel_size", value) for key in ("tensor_model", "pipeline_model", "context") for value in (0, 3, "x")),
    *((f"model.vision.{key}", 0) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size")),
    *((f"model.language.{key}", 0) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")),
    ("model.vision.num_attention_heads", 5), ("model.language.num_attention_heads", 7), ("model.vision.patch_size", 5),
    ("model.language.num_key_value_heads", 3), ("model.vision.model_type", "vit"), ("model.language.model_type", "gpt"),
    ("model.image_token_index", 600), ("model.image_token_index", -1), ("model.image_grid_pinpoints", []),
    ("model.image_grid_pinpoints", [[28]]), ("model.image_grid_pinpoints", [[30, 28]]), ("model.image_grid_pinpoints", "x"),
    ("model.vision.vision_feature_layer", -9), ("model.language.normalization", "BatchNorm"), ("model.vision.hidden_act", "tanh"),
    ("data.image_aspect_ratio", "anyres_max_0"), ("data.image_aspect_ratio", "wide"), ("data.multi_image_aspect_ratio", "tile"),
    ("data.oversized_samples", "drop"), ("data.num_workers", -1), ("data.max_tiles_per_row", 0), ("data.packing_window", 0),
    ("data.cost_per_tile", -1), ("training.bf16", "maybe"), ("training.adam_beta1", 1), ("training.lr_warmup_fraction", 2),
    ("training.weight_decay", -1), ("training.min_lr", -1), ("training.trainable", []), ("training.trainable", ["decoder"]),
    *((f"training.{key}", value) for key in ("lr", "min_lr", "clip_grad", "adam_beta2") for value in (float("nan"), float("inf"))),
    ("training.optimizer", "lion"), ("training.unknown", 1), ("model.visoin", 1), ("batch_size", 1), ("data", 5), ("model", [1]),
]  # fmt: skip

FLAGS = (
    "--batch-size 8", "--learning-rate 1", "--epochs x", "--lr", "--config absent.yaml", "--config .", "--lr abc", "stray",
    "--micro-batch-size 2", "--sequence-parallel", "--image-folder", "--tp 2", "--model.language.hiden-size 3", "--hidden-size 3",
)  # fmt: skip

TOKENIZERS: dict[str, dict[str, str]] = {
    "empty folder": {}, "no json": {"tokenizer.json": "x"}, "a list": {"tokenizer.json": "[]"}, "an object": {"tokenizer.json": "{}"},
    "no eos": {"tokenizer_config.json": "{}"}, "bad config": {"tokenizer_config.json": "["},
    "config is a list": {"tokenizer_config.json": "[]"}, "foreign eos": {"tokenizer_config.json": '{"eos_token": "<none>"}'},
    "foreign pad": {"tokenizer_config.json": '{"eos_token": "|||IP_ADDRESS|||", "pad_token": "<none>"}'},
    "bad template": {"chat_template.jinja": "{% for %}"}, "raising template": {"chat_template.jinja": "{{ undefined_thing.x }}"},
    "two models": {"tokenizer.json": "", "a.model": "x", "b.model": "x"}, "bad model": {"tokenizer.json": "", "a.model": "x"},
}  # fmt: skip

MODELS: list[Any] = [
    None, "", "[", [], 5, {}, {"model_type": None}, {"model_type": "bert"}, {"model_type": 5}, {"model_type": "gpt2"},
    *({"model_type": kind} for kind in VLM_FORMATS), {"model_type": "llava_next", "vision_config": 5},
    {"model_type": "llava_next", "text_config": [], "vision_config": {}},
    {"model_type": "llava_next", "text_config": {"model_type": "gpt2"}, "vision_config": {"model_type": "clip_vision_model"}},
    {"model_type": "llava_next", "text_config": {"model_type": "llama"}, "vision_config": {"model_type": "vit"}},
    {"model_type": "llama", "hidden_size": "x"}, {"model_type": "llama", "hidden_size": -1},
    {"model_type": "llama", "rope_scaling": {"type": "yarn"}}, {"model_type": "clip_vision_model", "hidden_act": "swish"},
    {"model_type": "llava_onevision", "vision_aspect_ratio": "square"},
]  # fmt: skip

SOUND: dict[str, Any] = {
    "model_type": "llava_next", "image_token_index": 280, "image_grid_pinpoints": [[28, 56]], "tie_word_embeddings": True,
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3,
        "num_attention_heads": 3, "image_size": 28, "patch_size": 7,
    },
    "text_config": {
        "model_type": "llama", "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "vocab_size": 288, "max_position_embeddings": 512,
    },
}  # fmt: skip
"""config.json of a model that is read."""
CONFIGS: list[tuple[str, Any]] = [
    *((f"text_config.{key}", value) for key in ("hidden_size", "num_attention_heads", "vocab_size") for value in (0, -1, 4.5, "x", [], True)),
    *((f"text_config.{key}", value) for key in ("num_hidden_layers", "num_key_value_heads") for value in (0, "x", {})),
    *((f"text_config.{key}", 0) for key in ("intermediate_size", "max_position_embeddings", "rms_norm_eps")),
    *((f"text_config.{key}", value) for key in ("rope_theta", "rms_norm_eps") for value in ("x", -1, float("nan"), float("inf"))),
    *(("text_config.head_dim", value) for value in (0, 7, "x")), ("text_config.num_attention_heads", 5), ("text_config.num_key_value_heads", 4),
    *(("text_config.rope_parameters", value) for value in (5, "x", [], {"rope_type": "yarn"}, {"rope_theta": "x"}) if value != []),
    ("text_config.tie_word_embeddings", "yes"), ("text_config.hidden_act", "relu"), ("text_config.attention_bias", True),
    ("text_config.mlp_bias", True), ("text_config.rope_scaling", {"type": "linear"}), ("text_config.model_type", "bloom"),
    *(("text_config.model_type", value) for value in (None, 5, [], {})), *(("text_config", value) for value in (5, "x", [1])),
    *((f"vision_config.{key}", value) for key in ("hidden_size", "patch_size", "image_size") for value in (0, -1, "x", [336, 336])),
    *((f"vision_config.{key}", value) for key in ("num_hidden_layers", "num_attention_heads") for value in (0, 2.5, None) if value is not None),
    ("vision_config.num_attention_heads", 5), ("vision_config.patch_size", 5), ("vision_config.num_channels", 1),
    ("vision_config.hidden_act", "relu"), ("vision_config.layer_norm_eps", 0), ("vision_config.model_type", "vit"),
    *(("vision_config.model_type", value) for value in (5, [], {"a": 1})), *(("vision_config", value) for value in (5, "x", [1])),
    *(("image_grid_pinpoints", value) for value in (None, 5, "x", [], {}, [5], [[28]], [[28, 28, 28]], [["28", "28"]], [[30, 28]], [[0, 0]])),
    *(("image_token_index", value) for value in ("x", -1, 288, 10**9, [280], 1.5)),
    *(("vision_feature_layer", value) for value in ("x", [-2, -1], 9, -9, 1.5)), ("vision_feature_select_strategy", "full"),
    ("projector_hidden_act", "relu"), ("multimodal_projector_bias", False),
]  # fmt: skip
PROCESSORS: dict[str, bytes] = {
    "empty": b"", "truncated": b'{"image_mean": [0.5,', "a list": b"[]", "not UTF-8": b"\xff\xfe{}", "mean is a number": b'{"image_mean": 5}',
    "another mean": b'{"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}', "no std": b'{"image_mean": [0.5, 0.5, 0.5]}',
    "std is text": b'{"image_mean": [0.5, 0.5, 0.5], "image_std": "x"}', "four channels": b'{"image_mean": [0.5, 0.5, 0.5, 0.5]}',
}  # fmt: skip
WEIGHTS: dict[str, tuple[str, bytes]] = {
    "nothing": ("README.md", b"x"), "empty": ("model.safetensors", b""), "text": ("model.safetensors", b"version https://git-lfs"),
    "huge header": ("model.safetensors", b"\xff" * 16), "header is a list": ("model.safetensors", b"\x02\0\0\0\0\0\0\0[]"),
    "pickle": ("pytorch_model.bin", b"\x80\x02c__builtin__\neval\nq\0."), "html": ("pytorch_model.bin", b"<html>"),
    "zip": ("pytorch_model.bin", b"PK\x05\x06" + bytes(18)), "empty bin": ("pytorch_model.bin", b""),
    "index of nothing": ("model.safetensors.index.json", b'{"weight_map": {"a": "absent.safetensors"}}'),
    **{f"index {content!r}": ("model.safetensors.index.json", content) for content in (b"", b"[]", b"{}", b'{"weight_map": 5}', b"\xff")},
    "index of numbers": ("model.safetensors.index.json", b'{"weight_map": {"a": 5}}'),
    "index of a list": ("model.safetensors.index.json", b'{"weight_map": {"a": []}}'),
    "a folder of a projector": ("mm_projector.bin", b"x"),
}  # fmt: skip


def message_of(attempt: Callable[[], Any]) -> str:
    """The message that an attempt ends in. Any other exception than ours fails the test with its trace."""
    try:
        attempt()
    except (ConfigError, DataError, ConversionError) as error:
        return str(error)
    raise AssertionError("it is accepted")


def check(attempt: Callable[[], Any], where: str, case: object) -> str | None:
    """What is wrong with the message of an attempt, if anything."""
    try:
        message = message_of(attempt)
    except Exception as error:
        return f"{str(case)[:150]}: {type(error).__name__}: {str(error)[:200]}"
    if where not in message or not REMEDY.search(message):
        return f"{str(case)[:150]}: where or what to do is missing in: {message[:300]}"
    return None


def report(problems: list[str | None], count: int) -> None:
    found = [problem for problem in problems if problem]
    assert len(problems) == count and not found, "\n".join(found)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "folder").mkdir(parents=True)
    for name, data in {
        "good.png": image_bytes(9, 9), "text.png": b"text", "empty.png": b"", "half.png": image_bytes(90, 90)[:900],
        "half.jpg": image_bytes(90, 90, kind="JPEG")[:-900],
    }.items():  # fmt: skip
        (folder / name).write_bytes(data)
    (folder / "huge.png").write_bytes(image_bytes(9, 9)[:16] + (10**5).to_bytes(4, "big") * 2 + image_bytes(9, 9)[24:])
    return folder


def test_there_are_more_than_200_kinds() -> None:
    """Many of each: data, settings, model folders. test_wrong_commands.py has whole commands."""
    of_data, of_settings = (ENTRIES, FILES, INDEXES), (SETTINGS, FLAGS)
    of_models = (TOKENIZERS, MODELS, CONFIGS, PROCESSORS, WEIGHTS)
    counts = [sum(map(len, tables)) for tables in (of_data, of_settings, of_models)]
    assert min(counts) > 80 and sum(counts) > 400, counts


def test_entries(tmp_path: Path, images: Path) -> None:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(bad) + "\n" for bad in ENTRIES))
    source = AnnotationSource(tmp_path / "train.jsonl", images)
    attempts = [lambda index=index: source.sample(index).measure_images() for index in range(len(ENTRIES))]
    report([check(a, "train.jsonl", bad) for a, bad in zip(attempts, ENTRIES, strict=True)], len(ENTRIES))


def test_files_and_mixtures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    problems = []
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
        where = "absent.json" if b"absent" in content else Path(name).stem
        problems.append(check(lambda name=name: open_mixture([name], None), where, name))  # type: ignore[misc]
    report(problems, len(FILES))


def test_shard_folders(tmp_path: Path) -> None:
    problems = []
    for number, content in enumerate(INDEXES):
        folder = tmp_path / f"shards{number}"
        folder.mkdir()
        (folder / "index.json").write_bytes(content)
        problems.append(check(lambda folder=folder: open_mixture([str(folder)], None), folder.name, content))  # type: ignore[misc]
    report(problems, len(INDEXES))


def test_settings(tmp_path: Path) -> None:
    problems = []
    for key, value in SETTINGS:
        tree: dict[str, Any] = {}
        for name, setting in {**SMALL, key: value}.items():
            if name != key and name.startswith(f"{key}."):
                continue
            *parents, last = name.split(".")
            branch = tree
            for parent in parents:
                branch = branch.setdefault(parent, {})
            branch[last] = setting
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(tree))

        def attempt(path: Path = path) -> None:
            recipe, _ = parse_command_line(["--config", str(path)])
            check_recipe(recipe, 1)

        problems.append(check(attempt, key.rpartition(".")[2], (key, value)))
    report(problems, len(SETTINGS))


def test_flags() -> None:
    attempts = [lambda line=line: parse_command_line(line.split()) for line in FLAGS]
    report([check(a, line.split()[0], line) for a, line in zip(attempts, FLAGS, strict=True)], len(FLAGS))


def test_tokenizers(tmp_path: Path) -> None:
    problems = []
    for number, (name, files) in enumerate(TOKENIZERS.items()):
        folder = tmp_path / f"tokenizer{number}"
        folder.mkdir()
        if name != "empty folder":
            tiny_tokenizer_folder(folder)
        for file, content in files.items():
            (folder / file).write_text(content)
            if not content:
                (folder / file).unlink()
        problems.append(check(lambda folder=folder: load_tokenizer(folder), folder.name, name))  # type: ignore[misc]
    report(problems, len(TOKENIZERS))


def test_model_folders(tmp_path: Path) -> None:
    problems = []
    for number, config in enumerate(MODELS):
        folder = tmp_path / f"model{number}"
        folder.mkdir()
        if config is not None:
            (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        problems.append(check(lambda folder=folder: open_source(folder), folder.name, config))  # type: ignore[misc]
    report(problems, len(MODELS))


def model_folder(folder: Path, config: Any, weights: tuple[str, bytes] | None = None) -> Path:
    """A Hugging Face folder with a file of weights that holds no tensor, or another."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    name, content = weights or ("model.safetensors", b"\x02\0\0\0\0\0\0\0{}")
    (folder / name).write_bytes(content)
    return folder


def read_model(folder: Path) -> None:
    """As far as no tensor is read."""
    source = open_source(folder)
    assert source.model is not None
    imported_recipe(source.model, source.aspect_ratio, str(folder))


def test_the_sound_model_is_read(tmp_path: Path) -> None:
    read_model(model_folder(tmp_path / "sound", SOUND))


def test_configs(tmp_path: Path) -> None:
    problems = []
    for number, (key, value) in enumerate(CONFIGS):
        config = json.loads(json.dumps(SOUND))
        *section, name = key.split(".")
        (config[section[0]] if section else config)[name] = value
        folder = model_folder(tmp_path / f"model{number}", config)
        problems.append(check(lambda folder=folder: read_model(folder), folder.name, (key, value)))  # type: ignore[misc]
    report(problems, len(CONFIGS))


def test_image_processors(tmp_path: Path) -> None:
    problems = []
    for number, (name, content) in enumerate(PROCESSORS.items()):
        folder = model_folder(tmp_path / f"model{number}", SOUND)
        (folder / "preprocessor_config.json").write_bytes(content)
        problems.append(check(lambda folder=folder: read_model(folder), "preprocessor_config.json", name))  # type: ignore[misc]
    report(problems, len(PROCESSORS))


def test_weights(tmp_path: Path) -> None:
    problems = []
    for number, (name, weights) in enumerate(WEIGHTS.items()):
        folder = model_folder(tmp_path / f"model{number}", SOUND, weights)
        problems.append(check(lambda folder=folder: read_model(folder), folder.name, name))  # type: ignore[misc]
    report(problems, len(WEIGHTS))
