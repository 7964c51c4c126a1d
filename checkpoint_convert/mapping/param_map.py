"""The name map: which Hugging Face tensors make up which Megatron tensor. One table serves both directions.

Hugging Face names are those of a `llava_next` file as transformers 4 writes it, which transformers 5, vLLM and SGLang
read too; names.py brings every other spelling to this one. Megatron tensors are whole: not sharded, one per layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from checkpoint_convert.errors import ConversionError, some_of
from checkpoint_convert.mapping.hf_names import unused_name
from checkpoint_convert.mapping.lazy_tensors import NamedTensors, StoredTensors, dtype_of, shape_of
from checkpoint_convert.mapping.transforms import Copy, InterleaveQKV, Rule, StackGateUp
from megatron_vlm.config import LanguageConfig, ModelConfig
from megatron_vlm.model.unused_layers import unused_shapes

VISION = "vision_tower.vision_model."
LANGUAGE = "language_model.model."
PROJECTOR = "multi_modal_projector."

_VISION_LAYER = "vision_model.decoder.layers.{layer}."
_HF_VISION_LAYER = VISION + "encoder.layers.{layer}."
_LANGUAGE_LAYER = "language_model.decoder.layers.{layer}."
_HF_LANGUAGE_LAYER = LANGUAGE + "layers.{layer}."

# Megatron name | Hugging Face name(s) | rule | shape(s) on the Hugging Face side, in the letters of _sizes.
# "copy" is the same tensor on both sides; "qkv" and "gate_up" are explained in rules.py.
_Row = tuple[str, tuple[str, ...], str, tuple[str, ...]]

_VISION_TABLE: tuple[_Row, ...] = (
    ("vision_model.patch_embedding.weight", (VISION + "embeddings.patch_embedding.weight",), "copy", ("C 3 p p",)),
    ("vision_model.position_embedding.weight", (VISION + "embeddings.position_embedding.weight",), "copy", ("N C",)),
)
_CLASS_TOKEN_TABLE: tuple[_Row, ...] = (
    ("vision_model.class_embedding", (VISION + "embeddings.class_embedding",), "copy", ("C",)),
)
_PATCH_BIAS_TABLE: tuple[_Row, ...] = (
    ("vision_model.patch_embedding.bias", (VISION + "embeddings.patch_embedding.bias",), "copy", ("C",)),
)
_PRE_NORM_TABLE: tuple[_Row, ...] = (
    ("vision_model.pre_norm.weight", (VISION + "pre_layrnorm.weight",), "copy", ("C",)),
    ("vision_model.pre_norm.bias", (VISION + "pre_layrnorm.bias",), "copy", ("C",)),
)
_VISION_LAYER_TABLE: tuple[_Row, ...] = (
    ("input_layernorm.weight", ("layer_norm1.weight",), "copy", ("C",)),
    ("input_layernorm.bias", ("layer_norm1.bias",), "copy", ("C",)),
    (
        "self_attention.linear_qkv.weight",
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        "qkv",
        ("C C", "C C", "C C"),
    ),
    (
        "self_attention.linear_qkv.bias",
        ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
        "qkv",
        ("C", "C", "C"),
    ),
    ("self_attention.linear_proj.weight", ("self_attn.out_proj.weight",), "copy", ("C C",)),
    ("self_attention.linear_proj.bias", ("self_attn.out_proj.bias",), "copy", ("C",)),
    ("pre_mlp_layernorm.weight", ("layer_norm2.weight",), "copy", ("C",)),
    ("pre_mlp_layernorm.bias", ("layer_norm2.bias",), "copy", ("C",)),
    ("mlp.linear_fc1.weight", ("mlp.fc1.weight",), "copy", ("F C",)),
    ("mlp.linear_fc1.bias", ("mlp.fc1.bias",), "copy", ("F",)),
    ("mlp.linear_fc2.weight", ("mlp.fc2.weight",), "copy", ("C F",)),
    ("mlp.linear_fc2.bias", ("mlp.fc2.bias",), "copy", ("C",)),
)
_PROJECTOR_TABLE: tuple[_Row, ...] = (
    ("projector.linear_1.weight", (PROJECTOR + "linear_1.weight",), "copy", ("H C",)),
    ("projector.linear_1.bias", (PROJECTOR + "linear_1.bias",), "copy", ("H",)),
    ("projector.linear_2.weight", (PROJECTOR + "linear_2.weight",), "copy", ("H H",)),
    ("projector.linear_2.bias", (PROJECTOR + "linear_2.bias",), "copy", ("H",)),
    ("image_newline", ("image_newline",), "copy", ("H",)),
)
_LANGUAGE_TABLE: tuple[_Row, ...] = (
    ("language_model.embedding.word_embeddings.weight", (LANGUAGE + "embed_tokens.weight",), "copy", ("V H",)),
)
_LANGUAGE_LAYER_TABLE: tuple[_Row, ...] = (
    (
        "self_attention.linear_qkv.weight",
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        "qkv",
        ("Q H", "K H", "K H"),
    ),
    ("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), "copy", ("H Q",)),
    ("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), "gate_up", ("I H", "I H")),
    ("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), "copy", ("H I",)),
)
_QKV_BIAS_LAYER_TABLE: tuple[_Row, ...] = (
    (
        "self_attention.linear_qkv.bias",
        ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
        "qkv",
        ("Q", "K", "K"),
    ),
)
_NORM_LAYER_TABLE: tuple[_Row, ...] = (
    ("input_layernorm.weight", ("input_layernorm.weight",), "copy", ("H",)),
    ("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",), "copy", ("H",)),
)
_FINAL_NORM_TABLE: tuple[_Row, ...] = (
    ("language_model.decoder.final_layernorm.weight", (LANGUAGE + "norm.weight",), "copy", ("H",)),
)
_OUTPUT_TABLE: tuple[_Row, ...] = (
    ("language_model.output_layer.weight", ("language_model.lm_head.weight",), "copy", ("V H",)),
)


@dataclass(frozen=True)
class Entry:
    """One Megatron tensor: its name, the Hugging Face tensors it is made of, their shapes, and how."""

    megatron: str
    hf: tuple[str, ...]
    rule: Rule
    hf_shapes: tuple[tuple[int, ...], ...]


def _sizes(model: ModelConfig) -> dict[str, int]:
    vision, language = model.vision, model.language
    return {
        "C": vision.hidden_size,
        "F": vision.intermediate_size,
        "N": vision.tokens_per_tile,
        "p": vision.patch_size,
        "H": language.hidden_size,
        "I": language.intermediate_size,
        "Q": language.num_attention_heads * language.head_width,
        "K": language.num_key_value_heads * language.head_width,
        "V": language.vocab_size,
        "3": 3,
    }


def _entries(
    table: Iterable[_Row],
    sizes: dict[str, int],
    rules: dict[str, Rule],
    megatron: str = "",
    hf: str = "",
    layers: int = 1,
) -> Iterator[Entry]:
    for layer in range(layers):
        for name, hf_names, rule, shapes in table:
            yield Entry(
                megatron=megatron.format(layer=layer) + name,
                hf=tuple(hf.format(layer=layer) + hf_name for hf_name in hf_names),
                rule=rules[rule],
                hf_shapes=tuple(tuple(sizes[letter] for letter in shape.split()) for shape in shapes),
            )


def _language_layer_table(language: LanguageConfig) -> tuple[_Row, ...]:
    table = _LANGUAGE_LAYER_TABLE
    table += _QKV_BIAS_LAYER_TABLE if language.attention_bias else ()
    table += _NORM_LAYER_TABLE if language.normalization == "RMSNorm" else ()
    return table


def _tables_outside_layers(model: ModelConfig) -> tuple[_Row, ...]:
    vision, language = model.vision, model.language
    table = _VISION_TABLE + _PROJECTOR_TABLE + _LANGUAGE_TABLE
    table += _CLASS_TOKEN_TABLE if vision.class_token else ()
    table += _PATCH_BIAS_TABLE if vision.patch_bias else ()
    table += _PRE_NORM_TABLE if vision.pre_norm else ()
    table += _FINAL_NORM_TABLE if language.normalization == "RMSNorm" else ()
    table += () if language.tie_word_embeddings else _OUTPUT_TABLE
    return table


def name_map(model: ModelConfig) -> list[Entry]:
    """All entries of this model. Layers of the tower that no feature uses travel under their own names."""
    vision, language, sizes = model.vision, model.language, _sizes(model)
    common: dict[str, Rule] = {"copy": Copy(), "gate_up": StackGateUp()}
    vision_rules = common | {"qkv": InterleaveQKV(vision.num_attention_heads, vision.num_attention_heads)}
    language_rules = common | {"qkv": InterleaveQKV(language.num_attention_heads, language.num_key_value_heads)}
    return [
        *_entries(_tables_outside_layers(model), sizes, common),
        *_entries(
            _VISION_LAYER_TABLE, sizes, vision_rules, _VISION_LAYER, _HF_VISION_LAYER, layers=vision.num_layers_used
        ),
        *(
            Entry(f"vision_model.unused.{name}", (VISION + unused_name(name),), Copy(), (shape,))
            for name, shape in unused_shapes(vision).items()
        ),
        *_entries(
            _language_layer_table(language),
            sizes,
            language_rules,
            _LANGUAGE_LAYER,
            _HF_LANGUAGE_LAYER,
            layers=language.num_hidden_layers,
        ),
    ]


class MegatronTensors(NamedTensors):
    """Hugging Face tensors as Megatron's, each made when it is asked for. The last one made is kept: its parts are
    asked for one after the other."""

    _places: dict[str, Entry]

    def __init__(self, entries: list[Entry], tensors: Mapping[str, torch.Tensor], source: str) -> None:
        """`source` names the folder in errors. ConversionError: a tensor is missing, left over or misshapen."""
        _check(tensors, {name: shape for e in entries for name, shape in zip(e.hf, e.hf_shapes, strict=True)}, source)
        self._places, self._tensors = {entry.megatron: entry for entry in entries}, tensors
        self._last: tuple[str, torch.Tensor] | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        if self._last is None or self._last[0] != name:
            entry, self._last = self._places[name], None
            self._last = name, entry.rule.to_megatron([self._tensors[part] for part in entry.hf])
        return self._last[1]


class HuggingFaceTensors(StoredTensors):
    """Megatron tensors as Hugging Face's; the other way of MegatronTensors."""

    _places: dict[str, Entry]

    def __init__(self, entries: list[Entry], tensors: Mapping[str, torch.Tensor], source: str) -> None:
        _check(tensors, {entry.megatron: _megatron_shape(entry) for entry in entries}, source)
        self._places, self._tensors = {name: entry for entry in entries for name in entry.hf}, tensors
        self._last: tuple[str, list[torch.Tensor]] | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        entry = self._places[name]
        if self._last is None or self._last[0] != entry.megatron:
            self._last = None
            self._last = entry.megatron, entry.rule.to_hf(self._tensors[entry.megatron])
        return self._last[1][entry.hf.index(name)]

    def shape(self, name: str) -> tuple[int, ...]:
        entry = self._places[name]
        return entry.hf_shapes[entry.hf.index(name)]

    def dtype(self, name: str) -> torch.dtype:
        return dtype_of(self._tensors, self._places[name].megatron)


def to_megatron(
    entries: list[Entry], tensors: Mapping[str, torch.Tensor], source: str
) -> Iterable[tuple[str, torch.Tensor]]:
    """(Megatron name, tensor) for every entry, one at a time; errors, at once, as in MegatronTensors."""
    return MegatronTensors(entries, tensors, source).items()


def to_hf(entries: list[Entry], tensors: Mapping[str, torch.Tensor], source: str) -> Iterable[tuple[str, torch.Tensor]]:
    """(Hugging Face name, tensor) for every entry, one at a time; errors as in to_megatron."""
    return HuggingFaceTensors(entries, tensors, source).items()


def _megatron_shape(entry: Entry) -> tuple[int, ...]:
    """The rule's own answer, asked with tensors that have shapes and no memory."""
    made = entry.rule.to_megatron([torch.empty(shape, device="meta") for shape in entry.hf_shapes])
    return tuple(made.shape)


def _check(tensors: Mapping[str, torch.Tensor], expected: dict[str, tuple[int, ...]], source: str) -> None:
    missing = [name for name in expected if name not in tensors]
    extra = [name for name in tensors if name not in expected]
    shapes = [
        f"{name}: {shape_of(tensors, name)}, the config says {shape}"
        for name, shape in expected.items()
        if name in tensors and shape_of(tensors, name) != shape
    ]
    problems = [
        f"{title}:\n{some_of(names)}"
        for title, names in (
            ("tensors that are missing", missing),
            ("tensors that have no place in this model", extra),
            ("tensors of another shape", shapes),
        )
        if names
    ]
    if problems:
        raise ConversionError(f"{source} does not hold the model its config describes\n" + "\n".join(problems))
