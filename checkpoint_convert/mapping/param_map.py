"""The parameter map: which Hugging Face tensors make up which Megatron tensor. One table serves both directions.

Hugging Face names are those of a `llava_next` file as transformers 4 writes it, which transformers 5, vLLM and SGLang
also read; hf_names.py translates the names of other formats to these. Megatron tensors are unsharded, one per layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from checkpoint_convert.errors import ConversionError, some_of
from checkpoint_convert.mapping.hf_names import unused_name
from checkpoint_convert.mapping.lazy_tensors import NamedTensors, StoredTensors, dtype_of, shape_of
from checkpoint_convert.mapping.transforms import Copy, InterleaveQKV, StackGateUp, Transform
from megatron_vlm.config import LanguageConfig, ModelConfig
from megatron_vlm.model.unused_layers import unused_shapes

VISION = "vision_tower.vision_model."
LANGUAGE = "language_model.model."
PROJECTOR = "multi_modal_projector."

_VISION_LAYER = "vision_model.decoder.layers.{layer}."
_HF_VISION_LAYER = VISION + "encoder.layers.{layer}."
_LANGUAGE_LAYER = "language_model.decoder.layers.{layer}."
_HF_LANGUAGE_LAYER = LANGUAGE + "layers.{layer}."


class _Row(NamedTuple):
    """One Megatron tensor in a table below: names without the prefix of a layer, shapes in the letters of _sizes."""

    megatron: str
    hf: tuple[str, ...]
    transform: str
    hf_shapes: tuple[str, ...]


def _direct(megatron: str, hf: str, shape: str) -> _Row:
    """The same tensor on both sides."""
    return _Row(megatron, (hf,), "copy", (shape,))


def _qkv(kind: str, *, q: str, k: str, v: str) -> _Row:
    """The attention's input projection, "weight" or "bias"; q, k and v are shapes."""
    names = (f"self_attn.q_proj.{kind}", f"self_attn.k_proj.{kind}", f"self_attn.v_proj.{kind}")
    return _Row(f"self_attention.linear_qkv.{kind}", names, "qkv", (q, k, v))


def _gated_mlp(megatron: str, *, gate: str, up: str, shape: str) -> _Row:
    """The first linear of SwiGLU."""
    return _Row(megatron, (gate, up), "gate_up", (shape, shape))


_VISION_TABLE: tuple[_Row, ...] = (
    _direct("vision_model.patch_embedding.weight", VISION + "embeddings.patch_embedding.weight", "C 3 p p"),
    _direct("vision_model.position_embedding.weight", VISION + "embeddings.position_embedding.weight", "N C"),
)
_CLASS_TOKEN_TABLE: tuple[_Row, ...] = (
    _direct("vision_model.class_embedding", VISION + "embeddings.class_embedding", "C"),
)
_PATCH_BIAS_TABLE: tuple[_Row, ...] = (
    _direct("vision_model.patch_embedding.bias", VISION + "embeddings.patch_embedding.bias", "C"),
)
_PRE_NORM_TABLE: tuple[_Row, ...] = (
    _direct("vision_model.pre_norm.weight", VISION + "pre_layrnorm.weight", "C"),
    _direct("vision_model.pre_norm.bias", VISION + "pre_layrnorm.bias", "C"),
)
_VISION_LAYER_TABLE: tuple[_Row, ...] = (
    _direct("input_layernorm.weight", "layer_norm1.weight", "C"),
    _direct("input_layernorm.bias", "layer_norm1.bias", "C"),
    _qkv("weight", q="C C", k="C C", v="C C"),
    _qkv("bias", q="C", k="C", v="C"),
    _direct("self_attention.linear_proj.weight", "self_attn.out_proj.weight", "C C"),
    _direct("self_attention.linear_proj.bias", "self_attn.out_proj.bias", "C"),
    _direct("pre_mlp_layernorm.weight", "layer_norm2.weight", "C"),
    _direct("pre_mlp_layernorm.bias", "layer_norm2.bias", "C"),
    _direct("mlp.linear_fc1.weight", "mlp.fc1.weight", "F C"),
    _direct("mlp.linear_fc1.bias", "mlp.fc1.bias", "F"),
    _direct("mlp.linear_fc2.weight", "mlp.fc2.weight", "C F"),
    _direct("mlp.linear_fc2.bias", "mlp.fc2.bias", "C"),
)
_PROJECTOR_TABLE: tuple[_Row, ...] = (
    _direct("projector.linear_1.weight", PROJECTOR + "linear_1.weight", "H C"),
    _direct("projector.linear_1.bias", PROJECTOR + "linear_1.bias", "H"),
    _direct("projector.linear_2.weight", PROJECTOR + "linear_2.weight", "H H"),
    _direct("projector.linear_2.bias", PROJECTOR + "linear_2.bias", "H"),
    _direct("image_newline", "image_newline", "H"),
)
_LANGUAGE_TABLE: tuple[_Row, ...] = (
    _direct("language_model.embedding.word_embeddings.weight", LANGUAGE + "embed_tokens.weight", "V H"),
)
_LANGUAGE_LAYER_TABLE: tuple[_Row, ...] = (
    _qkv("weight", q="Q H", k="K H", v="K H"),
    _direct("self_attention.linear_proj.weight", "self_attn.o_proj.weight", "H Q"),
    _gated_mlp("mlp.linear_fc1.weight", gate="mlp.gate_proj.weight", up="mlp.up_proj.weight", shape="I H"),
    _direct("mlp.linear_fc2.weight", "mlp.down_proj.weight", "H I"),
)
_QKV_BIAS_LAYER_TABLE: tuple[_Row, ...] = (_qkv("bias", q="Q", k="K", v="K"),)
_NORM_LAYER_TABLE: tuple[_Row, ...] = (
    _direct("input_layernorm.weight", "input_layernorm.weight", "H"),
    _direct("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", "H"),
)
_FINAL_NORM_TABLE: tuple[_Row, ...] = (
    _direct("language_model.decoder.final_layernorm.weight", LANGUAGE + "norm.weight", "H"),
)
_OUTPUT_TABLE: tuple[_Row, ...] = (
    _direct("language_model.output_layer.weight", "language_model.lm_head.weight", "V H"),
)


@dataclass(frozen=True)
class Entry:
    """One Megatron tensor: its name, the names of the Hugging Face tensors that form it, how, and their shapes."""

    megatron: str
    hf: tuple[str, ...]
    transform: Transform
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
    transforms: dict[str, Transform],
    megatron: str = "",
    hf: str = "",
    layers: int = 1,
) -> Iterator[Entry]:
    for layer in range(layers):
        for row in table:
            yield Entry(
                megatron=megatron.format(layer=layer) + row.megatron,
                hf=tuple(hf.format(layer=layer) + name for name in row.hf),
                transform=transforms[row.transform],
                hf_shapes=tuple(tuple(sizes[letter] for letter in shape.split()) for shape in row.hf_shapes),
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


def param_map(model: ModelConfig) -> list[Entry]:
    """All entries of this model, those of the vision tower's unused layers included."""
    vision, language, sizes = model.vision, model.language, _sizes(model)
    common: dict[str, Transform] = {"copy": Copy(), "gate_up": StackGateUp()}
    of_vision = common | {"qkv": InterleaveQKV(vision.num_attention_heads, vision.num_attention_heads)}
    of_language = common | {"qkv": InterleaveQKV(language.num_attention_heads, language.num_key_value_heads)}
    return [
        *_entries(_tables_outside_layers(model), sizes, common),
        *_entries(
            _VISION_LAYER_TABLE, sizes, of_vision, _VISION_LAYER, _HF_VISION_LAYER, layers=vision.num_layers_used
        ),
        *(
            Entry(f"vision_model.unused.{name}", (VISION + unused_name(name),), Copy(), (shape,))
            for name, shape in unused_shapes(vision).items()
        ),
        *_entries(
            _language_layer_table(language),
            sizes,
            of_language,
            _LANGUAGE_LAYER,
            _HF_LANGUAGE_LAYER,
            layers=language.num_hidden_layers,
        ),
    ]


def hf_shapes(entries: Iterable[Entry]) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape, of all tensors of these entries."""
    return {name: shape for entry in entries for name, shape in zip(entry.hf, entry.hf_shapes, strict=True)}


class MegatronTensors(NamedTensors):
    """Hugging Face tensors as Megatron's, each computed when it is asked for.

    The last one is kept: the shards of a tensor are asked for one after the other.
    """

    _entries: dict[str, Entry]

    def __init__(self, entries: list[Entry], tensors: Mapping[str, torch.Tensor], source: str) -> None:
        """`source` names the folder in errors. ConversionError: a tensor is missing, unexpected or of another shape."""
        _check(tensors, hf_shapes(entries), source)
        self._entries, self._tensors = {entry.megatron: entry for entry in entries}, tensors
        self._last: tuple[str, torch.Tensor] | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        if self._last is None or self._last[0] != name:
            entry, self._last = self._entries[name], None
            self._last = name, entry.transform.to_megatron([self._tensors[part] for part in entry.hf])
        return self._last[1]


class HuggingFaceTensors(StoredTensors):
    """Megatron tensors as Hugging Face's: the reverse of MegatronTensors, with the same errors."""

    _entries: dict[str, Entry]

    def __init__(self, entries: list[Entry], tensors: Mapping[str, torch.Tensor], source: str) -> None:
        _check(tensors, {entry.megatron: _megatron_shape(entry) for entry in entries}, source)
        self._entries, self._tensors = {name: entry for entry in entries for name in entry.hf}, tensors
        self._last: tuple[str, list[torch.Tensor]] | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        entry = self._entries[name]
        if self._last is None or self._last[0] != entry.megatron:
            self._last = None
            self._last = entry.megatron, entry.transform.to_hf(self._tensors[entry.megatron])
        return self._last[1][entry.hf.index(name)]

    def shape(self, name: str) -> tuple[int, ...]:
        entry = self._entries[name]
        return entry.hf_shapes[entry.hf.index(name)]

    def dtype(self, name: str) -> torch.dtype:
        return dtype_of(self._tensors, self._entries[name].megatron)


def to_megatron(
    entries: list[Entry], tensors: Mapping[str, torch.Tensor], source: str
) -> Iterable[tuple[str, torch.Tensor]]:
    """(Megatron name, tensor) for every entry, one at a time; errors as in MegatronTensors, before the first one."""
    return MegatronTensors(entries, tensors, source).items()


def to_hf(entries: list[Entry], tensors: Mapping[str, torch.Tensor], source: str) -> Iterable[tuple[str, torch.Tensor]]:
    """(Hugging Face name, tensor) for every entry, one at a time; errors as in to_megatron."""
    return HuggingFaceTensors(entries, tensors, source).items()


def _megatron_shape(entry: Entry) -> tuple[int, ...]:
    """The shape that the transform gives, computed on the meta device."""
    tensor = entry.transform.to_megatron([torch.empty(shape, device="meta") for shape in entry.hf_shapes])
    return tuple(tensor.shape)


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
            ("missing tensors", missing),
            ("unexpected tensors", extra),
            ("tensors of another shape", shapes),
        )
        if names
    ]
    if problems:
        raise ConversionError(f"the tensors of {source} do not match its config\n" + "\n".join(problems))
