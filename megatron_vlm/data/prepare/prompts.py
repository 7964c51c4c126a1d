"""Prompt pools for datasets that have answers but no questions."""

from __future__ import annotations

PROMPTS: dict[str, tuple[str, ...]] = {
    "caption": (
        "Describe this image.",
        "What does this picture show?",
        "Give a caption for this image.",
        "Say what you see here.",
        "Write a sentence or two about this picture.",
        "What is in the image?",
        "Please describe the picture.",
        "How would you describe this image to somebody who cannot see it?",
        "Tell me what this picture is about.",
        "Put the content of this image into words.",
        "What can be seen here?",
    ),
    "chart": (
        "Summarise this chart.",
        "What does the chart tell?",
        "Describe the data in this figure.",
        "What is the main finding of this chart?",
        "Put this chart into words.",
        "Which trend does the figure show?",
    ),
    "html": (
        "Write the HTML of this page.",
        "Give this table as HTML.",
        "Which HTML makes this?",
        "Turn the image into HTML.",
        "Transcribe what you see as HTML.",
    ),
    "latex": (
        "Write this formula in LaTeX.",
        "Give the LaTeX of this image.",
        "Which LaTeX makes this formula?",
        "Transcribe the formula as LaTeX.",
        "Turn the image into LaTeX.",
    ),
}
