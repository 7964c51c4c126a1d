"""`--model_args` of lmms-eval as settings of the engine."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from megatron_vlm.config import InferenceConfig

_PUBLISHED = (
    "attn_implementation",
    "customized_config",
    "device_map",
    "max_frames_num",
    "mm_spatial_pool_mode",
    "mm_spatial_pool_stride",
    "model_name",
    "token_strategy",
    "truncate_context",
    "use_cache",
    "video_decode_backend",
)
"""Arguments of the published plug-in that have no meaning here; they are accepted, so that its commands run."""


def engine_config(model_args: Mapping[str, Any], batch_size: int | str) -> InferenceConfig:
    """The engine's settings.

    Args:
        model_args: conv_template, those of the published plug-in, and all fields of InferenceConfig.
        batch_size: requests in the running batch; 1 and auto leave InferenceConfig's default, because answers do not
            depend on the batch.

    Raises:
        ValueError: an unknown argument, or a conversation template other than instella.
    """
    settings = {field.name: field for field in dataclasses.fields(InferenceConfig)}
    unknown = sorted(set(model_args) - {*settings, *_PUBLISHED, "conv_template"})
    if unknown:
        raise ValueError(
            f"model_args has {', '.join(unknown)}, which the model instellavl does not take. It takes pretrained, "
            f"conv_template, {', '.join(settings)}"
        )
    template = model_args.get("conv_template", "instella")
    if template != "instella":
        raise ValueError(f"conv_template is {template!r}: models of this project are trained with instella only")
    if ignored := sorted({*model_args} & {*_PUBLISHED} - {"model_name"}):
        logging.getLogger(__name__).warning("without an effect in model_args: %s", ", ".join(ignored))
    config = InferenceConfig()
    if str(batch_size).isdecimal() and int(batch_size) > 1:
        config.inference_max_requests = int(batch_size)
    for name in settings.keys() & model_args.keys():
        setattr(config, name, type(getattr(config, name))(model_args[name]))
    return config
