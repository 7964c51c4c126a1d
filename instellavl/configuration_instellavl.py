"""The config of an Instella-VL model: OLMo's fields, the vision tower's config, and how images are tiled."""

from __future__ import annotations

from typing import Any

from transformers import CLIPVisionConfig, OlmoConfig

from .constants import CLIP_MEAN, CLIP_STD

VIT_L_14_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "layer_norm_eps": 1e-5,
    "hidden_act": "quick_gelu",
}
"""The tower of a config without vision_config (openai/clip-vit-large-patch14-336)."""
PINPOINTS = [
    [336, 336], [336, 672], [336, 1008], [336, 1344], [336, 1680],
    [672, 336], [672, 672], [1008, 336], [1344, 336], [1680, 336],
]  # fmt: skip
MERGE_TYPES = {"anyres": "spatial_unpad", "square": "flat", "pad": "flat"}
"""image_aspect_ratio -> mm_patch_merge_type, which orders the features of the tiles."""


class InstellaVLConfig(OlmoConfig):
    """OlmoConfig with the fields below; the other fields of an export only record the published training and are kept.

    Args:
        vision_config: a CLIPVisionConfig or its fields; by default ViT-L/14-336.
        mm_vision_select_layer: index of the tower's hidden state that gives the features; -2: the last layer but one.
        image_aspect_ratio: anyres (base view and tiles), square or pad (one tile).
        mm_patch_merge_type: spatial_unpad with anyres, flat with the others.
        image_grid_pinpoints: resolutions for tiling, (width, height).
        image_mean, image_std: of red, green and blue, between 0 and 1.
        tokenizer_model_max_length: tokens of the trained context.

    Raises:
        ValueError: image_aspect_ratio and mm_patch_merge_type are not a supported pair.
    """

    model_type = "instellavl"
    sub_configs = {"vision_config": CLIPVisionConfig}

    def __init__(
        self,
        vision_config: CLIPVisionConfig | dict[str, Any] | None = None,
        mm_vision_select_layer: int = -2,
        image_aspect_ratio: str = "anyres",
        mm_patch_merge_type: str = "spatial_unpad",
        image_grid_pinpoints: list[list[int]] | None = None,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        tokenizer_model_max_length: int = 32768,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(vision_config, CLIPVisionConfig):
            vision_config = CLIPVisionConfig(**(vision_config or VIT_L_14_336))
        if MERGE_TYPES.get(image_aspect_ratio) != mm_patch_merge_type:
            raise ValueError(
                f"image_aspect_ratio is {image_aspect_ratio!r} and mm_patch_merge_type {mm_patch_merge_type!r}; "
                f"supported: {', '.join(f'{ratio} with {merge}' for ratio, merge in MERGE_TYPES.items())}"
            )
        self.vision_config: CLIPVisionConfig = vision_config
        self.mm_vision_select_layer = mm_vision_select_layer
        self.image_aspect_ratio = image_aspect_ratio
        self.mm_patch_merge_type = mm_patch_merge_type
        self.image_grid_pinpoints = [list(point) for point in image_grid_pinpoints or PINPOINTS]
        self.image_mean = list(image_mean or CLIP_MEAN)
        self.image_std = list(image_std or CLIP_STD)
        self.tokenizer_model_max_length = tokenizer_model_max_length
