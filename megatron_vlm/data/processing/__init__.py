"""Turns one sample into model inputs: tokenizer, chat template, image decoding, tiling and image tokens.

Modules here are pure functions of a sample. They read no datasets, know nothing of rows, epochs or ranks, and write no
files.
"""
