"""Learning rate and weight decay of each model part, against torch's AdamW with a parameter group for each."""

from __future__ import annotations

import torch

from megatron_vlm.config import ParallelConfig
from tests.parallel.rows import make_row, tiny_recipe

RATES = {"vision": 1e-4, "projector": 3e-3, "language": 2e-3}
DECAYS = {"vision": 0.5, "projector": 0.0, "language": 0.1}


def test_each_part_has_its_own_rate_and_decay(one_process: None) -> None:
    from megatron_vlm.model.build import build_model
    from megatron_vlm.model.initialize import initialize_weights
    from megatron_vlm.training.finite_update import update
    from megatron_vlm.training.optimizer import build_optimizer, build_schedule, wrap_for_data_parallel
    from megatron_vlm.training.step import forward_backward

    settings = {f"{part}_lr": rate for part, rate in RATES.items() if part != "projector"}
    settings |= {f"{part}_weight_decay": decay for part, decay in DECAYS.items() if part != "language"}
    recipe = tiny_recipe(ParallelConfig(use_distributed_optimizer=False), weight_decay=0.1, clip_grad=0.0, **settings)
    recipe.training.lr = RATES["projector"]
    chunks = build_model(recipe)
    initialize_weights(chunks, recipe)
    wrapped = wrap_for_data_parallel(chunks, recipe)
    optimizer = build_optimizer(wrapped, recipe)
    schedule = build_schedule(optimizer, recipe)

    copies = {p: p.detach().clone().requires_grad_() for p in chunks[0].parameters()}
    groups = [
        {"params": [copies[p]], "lr": RATES[part], "weight_decay": DECAYS[part] if p.ndim > 1 else 0.0}
        for part, parameters in chunks[0].parts().items()
        for p in parameters
    ]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=recipe.training.adam_eps)
    for step in range(2):
        rows = [make_row(8 * step + index) for index in range(8)]
        forward_backward(wrapped, [iter(rows)], recipe)
        for parameter, copy in copies.items():
            copy.grad = parameter.main_grad.clone()
        update(optimizer)
        schedule.step(1)
        reference.step()
    for name, parameter in chunks[0].named_parameters():
        assert torch.allclose(parameter, copies[parameter], rtol=1e-5, atol=1e-7), name
