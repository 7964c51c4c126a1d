"""The packing algorithms of other trainers, written from their descriptions.

All keep the same two budgets per row, tokens and image tiles, and return rows in training order. Offline algorithms
shuffle their rows, as their users do; streaming algorithms return rows in the order they are closed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megatron_vlm.data.packing.epoch_plan import Budget

Rows = list[list[int]]
"""Sample indices of each row."""
Peer = Callable[[np.ndarray, np.ndarray, Budget, np.random.Generator], Rows]

KNAPSACK_BUFFER = 1000
"""Samples in the buffer."""
OPEN_BINS = 8
_CLOSE_INTERVAL = 256
"""Samples after which rows without room for the shortest sample are closed."""


def first_fit_decreasing(tokens: np.ndarray, tiles: np.ndarray, budget: Budget, rng: np.random.Generator) -> Rows:
    """Longest sample first; each goes into the first row with room for it.

    Johnson, "Near-optimal bin packing algorithms", 1973. Used by Megatron-Bridge and LLaVA-OneVision-1.5.
    """
    return _decreasing(tokens, tiles, budget, rng, lambda fits, room: int(fits.argmax()))


def best_fit_decreasing(tokens: np.ndarray, tiles: np.ndarray, budget: Budget, rng: np.random.Generator) -> Rows:
    """Longest sample first; each goes into the fullest row with room for it.

    Johnson, 1973. Used by ms-swift.
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
    """`choose` picks an open row from (fits [open] bool, room [open] in tokens)."""
    shortest = int(tokens.min())
    rows: Rows = []
    open_rows, count = np.empty(len(tokens), np.int64), 0  # indices of rows with room left
    room, room_tiles = np.empty(len(tokens), np.int64), np.empty(len(tokens), np.int64)
    max_room = 0  # upper bound of room: no open row fits a longer sample
    for step, sample in enumerate(np.argsort(-tokens, kind="stable").tolist()):
        if step % _CLOSE_INTERVAL == 0:
            kept = np.flatnonzero(room[:count] >= shortest)
            for values in (open_rows, room, room_tiles):
                values[: len(kept)] = values[kept]
            count = len(kept)
            max_room = int(room[:count].max(initial=0))
        candidates = count if tokens[sample] <= max_room else 0
        fits = (room[:candidates] >= tokens[sample]) & (room_tiles[:candidates] >= tiles[sample])
        if fits.any():
            row = choose(fits, room[:count])
        else:
            row, count = count, count + 1
            open_rows[row], room[row], room_tiles[row] = len(rows), budget.seq_length, budget.max_tiles
            rows.append([])
        rows[open_rows[row]].append(sample)
        room[row] -= tokens[sample]
        room_tiles[row] -= tiles[sample]
        max_room = max(max_room, int(room[row]))
    return [rows[number] for number in rng.permutation(len(rows))]


def first_fit_decreasing_in_windows(
    tokens: np.ndarray, tiles: np.ndarray, budget: Budget, rng: np.random.Generator
) -> Rows:
    """First-fit decreasing within windows of the stream as large as ours, instead of over the whole epoch."""
    rows: Rows = []
    for window in np.array_split(np.arange(len(tokens)), max(-(-len(tokens) // budget.window), 1)):
        packed = first_fit_decreasing(tokens[window], tiles[window], budget, rng)
        rows += [window[row].tolist() for row in packed]
    return rows


def greedy_knapsack(tokens: np.ndarray, tiles: np.ndarray, budget: Budget, rng: np.random.Generator) -> Rows:
    """Fill each row from a small buffer of the stream, always with the longest sample that still fits.

    Used by Megatron-LM's multimodal example (`--packing-buffer-size`).
    """
    rows: Rows = []
    for start in range(0, len(tokens), KNAPSACK_BUFFER):
        buffer = (start + np.argsort(-tokens[start : start + KNAPSACK_BUFFER], kind="stable")).tolist()
        while buffer:
            row, rest, room, room_tiles = [], [], budget.seq_length, budget.max_tiles
            shortest = tokens[buffer[-1]]
            for index, sample in enumerate(buffer):
                if room < shortest:
                    rest += buffer[index:]
                    break
                if tokens[sample] <= room and tiles[sample] <= room_tiles:
                    row.append(sample)
                    room -= int(tokens[sample])
                    room_tiles -= int(tiles[sample])
                else:
                    rest.append(sample)
            rows.append(row)
            buffer = rest
    return rows


def first_fit_open_bins(tokens: np.ndarray, tiles: np.ndarray, budget: Budget, rng: np.random.Generator) -> Rows:
    """Samples in stream order, each into the first open row with room; if none has room, the fullest row is closed.

    Used by torchtitan's loader.
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
    "first-fit decreasing, windowed": first_fit_decreasing_in_windows,
    "best-fit decreasing": best_fit_decreasing,
    f"greedy knapsack, buffer of {KNAPSACK_BUFFER:,}": greedy_knapsack,
    f"first-fit, {OPEN_BINS} open rows": first_fit_open_bins,
}
