"""Tensor names of Hugging Face files, translated to the one naming that param_map.py uses."""

from __future__ import annotations

import re
from typing import Literal

PART_PREFIXES = {
    "vision": ("vision_tower.",),
    "projector": ("multi_modal_projector.", "image_newline"),
    "language": ("language_model.",),
}
"""Each of megatron_vlm.config.PARTS -> prefixes of its tensor names in param_map.py."""

NameFormat = Literal["llava", "instellavl", "vision", "language", "projector", "peft"]
"""How a file names its tensors: a whole VLM as transformers' Llava classes or as `instellavl`, a single part, or
peft's adapter of a whole VLM or of its language model."""

# transformers 5 drops `vision_model.` from the tower, and both versions use other names in memory (`model.` in front,
# the head outside the language model) than on disk.
_LLAVA = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.(vision_tower|multi_modal_projector|image_newline)", r"\1"),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
)
# CLIPVisionModel of transformers 4, CLIPModel (text and vision tower in one file), or transformers 5; SigLIP alike.
_VISION = (
    (r"^vision_model\.", "vision_tower.vision_model."),
    (r"^(?=embeddings\.|pre_layrnorm\.|encoder\.|post_layernorm\.|head\.)", "vision_tower.vision_model."),
)
_LANGUAGE = ((r"^(?=model\.|lm_head\.)", "language_model."),)
# Prefix in param_map.py, prefix in an `instellavl` file.
_INSTELLAVL = (
    ("vision_tower.", "model.vision_tower.vision_tower."),
    ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ("image_newline", "model.image_newline"),
)
# As LLaVA saves it, from a plain model or one inside wrappers; or as transformers names it.
_PROJECTOR = (
    (r"^.*\bmm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"^.*\bmm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"^.*\b(multi_modal_projector\.|image_newline$)", r"\1"),
)
# peft's wrapper around a Llava class, or around the class of a language model or of `instellavl`.
_PEFT = ((r"^base_model\.model\.", ""), *_LLAVA, (r"^(?=model\.layers\.)", "language_model."))
_PATTERNS: dict[NameFormat, tuple[tuple[str, str], ...]] = {
    "llava": _LLAVA,
    "instellavl": (*((f"^{re.escape(theirs)}", ours) for ours, theirs in _INSTELLAVL), *_LANGUAGE),
    "vision": _VISION,
    "language": _LANGUAGE,
    "projector": _PROJECTOR,
    "peft": _PEFT,
}

# Present in such files but not used: the text tower of CLIP and SigLIP, and counters that older versions saved.
_IGNORED = re.compile(
    r"^(text_model\.|text_projection\.|visual_projection\.|logit_(scale|bias)$)|\.position_ids$|\.rotary_emb\.inv_freq$"
)


def canonical_name(name: str, format: NameFormat) -> str | None:
    """The name in param_map.py of tensor `name` in a file of this format; None: the tensor is not used."""
    if _IGNORED.search(name):
        return None
    for pattern, replacement in _PATTERNS[format]:
        name = re.sub(pattern, replacement, name)
    return name


def model_part(name: str) -> str | None:
    """The part of the model, one of PARTS, that a tensor of this name in param_map.py belongs to; None: no part."""
    return next((part for part, prefixes in PART_PREFIXES.items() if name.startswith(prefixes)), None)


def unused_name(buffer: str) -> str:
    """The Hugging Face name, inside `vision_model.`, of a buffer of megatron_vlm.model.unused_layers."""
    return buffer.replace("__", ".")


def instellavl_name(name: str) -> str:
    """The name in an `instellavl` file of the tensor that param_map.py calls `name`."""
    for ours, theirs in _INSTELLAVL:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name.removeprefix("language_model.")
