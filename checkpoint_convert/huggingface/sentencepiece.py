"""Converts a sentencepiece model to a tokenizer.json, which stock transformers reads without sentencepiece."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models as fast_models

from checkpoint_convert.errors import ConversionError
from megatron_vlm.data.processing.tokenizer import Tokenizer

_UNIGRAM, _BPE = 1, 2  # sentencepiece_model.proto: TrainerSpec.ModelType
_CONTROL, _USER_DEFINED = 3, 4  # ModelProto.SentencePiece.Type
_SPACE = "▁"
"""U+2581, which stands for a space in sentencepiece's pieces."""
_PROBES = (
    "<|user|>\n",
    "\nWhat is it?\n<|assistant|>\n",
    "Two  spaces, a\ttab, ünïcödé, 12345 and 日本.",
    " leading and trailing ",
)
"""Texts that both tokenizers must give the same ids for: chat template, whitespace, other scripts."""


def tokenizer_json_of(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of a tokenizer.json that gives the same ids as `tokenizer`, a sentencepiece one.

    Raises ConversionError if the ids differ on one of a few probe texts, or the model is neither unigram nor BPE.
    """
    file = _model_file(tokenizer.path)
    proto = _read_proto(file)
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    unk, trainer = proto.trainer_spec.unk_id, proto.trainer_spec
    if trainer.model_type == _UNIGRAM:
        fast = FastTokenizer(fast_models.Unigram(pieces, unk_id=unk, byte_fallback=trainer.byte_fallback))
    elif trainer.model_type == _BPE:
        vocabulary = {piece: number for number, (piece, _) in enumerate(pieces)}
        fast = FastTokenizer(
            fast_models.BPE(
                vocabulary,
                _merges(pieces, vocabulary),
                unk_token=pieces[unk][0],
                fuse_unk=True,
                byte_fallback=trainer.byte_fallback,
            )
        )
    else:
        raise ConversionError(f"{file} is a word or character model; only unigram and BPE models can be exported")
    spec = proto.normalizer_spec
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        # spaces only: a newline at the end is part of the text
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if steps:
        fast.normalizer = normalizers.Sequence(steps)
    scheme = "always" if spec.add_dummy_prefix else "never"
    fast.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=scheme, split=False)
    fast.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", left=1)] if spec.add_dummy_prefix else []),
        ]
    )
    fast.add_special_tokens([AddedToken(p.piece, normalized=False) for p in proto.pieces if p.type == _CONTROL])
    fast.add_tokens([AddedToken(p.piece, normalized=False) for p in proto.pieces if p.type == _USER_DEFINED])
    for probe in _PROBES:
        if fast.encode(probe).ids != tokenizer.encode(probe):
            raise ConversionError(
                f"{file} cannot be exported: the converted tokenizer.json gives other ids, for example for {probe!r}"
            )
    definition: dict[str, Any] = json.loads(fast.to_str())
    return definition


def _model_file(path: Path) -> Path:
    return path if path.is_file() else next(iter(sorted(path.glob("*.model"))))


def _read_proto(file: Path) -> Any:
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise ConversionError(f"reading {file} needs the package protobuf: pip install protobuf") from error
    proto: Any = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(file.read_bytes())
    return proto


def _merges(pieces: list[tuple[str, float]], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """The merge list: sentencepiece merges the pair whose result has the best score first."""
    merges = []
    for piece, score in pieces:
        splits = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        merges += [(score, left, right) for left, right in splits if left in vocabulary and right in vocabulary]
    merges.sort(key=lambda merge: -merge[0])  # stable: pieces of one score keep their order
    return [(left, right) for _, left, right in merges]
