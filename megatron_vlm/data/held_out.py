"""A share of the training data, held out for validation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from megatron_vlm.data.dataset import MixtureDataset
from megatron_vlm.data.sources.mixture import Mixture
from megatron_vlm.data.sources.mixture_file import SamplingRule


def hold_out(dataset: MixtureDataset, share: float) -> tuple[MixtureDataset, MixtureDataset]:
    """Split the usable samples of each source: (those to train on, `share` of them, at least one if there are two).

    The choice depends on the samples' positions in their source alone, so that it stays when seed or mixture change.
    """
    sources = dataset.mixture.sources
    held = np.zeros(len(dataset.usable), bool)
    for start, source in zip(sources.starts[:-1].tolist(), sources.sources, strict=True):
        usable = start + np.flatnonzero(dataset.usable[start : start + len(source)])
        number = max(1, round(share * len(usable))) if len(usable) > 1 else 0
        held[np.random.default_rng(len(source)).permutation(usable)[:number]] = True
    every = Mixture(sources, [(index, SamplingRule()) for index in range(len(sources.sources))])
    counts = {**dataset.counts, "usable": int((dataset.usable & ~held).sum()), "held_out": int(held.sum())}
    training = replace(dataset, usable=dataset.usable & ~held, counts=counts)
    return training, replace(dataset, usable=held, mixture=every)
