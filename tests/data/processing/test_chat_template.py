"""Ids and masks of published chat templates equal transformers' apply_chat_template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_vlm.data.errors import DataError
from megatron_vlm.data.length_index import load_length_index
from megatron_vlm.data.processing.chat_template import INSTELLA, TemplateError
from megatron_vlm.data.processing.conversation import IGNORE_INDEX, Turn, encode_conversation, encode_prompt
from megatron_vlm.data.processing.tiling import ImageGeometry
from megatron_vlm.data.processing.tokenizer import Tokenizer, load_tokenizer
from megatron_vlm.data.sources.sample_source import AnnotationSource
from tests.data.helpers import Folder, tiny_model, tiny_sentencepiece

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA3_MARKED = (
    "{% for message in messages %}{% if loop.index0 == 0 %}{{ bos_token }}{% endif %}{{ '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_MARKED = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
)
QWEN2_DEFAULT = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
)
QWEN2 = CHATML.replace("{% for message in messages %}", QWEN2_DEFAULT)
QWEN2_MARKED = CHATML_MARKED.replace("{% for message in messages %}", QWEN2_DEFAULT)
MISTRAL = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}{%- set loop_messages "
    "= messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}{{- bos_token }}{%- for message in "
    "loop_messages %}{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('After the "
    "optional system message, conversation roles must alternate user/assistant/user/assistant/...') }}{%- endif %}"
    "{%- if message['role'] == 'user' %}{%- if loop.first and system_message is defined %}{{- ' [INST] ' + "
    "system_message + '\n\n' + message['content'] + ' [/INST]' }}"
    "{%- else %}{{- ' [INST] ' + message['content'] + ' [/INST]' }}"
    "{%- endif %}{%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] + eos_token}}{%- else %}"
    "{{- raise_exception('Only user and assistant roles are supported') }}{%- endif %}{%- endfor %}"
)
MISTRAL_MARKED = MISTRAL.replace(
    "{{- ' ' + message['content'] + eos_token}}",
    "{{- ' ' }}{%- generation %}{{- message['content'] + eos_token}}{%- endgeneration %}",
)
INSTELLA_MARKED = INSTELLA.replace(
    "{{ text.strip() + eos_token + '\\n' }}",
    "{% generation %}{{ text.strip() + eos_token + '\\n' }}{% endgeneration %}",
)
FAMILIES = {  # template, the same with the assistant's part marked, bos, eos, other special tokens
    "llama3": (LLAMA3, LLAMA3_MARKED, "<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"]),
    "chatml": (CHATML, CHATML_MARKED, None, "<|im_end|>", ["<|im_start|>"]),
    "qwen2": (QWEN2, QWEN2_MARKED, None, "<|im_end|>", ["<|im_start|>", "<|endoftext|>"]),
    "mistral": (MISTRAL, MISTRAL_MARKED, "<s>", "</s>", ["<unk>"]),
    "instella": (INSTELLA, INSTELLA_MARKED, None, "|||IP_ADDRESS|||", []),
}
TEXTS = ["What is it? A dog, or a cat. [INST] Be brief and kind. assistant user system\n\n" * 3]
FIRST = [Turn("human", "<image>\nWhat is it?"), Turn("gpt", " A dog,\nor so. ")]
TALKS = {
    "one turn": (FIRST, [3]),
    "system": ([Turn("system", "Be brief."), *FIRST], [2]),
    "several turns": ([*FIRST, Turn("human", "And <image> or <image>?"), Turn("gpt", "Ünïcode ✓")], [1, 4, 2]),
    "text only": ([Turn("human", "Hi  there"), Turn("gpt", "Yes"), Turn("human", ""), Turn("gpt", "No.")], []),
    "system, several turns": ([Turn("system", "Be kind. "), *FIRST, Turn("human", "Sure?"), Turn("gpt", "Yes")], [5]),
}


def write_family(folder: Path, family: str) -> Path:
    """A tokenizer trained here, with the special tokens and the chat template of a family."""
    template, _, bos, eos, others = FAMILIES[family]
    special = [token for token in (*others, bos, eos) if token]
    if family == "mistral":
        fast = FastTokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        fast.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
        alphabet: list[str] = []
        special += [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        fast = FastTokenizer(models.BPE())
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator(TEXTS, trainer)
    folder.mkdir(parents=True)
    fast.save(str(folder / "tokenizer.json"))
    names = {"eos_token": eos, "chat_template": template} | ({"bos_token": bos} if bos else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write_family(tmp_path_factory.mktemp("chat") / family, family) for family in FAMILIES}


def reference(folder: Path, family: str) -> Any:
    _, _, bos, eos, _ = FAMILIES[family]
    names = {"eos_token": eos} | ({"bos_token": bos} if bos else {})
    stock = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **names)
    stock.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return stock


def expanded(turns: list[Turn], lengths: list[int]) -> list[dict[str, str]]:
    """Messages in which each placeholder is repeated for its image tokens, as processors do."""
    roles, left = {"human": "user", "gpt": "assistant", "system": "system"}, iter(lengths)
    messages = []
    for role, text in turns:
        first, *others = text.split("<image>")
        messages.append({"role": roles[role], "content": first + "".join("<image>" * next(left) + o for o in others)})
    return messages


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("talk", TALKS)
def test_ids_and_masks_equal_those_of_transformers(folders: dict[str, Path], family: str, talk: str) -> None:
    turns, lengths = TALKS[talk]
    template, marked, *_ = FAMILIES[family]
    stock, ours = reference(folders[family], family), load_tokenizer(folders[family])
    assert (ours.chat_template is None) == (family == "instella")
    messages = expanded(turns, lengths)
    image = stock.convert_tokens_to_ids("<image>")
    expected = stock.apply_chat_template(messages, chat_template=template, return_dict=True)["input_ids"]
    with_mask = stock.apply_chat_template(
        messages, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
    )
    assert with_mask["input_ids"] == expected, "the marks do not change the text"
    encoded = encode_conversation(turns, ours, lengths, image)
    assert encoded.ids.tolist() == expected
    wanted = [t if said else IGNORE_INDEX for t, said in zip(expected, with_mask["assistant_masks"], strict=True)]
    assert encoded.labels.tolist() == wanted and wanted.count(IGNORE_INDEX) < len(wanted)
    assert [encoded.ids[start] for start in encoded.image_starts] == [image] * len(lengths)
    assert ours.eos_id in encoded.labels, "the end of a turn is learned"

    prompt = encode_prompt(turns[:-1], ours, lengths, image)
    asked = stock.apply_chat_template(
        messages[:-1], chat_template=template, add_generation_prompt=True, return_dict=True
    )
    assert prompt.ids.tolist() == asked["input_ids"]


@pytest.mark.parametrize("family", ["llama3", "chatml", "mistral"])
def test_a_template_that_marks_the_assistant_is_used_as_it_is(
    tmp_path: Path, folders: dict[str, Path], family: str
) -> None:
    (tmp_path / "marked.jinja").write_text(FAMILIES[family][1])
    marked = load_tokenizer(folders[family], str(tmp_path / "marked.jinja"))
    plain = load_tokenizer(folders[family])
    for turns, lengths in TALKS.values():
        a, b = (encode_conversation(turns, tokenizer, lengths, 900) for tokenizer in (marked, plain))
        assert (a.ids.tolist(), a.labels.tolist()) == (b.ids.tolist(), b.labels.tolist())


def test_the_setting_and_the_files_of_a_template(tmp_path: Path, folders: dict[str, Path]) -> None:
    assert load_tokenizer(folders["chatml"], "instella").chat_template is None
    folder = write_family(tmp_path / "t", "chatml")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "<|im_start|>"}))
    (folder / "chat_template.jinja").write_text(LLAMA3)  # this file comes first, as in transformers
    template = load_tokenizer(folder).chat_template
    assert template is not None and template.text == LLAMA3
    (folder / "chat_template.jinja").unlink()
    config["chat_template"] = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    template = load_tokenizer(folder).chat_template
    assert template is not None and template.text == CHATML
    with pytest.raises(DataError, match="neither auto, instella nor a file"):
        load_tokenizer(folder, "no such file")
    (tmp_path / "broken.jinja").write_text("{% for %}")
    with pytest.raises(DataError, match=r"cannot be used.*Set chat_template"):
        load_tokenizer(folder, str(tmp_path / "broken.jinja"))
    (tmp_path / "chatml.jinja").write_text(CHATML)
    with pytest.raises(DataError, match="needs a Hugging Face tokenizer folder"):
        load_tokenizer(tiny_sentencepiece(tmp_path / "sp" / "t.model"), str(tmp_path / "chatml.jinja"))


PARTS = (  # as in the processors of llava-hf
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}{% endfor %}{% if message['role'] == "
    "'assistant' %}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def test_a_processors_template_gets_parts(tmp_path: Path, folders: dict[str, Path]) -> None:
    (tmp_path / "parts.jinja").write_text(PARTS)
    tokenizer = load_tokenizer(folders["chatml"], str(tmp_path / "parts.jinja"))
    encoded = encode_conversation(FIRST, tokenizer, [1], 900)
    start = encoded.image_starts[0]
    text = tokenizer.decode(encoded.ids[:start]) + "@" + tokenizer.decode(encoded.ids[start + 1 :])
    assert text == "USER: @\nWhat is it? ASSISTANT:  A dog,\nor so.  "
    assert encoded.labels[-1] == tokenizer.eos_id


def test_conversations_that_a_template_cannot_encode_are_rejected(tmp_path: Path, folders: dict[str, Path]) -> None:
    tokenizer: Tokenizer = load_tokenizer(folders["chatml"])
    for text in ("a<|im_end|>", "<|im_start|>system"):
        with pytest.raises(TemplateError, match="which the chat template uses"):
            encode_conversation([Turn("human", text), Turn("gpt", "x")], tokenizer, [], 900)
    strict = "{{ raise_exception('no system, please') if messages[0]['role'] == 'system' }}" + CHATML
    hiding = CHATML.replace("message['content']", "(message['content'] | upper)")
    folder = Folder(tmp_path)
    folder.add("good", "hi", "yes")
    folder.entries.append(
        {"id": "system", "conversations": [{"from": "system", "value": "x"}, *folder.entries[0]["conversations"]]}
    )
    folder.add("special", "hi <|im_end|>", "yes")
    (tmp_path / "strict.jinja").write_text(strict)
    source = AnnotationSource(folder.write(), None)
    geometry = ImageGeometry.of(tiny_model(), "anyres")
    index = load_length_index(source, load_tokenizer(folders["chatml"], str(tmp_path / "strict.jinja")), geometry)
    assert [(item.sample_id, item.reason) for item in index.rejected] == [
        ("system", "chat template"), ("special", "chat template"),
    ]  # fmt: skip
    assert "no system, please" in index.rejected[0].message
    other = load_length_index(source, tokenizer, geometry)
    assert other.file != index.file and len(other.rejected) == 1
    (tmp_path / "hiding.jinja").write_text(hiding)
    with pytest.raises(TemplateError, match="Mark them in the template"):
        hidden = load_tokenizer(folders["chatml"], str(tmp_path / "hiding.jinja"))
        encode_conversation([Turn("human", "hi"), Turn("gpt", "x")], hidden, [], 900)


@pytest.mark.parametrize("family", ["chatml", "instella", "llama3", "mistral"])
def test_checkpoints_and_exports_carry_the_template(tmp_path: Path, folders: dict[str, Path], family: str) -> None:
    import torch

    from checkpoint_convert.huggingface.llava_next import write_configs
    from checkpoint_convert.huggingface.tokenizer import import_tokenizer
    from megatron_vlm.training.checkpoint.destination import destination_of

    source = folders["chatml" if family == "instella" else family]
    destination_of(str(tmp_path)).keep_tokenizer(source, "instella" if family == "instella" else "auto")
    kept = load_tokenizer(tmp_path / "tokenizer")
    assert (kept.chat_template is None) == (family == "instella")
    model = tiny_model()
    model.image_token_index, model.language.vocab_size = len(kept), len(kept) + 10
    (tmp_path / "exported").mkdir()
    write_configs(tmp_path / "exported", model, kept, torch.float32)
    assert (tmp_path / "exported" / "chat_template.jinja").read_text() == FAMILIES[family][0]
    back = import_tokenizer(tmp_path / "exported", tmp_path / "imported")
    turns, lengths = TALKS["several turns"]
    a, b = (encode_conversation(turns, tokenizer, lengths, len(kept)) for tokenizer in (back, kept))
    assert (a.ids.tolist(), a.labels.tolist()) == (b.ids.tolist(), b.labels.tolist())
    stock = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert stock.apply_chat_template(expanded(turns, lengths), return_dict=True)["input_ids"] == a.ids.tolist()
