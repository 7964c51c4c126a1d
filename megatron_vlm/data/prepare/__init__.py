"""Offline preparation: converting other datasets to annotations, and writing annotations and images as shards.

Training and the loader must not import from here.
"""
