"""Sections of the data report about texts: the chat template, samples longer than a row, and languages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_vlm.data.length_index import LengthIndex
from megatron_vlm.data.processing.tokenizer import AUTO, INSTELLA_NAME, Tokenizer
from megatron_vlm.data.report import html
from megatron_vlm.data.report.plots import draw_scripts
from megatron_vlm.data.report.scripts import ScriptCounts
from megatron_vlm.data.truncation import Truncations

_ACTIONS = {
    "error": "training stops with an error that names them",
    "skip": "they are left out",
    "truncate": "they are truncated after the last answer that fits, and left out if none does",
}
"""What each value of oversized_samples does."""


def template_section(tokenizer: Tokenizer, setting: str) -> str:
    """Which chat template makes text of conversations, and the template.

    Args:
        tokenizer: of the run.
        setting: chat_template.
    """
    if tokenizer.chat_template is None:
        why = "as chat_template says" if setting == INSTELLA_NAME else f"because {tokenizer.path} has none"
        about, template = f"instella, that of the published training, {why}.", ""
    else:
        source = f"that of the tokenizer {tokenizer.path}" if setting == AUTO else f"the file {setting}"
        about, template = f"{source}.", html.details("the template", tokenizer.chat_template.text)
    return html.section("Chat template", f"<p>{html.text(about[0].upper() + about[1:])}</p>", template)


def oversized_section(
    names: Sequence[str],
    indexes: Sequence[LengthIndex],
    truncations: Sequence[Truncations],
    setting: str,
    limits: tuple[int, int],
) -> str:
    """Samples longer than a row: how many tokens truncating them loses, and how many leaving them out.

    Args:
        names: of the sources.
        indexes: the length index of each source.
        truncations: of the samples of each source that are longer than a row.
        setting: oversized_samples.
        limits: tokens and tiles that a sample may have.
    """
    heading, longest = "Samples longer than a row", f"{limits[0]:,} tokens and {limits[1]:,} tiles"
    counts = []
    for index, found in zip(indexes, truncations, strict=True):
        before, kept = index.tokens[found.samples].astype(np.int64), found.turns > 0
        lost = int((before[kept] - found.tokens[kept]).sum())
        counts.append([len(kept), int(kept.sum()), lost, int((~kept).sum()), int(before[~kept].sum())])
        counts[-1].append(int(before.sum()))
    total = np.array(counts, np.int64).sum(axis=0).tolist()
    if not total[0]:
        return html.section(heading, f"<p>None: no sample has more than {longest}.</p>")
    every = sum(int(index.tokens[index.tokens > 0].sum(dtype=np.int64)) for index in indexes)
    truncate, skip = (f"{lost:,} tokens ({100 * lost / every:.2f} %)" for lost in (total[2] + total[4], total[5]))
    header = ("dataset", "samples", "can be truncated", "tokens lost", "no answer fits", "tokens lost", "tokens of all")
    rows = [
        [name, *(f"{number:,}" for number in of_source)]
        for name, of_source in zip([*names, "all"], [*counts, total], strict=True)
    ]
    return html.section(
        heading,
        f"<p>More than {longest}. oversized_samples is {setting}: {_ACTIONS[setting]}. Of all tokens, truncate loses "
        f"{truncate} and skip {skip}.</p>",
        html.table(header, rows, text_columns=1, total=True),
    )


def scripts_section(names: Sequence[str], of_sources: Sequence[ScriptCounts]) -> str:
    """The languages of the texts, as far as their letters show them.

    Args:
        names: of the sources.
        of_sources: the letters of each.
    """
    heading, every = "Language of the texts", ScriptCounts()
    for counts in of_sources:
        every.merge(counts)
    if not every.letters:
        return html.section(heading, "<p>The texts have no letters.</p>")
    scripts = [script for script, _ in every.letters.most_common()]
    rows = []
    for name, counts in zip([*names, "all"], [*of_sources, every], strict=True):
        letters = max(counts.letters.total(), 1)
        shares = [f"{100 * counts.letters[script] / letters:.2f} %" for script in scripts]
        rows.append([name, *shares, f"{counts.without_letters:,}"])
    sums = np.array([(every.samples[script], every.letters[script]) for script in scripts], np.int64)
    return html.section(
        heading,
        "<p>Letters of questions and answers by their script.</p>",
        html.table(("dataset", *scripts, "samples without letters"), rows, text_columns=1, total=True),
        html.png_image(draw_scripts(scripts, sums), "samples and letters by script"),
    )
