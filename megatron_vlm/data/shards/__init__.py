"""Shards in MDS format: writing and reading them, on disk and in S3, with a bounded local cache.

Modules here move bytes and annotations as they are. They do not interpret conversations, decode images or choose
samples.
"""
