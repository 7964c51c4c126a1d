"""How other trainers share samples out to rows, each written plainly from its description.

All hold the same two budgets, tokens and image tiles, and return the rows in the order in which they would be trained
on. What is packed ahead of training is shuffled, as its users do; what is packed from a stream comes as it is packed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megatron_vlm.data.packing.epoch_plan import Budget

Rows = list[list[int]]
"""Positions in the arrays of lengths, row by row."""
Peer = Callable[[np.ndarray, np.ndarray, Budget, np.random.Generator], Rows]

KNAPSACK_BUFFER = 1000
"""Samples."""
OPEN_BINS = 8
_SWEEP = 256
"""Samples between two looks for rows that nothing fits into any more."""


def first_fit_decreasing(tokens: np.ndarray, tiles: np.ndarray, budget: Budget, rng: np.random.Generator) -> Rows:
    """From the longest sample to the shortest, each into the first row that has room for it.

    Johnson, "Near-optimal bin packing algorithms", 1973. Megatron-Bridge and LLaVA-OneVision-1.5 offer it.
    """
    return _decreasing(tokens, tiles, budget, rng, lambda fits, room: int(fits.argmax()))


def best_fit_decreasing(tokens: np.ndarray, tiles: np.ndarray, budget: Budget, rng: np.random.Generator) -> Rows:
    """From the longest sample to the shortest, each into the fullest row that has room for it.

    Johnson, 1973. ms-swift packs by it.
    """
    return _decreasing(
        tokens, tiles, budget, rng, lambda fits, room: int(np.where(fits, room, budget.seq_length + 1).argmin())
    )


def _decreasing(
    tokens: np.ndarray,
    tiles: np.ndarray,
    budget: Budget,
    rng: np.random.Generator,
    choose: Callable[[np.ndarray, np.ndarray], int],
) -> Rows:
    """`choose` picks one of the open rows from (whether a sample fits [open], room in tokens [open])."""
    shortest = int(tokens.min())
    rows: Rows = []
    open_rows, count = np.empty(len(tokens), np.int64), 0  # numbers of the rows that still have room for something
    room, room_tiles = np.empty(len(tokens), np.int64), np.empty(len(tokens), np.int64)
    most_room = 0  # that any of them may have: where a sample exceeds it, none need be looked at
    for place, sample in enumerate(np.argsort(-tokens, kind="stable").tolist()):
        if place % _SWEEP == 0:
            still = np.flatnonzero(room[:count] >= shortest)
            for values in (open_rows, room, room_tiles):
                values[: len(still)] = values[still]
            count = len(still)
            most_room = int(room[:count].max(initial=0))
        looked_at = count if tokens[sample] <= most_room else 0
        fits = (room[:looked_at] >= tokens[sample]) & (room_tiles[:looked_at] >= tiles[sample])
        if fits.any():
            row = choose(fits, room[:count])
        else:
            row, count = count, count + 1
            open_rows[row], room[row], room_tiles[row] = len(rows), budget.seq_length, budget.max_tiles
            rows.append([])
        rows[open_rows[row]].append(sample)
        room[row] -= tokens[sample]
        room_tiles[row] -= tiles[sample]
        most_room = max(most_room, int(room[row]))
    return [rows[number] for number in rng.permutation(len(rows))]


def first_fit_decreasing_in_windows(
    tokens: np.ndarray, tiles: np.ndarray, budget: Budget, rng: np.random.Generator
) -> Rows:
    """The same in windows of the stream as ours: a sample is not taken from anywhere in the epoch."""
    rows: Rows = []
    for window in np.array_split(np.arange(len(tokens)), max(-(-len(tokens) // budget.window), 1)):
        packed = first_fit_decreasing(tokens[window], tiles[window], budget, rng)
        rows += [window[row].tolist() for row in packed]
    return rows


def greedy_knapsack(tokens: np.ndarray, tiles: np.ndarray, budget: Budget, rng: np.random.Generator) -> Rows:
    """Of a small buffer of the stream, into each row the longest sample that still fits, again and again.

    Megatron-LM's multimodal example (`--packing-buffer-size`) packs by it.
    """
    rows: Rows = []
    for start in range(0, len(tokens), KNAPSACK_BUFFER):
        buffer = (start + np.argsort(-tokens[start : start + KNAPSACK_BUFFER], kind="stable")).tolist()
        while buffer:
            row, left, room, room_tiles = [], [], budget.seq_length, budget.max_tiles
            shortest = tokens[buffer[-1]]
            for place, sample in enumerate(buffer):
                if room < shortest:
                    left += buffer[place:]
                    break
                if tokens[sample] <= room and tiles[sample] <= room_tiles:
                    row.append(sample)
                    room -= int(tokens[sample])
                    room_tiles -= int(tiles[sample])
                else:
                    left.append(sample)
            rows.append(row)
            buffer = left
    return rows


def first_fit_open_bins(tokens: np.ndarray, tiles: np.ndarray, budget: Budget, rng: np.random.Generator) -> Rows:
    """Samples as they come, each into the first of a few open rows that has room; if none has, the fullest is closed.

    torchtitan's loader packs by it.
    """
    rows: Rows = []
    bins: list[tuple[list[int], int, int]] = []
    for sample, (length, images) in enumerate(zip(tokens.tolist(), tiles.tolist(), strict=True)):
        for number, (row, room, room_tiles) in enumerate(bins):
            if length <= room and images <= room_tiles:
                row.append(sample)
                bins[number] = (row, room - length, room_tiles - images)
                break
        else:
            if len(bins) == OPEN_BINS:
                fullest = min(range(OPEN_BINS), key=lambda number: bins[number][1])
                rows.append(bins.pop(fullest)[0])
            bins.append(([sample], budget.seq_length - length, budget.max_tiles - images))
    return rows + [row for row, _, _ in bins]


PEERS: dict[str, Peer] = {
    "first-fit decreasing": first_fit_decreasing,
    "the same in our windows": first_fit_decreasing_in_windows,
    "best-fit decreasing": best_fit_decreasing,
    f"greedy knapsack, buffer of {KNAPSACK_BUFFER:,}": greedy_knapsack,
    f"first-fit, {OPEN_BINS} open rows": first_fit_open_bins,
}
