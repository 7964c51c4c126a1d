"""What the model is: the vision tower, the projector and the language model, in transformers' own names."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class VisionConfig:
    """A CLIP-like tower. The defaults are CLIP ViT-L/14-336."""

    hidden_size: int = field(default=1024, metadata={"help": "width of the tower"})
    intermediate_size: int = field(default=4096, metadata={"help": "width inside the MLP"})
    num_hidden_layers: int = field(default=24, metadata={"help": "layers in the published tower, unused ones included"})
    num_attention_heads: int = field(default=16, metadata={"help": "attention heads"})
    image_size: int = field(default=336, metadata={"help": "side of a square tile, pixels"})
    patch_size: int = field(default=14, metadata={"help": "side of a patch, pixels; divides image_size"})
    layer_norm_eps: float = field(default=1e-5, metadata={"help": "epsilon of the layer norms"})
    hidden_act: str = field(default="quick_gelu", metadata={"choices": ("quick_gelu", "gelu"), "help": "activation"})
    vision_feature_layer: int = field(
        default=-2, metadata={"help": "which hidden state is the feature: -2 is the output of the last layer but one"}
    )

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def patches_per_tile(self) -> int:
        """Features a tile gives; the class token is dropped."""
        return self.grid * self.grid

    @property
    def num_layers_used(self) -> int:
        """Layers whose output can reach the feature: 23 of CLIP-L's 24."""
        return self.num_hidden_layers + 1 + self.vision_feature_layer


@dataclass
class LanguageConfig:
    """An OLMo-1-like decoder. The defaults are AMD-OLMo-1B with the trained context of Instella-VL-1B."""

    hidden_size: int = field(default=2048, metadata={"help": "width of the decoder"})
    intermediate_size: int = field(default=8192, metadata={"help": "width inside the SwiGLU"})
    num_hidden_layers: int = field(default=16, metadata={"help": "layers"})
    num_attention_heads: int = field(default=16, metadata={"help": "query heads"})
    num_key_value_heads: int = field(default=16, metadata={"help": "key and value heads; divides num_attention_heads"})
    vocab_size: int = field(default=50304, metadata={"help": "rows of the embedding"})
    rope_theta: float = field(default=10000.0, metadata={"help": "base of the rotary embedding"})
    layer_norm_eps: float = field(default=1e-5, metadata={"help": "epsilon of the norms"})
    tie_word_embeddings: bool = field(default=True, metadata={"help": "input and output embedding are one tensor"})
    max_position_embeddings: int = field(default=32768, metadata={"help": "the trained context"})


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
