"""Spellings of the same tensor: every Hugging Face dialect is brought to the names of name_map.py."""

from __future__ import annotations

import re

# A whole VLM: transformers 5 drops `vision_model.` from the tower, and both versions call things otherwise in memory
# (`model.` in front, the head outside the language model) than on disk.
_WHOLE = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.(vision_tower|multi_modal_projector|image_newline)", r"\1"),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
)
# A tower alone: CLIPVisionModel of transformers 4, CLIPModel (the tower of a two-tower file), or transformers 5;
# SigLIP alike.
_TOWER = (
    (r"^vision_model\.", "vision_tower.vision_model."),
    (r"^(?=embeddings\.|pre_layrnorm\.|encoder\.|post_layernorm\.|head\.)", "vision_tower.vision_model."),
)
_LANGUAGE = ((r"^(?=model\.|lm_head\.)", "language_model."),)
# A whole VLM in the published layout: name in name_map.py, published name; both are prefixes.
_INSTELLAVL = (
    ("vision_tower.", "model.vision_tower.vision_tower."),
    ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ("image_newline", "model.image_newline"),
)

# A projector alone, as LLaVA saves it, from a plain model or one inside wrappers; or as transformers names it.
_PROJECTOR = (
    (r"^.*\bmm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"^.*\bmm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"^.*\b(multi_modal_projector\.|image_newline$)", r"\1"),
)

DIALECTS = {
    "whole": _WHOLE,
    "vision": _TOWER,
    "language": _LANGUAGE,
    "projector": _PROJECTOR,
    "instellavl": (*((f"^{re.escape(theirs)}", ours) for ours, theirs in _INSTELLAVL), *_LANGUAGE),
}

# In files of the kind and of no use to us: the text half of a two-tower model, and counters that older versions saved.
_IGNORED = re.compile(
    r"^(text_model\.|text_projection\.|visual_projection\.|logit_(scale|bias)$)|\.position_ids$|\.rotary_emb\.inv_freq$"
)


def canonical_name(name: str, dialect: str) -> str | None:
    """The name in name_map.py of tensor `name` in a file of a kind in DIALECTS; None: not needed."""
    if _IGNORED.search(name):
        return None
    for pattern, replacement in DIALECTS[dialect]:
        name = re.sub(pattern, replacement, name)
    return name


def unused_name(buffer: str) -> str:
    """The Hugging Face name, inside `vision_model.`, of a buffer of megatron_vlm.model.unused_layers."""
    return buffer.replace("__", ".")


def instellavl_name(name: str) -> str:
    """The name in the published layout of the tensor that name_map.py calls `name`."""
    for ours, theirs in _INSTELLAVL:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name.removeprefix("language_model.")
