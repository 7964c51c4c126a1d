"""Which language layers each pipeline stage holds, in megatron-core's notation: `Et*3|t*4|t*4|t*5L`.

A bar ends a stage. `t` is a language layer, `E` what comes before them (embedding, vision tower, projector), `L` what
comes after (final norm and loss head). `t*3` is `ttt`, and `(t|)*2` is `t|t|`. Commas are ignored. In `E|t*8|t*8L` the
vision tower is alone on its stage. With virtual stages there are PP x VPP stages, in the order of computation.
"""

from __future__ import annotations

import re

AUTO = "auto"
"""The layout that balances the estimated cost of the stages."""
_REPEATS = (r"\(([^()]+)\)\*(\d+)", r"([A-Za-z])\*(\d+)")


def parse_layout(text: str) -> list[int]:
    """Language layers of each stage, in the order of computation. Raises a ValueError that says what is wrong."""
    expanded = re.sub(r"[\s,]", "", text)
    for pattern in _REPEATS:
        expanded = re.sub(pattern, lambda found: found[1] * int(found[2]), expanded)
    wrong = sorted(set(expanded) - set("EtL|"))
    if wrong:
        raise ValueError(f"has {' '.join(wrong)}, which is none of E, t, L, | and *NUMBER")
    if not re.fullmatch(r"E[t|]*L", expanded):
        raise ValueError("must have one E, at its beginning, and one L, at its end")
    stages = expanded[1:-1].split("|")
    for number, stage in enumerate(stages[1:-1], 1):
        if not stage:
            raise ValueError(f"has no layer on stage {number}; only the first and the last one may be without")
    return [len(stage) for stage in stages]


def format_layout(layers: list[int]) -> str:
    """The inverse of `parse_layout`."""
    stages = ["" if count == 0 else "t" if count == 1 else f"t*{count}" for count in layers]
    return f"E{'|'.join(stages)}L"
