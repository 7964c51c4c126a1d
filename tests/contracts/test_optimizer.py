"""What megatron-core builds its Adam with, bound to the constructors of Transformer Engine and Apex.

Where one of them is installed, megatron-core takes its FusedAdam, otherwise ours (runtime/fused_adam.py).
"""

from __future__ import annotations

from typing import Any

import pytest

from megatron_vlm.config import ParallelConfig
from megatron_vlm.runtime.fused_adam import FusedAdam
from tests.contracts import signatures
from tests.contracts.signatures import Published, with_signature
from tests.parallel.rows import tiny_recipe

PUBLISHED = (*signatures.TE_ADAM, *signatures.APEX_ADAM)


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda item: item.id)
def test_adam_is_built_as_published(one_process: None, monkeypatch: pytest.MonkeyPatch, published: Published) -> None:
    """AdamW with bias correction, and the recipe's numbers."""
    import megatron.core.optimizer as of_megatron

    from megatron_vlm.model.build import build_model
    from megatron_vlm.training.optimizer import build_optimizer, wrap_for_data_parallel

    built: list[dict[str, Any]] = []

    class Adam(FusedAdam):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            a = with_signature(published, lambda arguments: arguments)(self, *args, **kwargs)
            built.append(a)
            super().__init__(a["params"], lr=a["lr"], betas=a["betas"], eps=a["eps"], weight_decay=a["weight_decay"])

    monkeypatch.setattr(of_megatron, "Adam", Adam)
    recipe = tiny_recipe(ParallelConfig(), adam_beta1=0.8, adam_beta2=0.95, adam_eps=1e-6, weight_decay=0.1)
    build_optimizer(wrap_for_data_parallel(build_model(recipe), recipe), recipe)
    assert built
    for arguments in built:
        assert arguments["adam_w_mode"] and arguments["bias_correction"] and not arguments["amsgrad"]
        assert (arguments["betas"], arguments["eps"]) == ((0.8, 0.95), 1e-6)
        assert arguments["lr"] == recipe.training.lr
