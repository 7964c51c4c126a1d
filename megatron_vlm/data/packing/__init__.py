"""Which samples share a row, and in which order rows come: planned from sample lengths, a seed and an epoch.

Modules here see lengths only: they never read or encode a sample. Only `row_plan` deals with data-parallel ranks.
"""
