"""What lmms-eval loads to find our models: the entry point of the group `lmms_eval.models`.

lmms-eval turns any exception here into "model not found", so this module imports nothing that can be missing.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """lmms-eval's ModelManifest of the model `instellavl`.

    The simple class is for tasks that score given answers, which lmms-eval does not offer to chat models: it takes that
    class with --force_simple.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="instellavl",
        chat_class_path="megatron_vlm.evaluation.lmms_model.InstellaVLChat",
        simple_class_path="megatron_vlm.evaluation.lmms_model.InstellaVL",
        aliases=("megatron_vlm",),
    )
