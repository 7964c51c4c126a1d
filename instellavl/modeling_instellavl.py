"""Instella-VL in transformers: its CLIP tower and OLMo decoder, with an MLP projector between them.

ids with -200 for each image, tiles of the images
  └─ tiles ─ tower (hidden state of the last layer but one, class token dropped) ─ projector ─ unpad, newlines ─┐
     ids ─ embedding ───────────────────────────────────────── features in the place of -200 ────────────────┴─ OLMo
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionModel, OlmoForCausalLM, OlmoModel, OlmoPreTrainedModel

from .configuration_instellavl import InstellaVLConfig
from .constants import IMAGE_TOKEN_INDEX
from .image_processing_instellavl import InstellaVLImageProcessor, feature_order, select_grid

Images = torch.Tensor | Sequence[torch.Tensor] | None


class InstellaVLVisionTower(nn.Module):
    """CLIP's tower, built from the config alone: nothing is downloaded."""

    def __init__(self, config: InstellaVLConfig) -> None:
        super().__init__()
        self.vision_tower = CLIPVisionModel(config.vision_config)
        self.select_layer = config.mm_vision_select_layer
        self.image_processor = InstellaVLImageProcessor.of(config)

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """[t, 3, P, P] of any dtype, on any device -> [t, patches, C] with the tower's dtype and device."""
        weight = self.vision_tower.get_input_embeddings().weight
        outputs = self.vision_tower(tiles.to(weight), output_hidden_states=True)
        return outputs.hidden_states[self.select_layer][:, 1:]


class InstellaVLModel(OlmoModel):
    """The decoder without its head, the tower, the projector, and the newline between rows of patches."""

    config_class = InstellaVLConfig

    def __init__(self, config: InstellaVLConfig) -> None:
        super().__init__(config)
        self.vision_tower = InstellaVLVisionTower(config)
        self.mm_projector = nn.Sequential(
            nn.Linear(config.vision_config.hidden_size, config.hidden_size),
            nn.GELU(),
            nn.Linear(config.hidden_size, config.hidden_size),
        )
        self.image_newline = nn.Parameter(torch.empty(config.hidden_size))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            nn.init.normal_(self.image_newline, std=self.config.hidden_size**-0.5)

    def image_features(self, images: Sequence[torch.Tensor], sizes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
        """The embeddings of each image's tokens: for n images, n tensors [image tokens, H].

        Args:
            images: [t, 3, P, P] each.
            sizes: (width, height) each.
        """
        if not images:
            return []
        features = self.mm_projector(self.vision_tower(torch.cat(list(images))))
        parts = features.split([len(tiles) for tiles in images])
        return [
            torch.cat([part.flatten(0, 1), self.image_newline[None]])[feature_order(size, self.config)]
            for part, size in zip(parts, sizes, strict=True)
        ]


class InstellaVLForCausalLM(OlmoForCausalLM):
    """The whole model. See `generate`."""

    config_class = InstellaVLConfig

    returns_prompt = False
    """Whether `generate` returns the prompt before the answer; `instellavl.model.builder` sets it."""

    def __init__(self, config: InstellaVLConfig) -> None:
        OlmoPreTrainedModel.__init__(self, config)  # OlmoForCausalLM's would build an unused decoder
        self.model = InstellaVLModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_vision_tower(self) -> InstellaVLVisionTower:
        """The tower; its `image_processor` tiles images as in training."""
        return self.model.vision_tower

    def to(self, *args: Any, **kwargs: Any) -> InstellaVLForCausalLM:
        """As nn.Module's. A model quantized in 8 bits cannot be moved; moving it to its own device does nothing."""
        here = args and not kwargs and isinstance(args[0], str | torch.device | int)
        if getattr(self, "is_loaded_in_8bit", False) and here and torch.device(args[0]).type == self.device.type:
            return self
        return super().to(*args, **kwargs)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        images: Images = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As OlmoForCausalLM; with images, logits have a position for each image token, and prompts are left-padded.

        Raises:
            ValueError: labels together with images (this class does not train), or as in `embed_prompts`.
        """
        if input_ids is not None and (images is not None or bool((input_ids == IMAGE_TOKEN_INDEX).any())):
            if kwargs.get("labels") is not None:
                raise ValueError("labels with images: this class only generates and scores; train with megatron-vlm")
            kwargs["inputs_embeds"], attention_mask = self.embed_prompts(input_ids, images, image_sizes, attention_mask)
            if kwargs.get("position_ids") is None:
                kwargs["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
            input_ids = None
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        images: Images = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        modalities: Sequence[str] | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate answers to one prompt or a batch; each answer is the same as without the other prompts.

        Args:
            inputs: [B, L] ids, -200 for each image; shorter prompts are padded on either side. Also as `input_ids`.
            images: tiles of all images, in the order of the prompts: [n, t, 3, P, P] or n tensors [t, 3, P, P]; for a
                single image also [t, 3, P, P]. Any dtype, any device.
            image_sizes: (width, height) of each image before tiling.
            modalities: accepted, but only image and text.
            attention_mask: [B, L]; by default masks the padding ids at the ends of each prompt.
            **kwargs: transformers' own.

        Returns:
            New ids [B, N], shorter answers padded; if `returns_prompt` is set, after `inputs`. With
            return_dict_in_generate, transformers' output with these as its `sequences`.

        Raises:
            ValueError: images do not match the prompts or their sizes; video; inputs_embeds.
        """
        inputs = kwargs.pop("input_ids", None) if inputs is None else inputs
        if inputs is None or kwargs.get("inputs_embeds") is not None:
            raise ValueError("generate needs a prompt as ids (inputs), not as inputs_embeds")
        unknown = sorted(set(modalities or ()) - {"image", "text"})
        if unknown:
            raise ValueError(f"modalities {', '.join(unknown)}: this model reads images and text only")
        embeds, mask = self.embed_prompts(inputs, images, image_sizes, attention_mask)
        outputs = super().generate(inputs_embeds=embeds, attention_mask=mask, **kwargs)
        new = outputs if isinstance(outputs, torch.Tensor) else outputs.sequences
        if not self.returns_prompt:
            return outputs
        prompts = inputs.to(new.device).repeat_interleave(len(new) // len(inputs), dim=0)
        sequences = torch.cat([prompts, new], dim=1)
        if isinstance(outputs, torch.Tensor):
            return sequences
        outputs.sequences = sequences
        return outputs

    def embed_prompts(
        self,
        input_ids: torch.Tensor,
        images: Images,
        image_sizes: Sequence[tuple[int, int]] | None,
        attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of prompts with an image's features for each -200, left-padded.

        Returns:
            Embeddings [B, S, H] and their attention mask [B, S].

        Raises:
            ValueError: the number of images is not that of -200 in the prompts, or tiles do not match image_sizes.
        """
        device = self.model.embed_tokens.weight.device
        input_ids = input_ids.to(device)
        mask = attention_mask
        kept = _not_padding(input_ids, self._padding_id()) if mask is None else mask.to(device).bool()
        prompts = [row[keep] for row, keep in zip(input_ids, kept, strict=True)]
        counts = [int((prompt == IMAGE_TOKEN_INDEX).sum()) for prompt in prompts]
        tiles, sizes = self._tiles_of(images, image_sizes)
        if sum(counts) != len(tiles):
            raise ValueError(
                f"{sum(counts)} placeholders for images in the prompts ({', '.join(map(str, counts))}) and "
                f"{len(tiles)} images: every image needs one <image> in a prompt, and every <image> an image"
            )
        features = iter(self.model.image_features(tiles, sizes))
        rows = []
        for prompt in prompts:
            embedded = self.model.embed_tokens(prompt.clamp(min=0))
            placeholders = (prompt == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist()
            starts, ends = [0, *(index + 1 for index in placeholders)], [*placeholders, len(prompt)]
            parts = [embedded[starts[0] : ends[0]]]
            for start, end in zip(starts[1:], ends[1:], strict=True):
                parts += [next(features).to(embedded), embedded[start:end]]
            rows.append(torch.cat(parts))
        longest = max(map(len, rows))
        embeds = torch.stack([nn.functional.pad(row, (0, 0, longest - len(row), 0)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows], device=device)
        mask = torch.arange(longest, device=device) >= longest - lengths[:, None]
        return embeds, mask.long()

    def _padding_id(self) -> int | None:
        return self.generation_config.pad_token_id if self.config.pad_token_id is None else self.config.pad_token_id

    def _tiles_of(
        self, images: Images, image_sizes: Sequence[tuple[int, int]] | None
    ) -> tuple[list[torch.Tensor], list[tuple[int, int]]]:
        """The tiles [t, 3, P, P] of each image, without padding, and its size."""
        if images is None or len(images) == 0:
            return [], []
        if image_sizes is None:
            raise ValueError("image_sizes is missing: (width, height) of each image gives the order of its tiles")
        sizes = [(int(width), int(height)) for width, height in image_sizes]
        config = self.config
        side, anyres = config.vision_config.image_size, config.image_aspect_ratio == "anyres"
        if isinstance(images, torch.Tensor) and images.dim() == 4:
            images = images[None] if anyres else images[:, None]
        if len(images) != len(sizes):
            raise ValueError(f"{len(images)} images and {len(sizes)} image_sizes")
        tiles = []
        for number, (image, size) in enumerate(zip(images, sizes, strict=True)):
            width, height = select_grid(size, config.image_grid_pinpoints)
            wanted = 1 + (width // side) * (height // side) if anyres else 1
            padding = image[wanted:]
            if image.dim() != 4 or image.shape[1:] != (3, side, side) or len(image) < wanted or bool(padding.any()):
                raise ValueError(
                    f"image {number} of {size[0]} x {size[1]} pixels comes as a tensor {list(image.shape)}; "
                    f"the model's image processor gives {[wanted, 3, side, side]}. Was the size taken before the image "
                    "was rotated or scaled?"
                )
            tiles.append(image[:wanted])
        devices = {tile.device for tile in tiles}
        return (tiles if len(devices) == 1 else [tile.cpu() for tile in tiles]), sizes


def _not_padding(input_ids: torch.Tensor, pad: int | None) -> torch.Tensor:
    """[B, L] bool: False for the padding at both ends of each row; a padding id between other tokens is text."""
    if pad is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    text = (input_ids != pad).int()
    before, after = text.cumsum(1) > 0, text.flip(1).cumsum(1).flip(1) > 0
    return before & after
