"""Document boundaries and groups of documents."""

from __future__ import annotations

import torch

from megatron_vlm.data.rows.document_layout import document_layout


def test_a_layout_for_a_variable_length_kernel_has_no_tensor_as_long_as_the_row() -> None:
    layout = document_layout([0, 5, 7, 12], causal=True, grouped=False)
    assert layout.cu_seqlens.tolist() == [0, 5, 7, 12] and layout.cu_seqlens.dtype == torch.int32
    assert (layout.max_seqlen, layout.groups, layout.restore) == (5, [], None)


def test_tiles_are_one_group_without_indices() -> None:
    """The tiles of a row are of equal length and side by side; a padding document is a group of its own."""
    layout = document_layout([0, 5, 10, 15, 16], causal=False, grouped=True)
    assert [(group.count, group.length, group.start) for group in layout.groups] == [(3, 5, 0), (1, 1, 15)]
    assert all(group.gather is group.real is None for group in layout.groups) and layout.restore is None


def test_groups_hold_every_token_once_and_restore_puts_them_back() -> None:
    layout = document_layout([0, 9, 39, 47, 48, 58, 60], causal=True, grouped=True)
    attended = []
    for group in layout.groups:
        size = group.count * group.length
        tokens = torch.arange(group.start, group.start + size) if group.gather is None else group.gather
        attended.append(tokens if group.real is None else tokens[group.real])
    row = torch.cat(attended)
    assert layout.restore is not None and len(layout.groups) == 4
    assert row[layout.restore].tolist() == list(range(60))
