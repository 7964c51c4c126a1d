"""One pipeline stage of the vision-language model.

    this rank's tiles -> vision tower -> projector -> all-gather over TP x CP -.
    this rank's slice of tokens -> embedding -> merge image features <---------' -> language layers -> loss of the slice

The loader has put one image token into the row for every image feature, so the length of a row is final and no stage,
slice or shape depends on its images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlm.config import PARTS, Recipe
from megatron_vlm.data.rows.rank_batch import AnyBatch, RankBatch, rank_batch
from megatron_vlm.model.image_merge import encode_tiles, merge_image_features
from megatron_vlm.model.language import LanguageModel
from megatron_vlm.model.layers.attention_backend import choose_attention
from megatron_vlm.model.layers.linear_layers import linear_layers
from megatron_vlm.model.layers.lora import adapter_parameters, require_input_gradient
from megatron_vlm.model.layers.packed_sequence import PackedSequence, packed_sequence, rotary_tables
from megatron_vlm.model.projector import Projector
from megatron_vlm.model.rank_view import rank_view
from megatron_vlm.model.sharding import mark_tensor_parallel_weights
from megatron_vlm.model.vision import VisionTower, mark_as_replicated


class VisionLanguageModel(MegatronModule):
    """Vision tower, projector, image newline and language model; the first three are on the first stage."""

    def __init__(
        self,
        config: TransformerConfig,
        vision_config: TransformerConfig,
        vision_groups: ProcessGroupCollection,
        recipe: Recipe,
        *,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
    ) -> None:
        super().__init__(config=config)
        self.recipe = recipe
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.view = rank_view(recipe)
        kernel = choose_attention(recipe, "language").kernel
        self.language_model = LanguageModel(
            config,
            recipe.model.language,
            kernel,
            linear_layers(recipe),
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        # The pipeline schedule and the gradient finalizer read these from the outermost module.
        self.model_type = self.language_model.model_type
        self.share_embeddings_and_output_weights = self.language_model.share_embeddings_and_output_weights
        mark_tensor_parallel_weights(self.language_model)
        if pre_process:
            vision = recipe.model.vision
            self.vision_model = VisionTower(
                vision_config, vision, vision_groups, choose_attention(recipe, "vision").kernel
            )
            if recipe.parallel.vision_parallel == "tensor":
                mark_tensor_parallel_weights(self.vision_model)
            elif config.sequence_parallel:
                mark_as_replicated(self.vision_model)
            self.projector = Projector(config, vision.hidden_size)
            self.image_newline = torch.nn.Parameter(torch.empty(config.hidden_size, dtype=config.params_dtype))
            self.image_newline.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self._freeze(recipe.training.trainable)

    def parts(self) -> dict[str, list[torch.nn.Parameter]]:
        """Parameters of this stage by model part: the newline is the projector's, adapters are the language model's."""
        parts: dict[str, list[torch.nn.Parameter]] = {part: [] for part in PARTS}
        parts["language"] = list(self.language_model.parameters())
        if self.pre_process:
            parts["vision"] = list(self.vision_model.parameters())
            parts["projector"] = [*self.projector.parameters(), self.image_newline]
        return parts

    def _freeze(self, trainable: Sequence[str]) -> None:
        """Set requires_grad, before DDP wraps the model, and tag each parameter with its part for its learning rate."""
        for part, parameters in self.parts().items():
            for parameter in parameters:
                parameter.requires_grad = part in trainable
                setattr(parameter, f"is_{part}", True)
        for parameter in adapter_parameters(self.language_model):
            parameter.requires_grad = True

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        return self.language_model.shared_embedding_or_output_weight()

    def set_input_tensor(self, input_tensor: torch.Tensor | list[torch.Tensor]) -> None:
        self.language_model.set_input_tensor(input_tensor)

    def on_device(self, batch: AnyBatch) -> RankBatch:
        """This rank's part of a row, on the device of the weights.

        The loader's workers take the parts of a run's rows. A row that no loader has prepared is prepared here.
        """
        row = batch if isinstance(batch, RankBatch) else rank_batch(batch, self.view)
        return row.to(next(self.parameters()).device)

    def packed_sequence(self, batch: AnyBatch, cache: object = None) -> PackedSequence:
        """The document boundaries and rotary tables that every language layer needs for this row."""
        row, language = self.on_device(batch), self.recipe.model.language
        cos, sin = rotary_tables(row.positions, language.head_width, language.rope_theta)
        return packed_sequence(row.documents, cos=cos, sin=sin, cache=cache)

    def embed(self, batch: AnyBatch) -> torch.Tensor:
        """Embeddings of this rank's slice of the row, image features merged in: [s / tp, 1, H]."""
        row = self.on_device(batch)
        assert row.tokens is not None
        hidden = self.language_model.embed(row.tokens)
        frozen = "vision" not in self.recipe.training.trainable
        features = encode_tiles(self.vision_model, self.projector, row, self.view, tower_is_frozen=frozen)
        return require_input_gradient(merge_image_features(hidden, features, self.image_newline, row), self.recipe)

    def forward(self, batch: AnyBatch, cache: object = None, *, token_losses: bool = False) -> torch.Tensor:
        """Run this stage on a row.

        Args:
            batch: the whole row, or this rank's part of it.
            cache: a PagedKVCache during generation.
            token_losses: return the loss of each supervised token on the last stage, without gradients.

        Returns:
            The hidden states [s / tp, 1, H]; on the last stage, without a `cache`, the weighted sum of the losses of
            this context rank's supervised tokens (fp32 scalar), see data/rows/loss_weights.py; with `token_losses`, the
            [m] fp32 losses of these tokens.
        """
        row = self.on_device(batch)
        hidden = self.embed(row) if self.pre_process else None
        hidden = self.language_model.decode(hidden, self.packed_sequence(row, cache))
        if not self.post_process or cache is not None:
            return hidden
        assert row.supervised is not None and row.targets is not None
        if token_losses:
            return self.language_model.token_losses(hidden, row.supervised, row.targets)
        return self.language_model.loss(hidden, row.supervised, row.targets, row.token_weights)
