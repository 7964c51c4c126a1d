"""The language model: megatron-core's embedding and transformer block with our loss head."""

from __future__ import annotations

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import TransformerBlock, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlm.config import LanguageConfig
from megatron_vlm.model.layers.attention_kernels import Kernel
from megatron_vlm.model.layers.layer_spec import block_spec
from megatron_vlm.model.layers.linear_layers import LinearLayers
from megatron_vlm.model.layers.norm import LANGUAGE_NORMS
from megatron_vlm.model.layers.packed_sequence import PackedSequence
from megatron_vlm.model.loss import LossHead


class LanguageModel(LanguageModule):
    """One pipeline stage of a Llama-like decoder.

    GPTModel is deprecated in megatron-core 0.19 and its successor is absent in 0.16. This subclass works with both,
    takes image features as decoder input, and computes the loss without the logits of a whole row.
    """

    def __init__(
        self,
        config: TransformerConfig,
        language: LanguageConfig,
        kernel: Kernel,
        linears: LinearLayers,
        *,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
    ) -> None:
        super().__init__(config=config)
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = language.tie_word_embeddings
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config, language.vocab_size, language.max_position_embeddings, position_embedding_type="none"
            )
        layers = get_num_layers_to_build(config, vp_stage)
        self.decoder = TransformerBlock(
            config,
            block_spec(LANGUAGE_NORMS[language.normalization], layers, kernel, linears),
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        if post_process:
            tied_here = language.tie_word_embeddings and pre_process
            self.output_layer = LossHead(config, language.vocab_size, not tied_here, self.tp_group)
        self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: torch.Tensor | list[torch.Tensor]) -> None:
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids [s] of this context rank -> [s / tp, 1, H]; the embedding scatters over the tensor group."""
        return self.embedding(input_ids=tokens[None], position_ids=None)

    def decode(self, hidden: torch.Tensor | None, packed: PackedSequence) -> torch.Tensor:
        """Run this stage's layers on [s / tp, 1, H]; `hidden` is None where the schedule has set the input tensor."""
        return self.decoder(hidden, attention_mask=None, packed_seq_params=packed)

    def _tied_weight(self) -> torch.Tensor | None:
        return self.embedding.word_embeddings.weight if self.pre_process else None

    def loss(
        self,
        hidden: torch.Tensor,
        supervised: torch.Tensor,
        targets: torch.Tensor,
        token_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sum of the losses of this context rank's supervised tokens [n], which predict the targets [n].

        token_weights [n] say how much each counts (None: 1).
        """
        return self.output_layer(hidden, supervised, targets, self._tied_weight(), token_weights)

    def token_losses(self, hidden: torch.Tensor, supervised: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """[n] fp32 losses of this context rank's supervised tokens, without gradients; arguments as in `loss`."""
        return self.output_layer.token_losses(hidden, supervised, targets, self._tied_weight())

    def logits(self, hidden: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """fp32 logits [n, V] at the positions `where` [n] of this context rank's slice."""
        return self.output_layer.logits(hidden, where, self._tied_weight())
