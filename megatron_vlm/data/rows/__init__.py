"""A packed row: its batch, what one rank computes with, where its documents begin, and how a worker sends it.

Which samples a row contains is decided in `data.packing`.
"""
