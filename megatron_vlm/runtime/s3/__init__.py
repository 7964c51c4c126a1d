"""Objects in any S3-compatible store: shards are read from it, and checkpoints are written to it and read."""

from megatron_vlm.runtime.s3.client import ObjectMissing, S3Error, is_remote, join

__all__ = ["ObjectMissing", "S3Error", "is_remote", "join"]
