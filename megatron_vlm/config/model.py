"""Settings of the model: vision tower, projector and language model, under transformers' names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

ImageNormalization = Literal["openai_clip", "imagenet_standard"]
IMAGE_MEAN_STD: dict[ImageNormalization, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "openai_clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "imagenet_standard": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""(image_mean, image_std) of red, green and blue, under transformers' names for them."""


@dataclass
class VisionConfig:
    """A CLIP or SigLIP vision tower. The defaults are CLIP ViT-L/14-336."""

    model_type: Literal["clip_vision_model", "siglip_vision_model"] = field(
        default="clip_vision_model", metadata={"help": "transformers' model type."}
    )
    hidden_size: int = field(default=1024, metadata={"help": "Hidden size."})
    intermediate_size: int = field(default=4096, metadata={"help": "Hidden size of the MLP."})
    num_hidden_layers: int = field(
        default=24, metadata={"help": "Layers of the published tower, including those after vision_feature_layer."}
    )
    num_attention_heads: int = field(default=16, metadata={"help": "Attention heads."})
    image_size: int = field(default=336, metadata={"help": "Side of a square tile, in pixels."})
    patch_size: int = field(default=14, metadata={"help": "Side of a square patch, in pixels."})
    layer_norm_eps: float = field(default=1e-5, metadata={"help": "Epsilon of the layer norms."})
    hidden_act: Literal["quick_gelu", "gelu", "gelu_pytorch_tanh"] = field(
        default="quick_gelu", metadata={"help": "Activation of the MLP."}
    )
    class_token: bool = field(default=True, metadata={"help": "Prepend a class token to the patches (CLIP)."})
    pre_norm: bool = field(default=True, metadata={"help": "Normalise the embeddings before the first layer (CLIP)."})
    patch_bias: bool = field(default=False, metadata={"help": "Give the patch embedding a bias (SigLIP)."})
    pooling_head: bool = field(
        default=False, metadata={"help": "The published tower has a pooling head, which is not used (SigLIP)."}
    )
    image_normalization: ImageNormalization = field(
        default="openai_clip", metadata={"help": "Mean and standard deviation that pixels are normalised with."}
    )
    vision_feature_layer: int = field(
        default=-2,
        metadata={"help": "Hidden state used as image features; -2 is the output of the second-to-last layer."},
    )

    @property
    def image_mean(self) -> tuple[float, float, float]:
        """Mean of red, green and blue, of pixels in 0..1."""
        return IMAGE_MEAN_STD[self.image_normalization][0]

    @property
    def image_std(self) -> tuple[float, float, float]:
        """Standard deviation of red, green and blue, of pixels in 0..1."""
        return IMAGE_MEAN_STD[self.image_normalization][1]

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def patches_per_tile(self) -> int:
        """Image features per tile; the class token is dropped."""
        return self.grid * self.grid

    @property
    def tokens_per_tile(self) -> int:
        """Sequence length of a tile inside the tower, class token included."""
        return self.patches_per_tile + int(self.class_token)

    @property
    def num_layers_used(self) -> int:
        """Layers up to `vision_feature_layer`: 23 of CLIP-L's 24."""
        return self.num_hidden_layers + 1 + self.vision_feature_layer


@dataclass
class LanguageConfig:
    """A Llama-style decoder. The defaults are AMD-OLMo-1B with the context length of Instella-VL-1B."""

    model_type: Literal["olmo", "llama", "mistral", "qwen2"] = field(
        default="olmo", metadata={"help": "transformers' model type."}
    )
    hidden_size: int = field(default=2048, metadata={"help": "Hidden size."})
    intermediate_size: int = field(default=8192, metadata={"help": "Hidden size of the SwiGLU MLP."})
    num_hidden_layers: int = field(default=16, metadata={"help": "Layers."})
    num_attention_heads: int = field(default=16, metadata={"help": "Query heads."})
    num_key_value_heads: int = field(
        default=16, metadata={"help": "Key and value heads; fewer than query heads is GQA."}
    )
    head_dim: int | None = field(
        default=None, metadata={"help": "Size of an attention head; default: hidden_size / num_attention_heads."}
    )
    attention_bias: bool = field(
        default=False, metadata={"help": "Give the query, key and value projections biases (Qwen2)."}
    )
    vocab_size: int = field(default=50304, metadata={"help": "Rows of the embedding, padding included."})
    rope_theta: float = field(default=10000.0, metadata={"help": "Base of the rotary embedding."})
    normalization: Literal["LayerNorm", "RMSNorm"] = field(
        default="LayerNorm", metadata={"help": "Norm; LayerNorm is OLMo's, without parameters."}
    )
    layer_norm_eps: float = field(default=1e-5, metadata={"help": "Epsilon of the norms."})
    tie_word_embeddings: bool = field(
        default=True, metadata={"help": "Share the weight of input and output embedding."}
    )
    max_position_embeddings: int = field(default=32768, metadata={"help": "Context length, in tokens."})

    @property
    def head_width(self) -> int:
        """Size of an attention head: `head_dim`, or hidden_size / num_attention_heads."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


@dataclass
class ModelConfig:
    """Vision tower, language model and what joins them."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    image_token_index: int = field(
        default=50280,
        metadata={"help": "Token id that image features replace; must not be one of the tokenizer's ids."},
    )
    image_grid_pinpoints: list[list[int]] = field(
        default_factory=lambda: [
            [336, 336], [336, 672], [336, 1008], [336, 1344], [336, 1680],
            [672, 336], [672, 672], [1008, 336], [1344, 336], [1680, 336],
        ],
        metadata={"help": "Resolutions (width x height, in pixels) that images are tiled at; multiples of image_size."},
    )  # fmt: skip
