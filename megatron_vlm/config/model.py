"""What the model is: the vision tower, the projector and the language model, in transformers' own names."""

from __future__ import annotations

from dataclasses import dataclass, field

COLOURS = {
    "openai_clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "imagenet_standard": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Mean and standard deviation of red, green and blue, under transformers' names for them."""


@dataclass
class VisionConfig:
    """A CLIP- or SigLIP-like tower. The defaults are CLIP ViT-L/14-336."""

    model_type: str = field(
        default="clip_vision_model",
        metadata={"choices": ("clip_vision_model", "siglip_vision_model"), "help": "the family"},
    )
    hidden_size: int = field(default=1024, metadata={"help": "width of the tower"})
    intermediate_size: int = field(default=4096, metadata={"help": "width inside the MLP"})
    num_hidden_layers: int = field(default=24, metadata={"help": "layers in the published tower, unused ones included"})
    num_attention_heads: int = field(default=16, metadata={"help": "attention heads"})
    image_size: int = field(default=336, metadata={"help": "side of a square tile, pixels"})
    patch_size: int = field(default=14, metadata={"help": "side of a patch, pixels; divides image_size"})
    layer_norm_eps: float = field(default=1e-5, metadata={"help": "epsilon of the layer norms"})
    hidden_act: str = field(
        default="quick_gelu",
        metadata={"choices": ("quick_gelu", "gelu", "gelu_pytorch_tanh"), "help": "activation"},
    )
    class_token: bool = field(default=True, metadata={"help": "a learned token stands before the patches (CLIP)"})
    pre_norm: bool = field(default=True, metadata={"help": "the embeddings are normed before the first layer (CLIP)"})
    patch_bias: bool = field(default=False, metadata={"help": "the patch embedding has a bias (SigLIP)"})
    pooling_head: bool = field(default=False, metadata={"help": "the published tower has a head, unused here (SigLIP)"})
    image_normalization: str = field(
        default="openai_clip",
        metadata={"choices": ("openai_clip", "imagenet_standard"), "help": "of colours"},
    )
    vision_feature_layer: int = field(
        default=-2, metadata={"help": "which hidden state is the feature: -2 is the output of the last layer but one"}
    )

    @property
    def image_mean(self) -> tuple[float, float, float]:
        """Subtracted from pixels in 0..1; red, green, blue."""
        return COLOURS[self.image_normalization][0]

    @property
    def image_std(self) -> tuple[float, float, float]:
        """What the difference is divided by."""
        return COLOURS[self.image_normalization][1]

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def patches_per_tile(self) -> int:
        """Features a tile gives; the class token is dropped."""
        return self.grid * self.grid

    @property
    def tokens_per_tile(self) -> int:
        """Tokens a tile has inside the tower."""
        return self.patches_per_tile + int(self.class_token)

    @property
    def num_layers_used(self) -> int:
        """Layers whose output can reach the feature: 23 of CLIP-L's 24."""
        return self.num_hidden_layers + 1 + self.vision_feature_layer


@dataclass
class LanguageConfig:
    """A decoder of the Llama shape. The defaults are AMD-OLMo-1B with the trained context of Instella-VL-1B."""

    model_type: str = field(
        default="olmo",
        metadata={"choices": ("olmo", "llama", "mistral", "qwen2"), "help": "transformers' name of the family"},
    )
    hidden_size: int = field(default=2048, metadata={"help": "width of the decoder"})
    intermediate_size: int = field(default=8192, metadata={"help": "width inside the SwiGLU"})
    num_hidden_layers: int = field(default=16, metadata={"help": "layers"})
    num_attention_heads: int = field(default=16, metadata={"help": "query heads"})
    num_key_value_heads: int = field(default=16, metadata={"help": "key and value heads; divides num_attention_heads"})
    head_dim: int | None = field(
        default=None, metadata={"help": "width of a head; by default hidden_size / num_attention_heads"}
    )
    attention_bias: bool = field(default=False, metadata={"help": "query, key and value have biases (Qwen2)"})
    vocab_size: int = field(default=50304, metadata={"help": "rows of the embedding"})
    rope_theta: float = field(default=10000.0, metadata={"help": "base of the rotary embedding"})
    normalization: str = field(
        default="LayerNorm",
        metadata={"choices": ("LayerNorm", "RMSNorm"), "help": "LayerNorm has no parameters here"},
    )
    layer_norm_eps: float = field(default=1e-5, metadata={"help": "epsilon of the norms"})
    tie_word_embeddings: bool = field(default=True, metadata={"help": "input and output embedding are one tensor"})
    max_position_embeddings: int = field(default=32768, metadata={"help": "the trained context"})

    @property
    def head_width(self) -> int:
        """Width of a head, whether it is said or follows from the sizes."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


@dataclass
class ModelConfig:
    """The whole model."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    image_token_index: int = field(
        default=50280, metadata={"help": "id that reserves the positions of image features; not one of the tokenizer's"}
    )
    image_grid_pinpoints: list[list[int]] = field(
        default_factory=lambda: [
            [336, 336], [336, 672], [336, 1008], [336, 1344], [336, 1680],
            [672, 336], [672, 672], [1008, 336], [1344, 336], [1680, 336],
        ],
        metadata={"help": "resolutions images are tiled at: (width, height), multiples of image_size"},
    )  # fmt: skip
