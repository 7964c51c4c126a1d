"""Copy a finished set of shards to an S3 store: each object verified, what is there already not sent again.

python tools/upload_shards.py shards/train s3://bucket/train

Works on any folder that mosaicml-streaming reads. The index is sent last, so the set appears when it is whole.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from megatron_vlm.data.errors import DataError
from megatron_vlm.data.shards import s3
from megatron_vlm.data.shards.mds_format import INDEX
from megatron_vlm.data.shards.reader import ShardFolder


def upload_shards(folder: Path, url: str, threads: int = 8) -> tuple[int, int]:
    """
    Args:
        folder: a finished set.
        url: s3://bucket/prefix
        threads: objects sent at the same time.

    Returns:
        Objects sent, objects that were there.

    Raises:
        DataError: the folder is no finished set, another set is there, or the store refuses or fails.
    """
    ShardFolder(folder)  # whole: all files there, of the sizes the index says
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    names.remove(INDEX)

    index = s3.join(url, INDEX)
    if s3.exists(index) and not s3.is_uploaded(folder / INDEX, index):
        raise DataError(
            f"{url} holds another set of shards, which may be in use: sending this one would mix the two. "
            "Choose another place, or remove that one first."
        )

    def send(name: str) -> bool:
        if s3.is_uploaded(folder / name, s3.join(url, name)):
            return False
        s3.upload(folder / name, s3.join(url, name))
        return True

    pool = ThreadPoolExecutor(threads)
    try:
        sent = list(tqdm(pool.map(send, names), total=len(names), unit=" objects", desc=f"sending to {url}"))
    finally:
        pool.shutdown(cancel_futures=True)  # after a failure, or Ctrl-C, the others need not be tried
    sent.append(send(INDEX))
    return sum(sent), len(sent) - sum(sent)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 all is there, 2 something failed, 130 it was stopped by Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="a finished set of shards")
    parser.add_argument("url", metavar="s3://BUCKET/PREFIX")
    parser.add_argument("--threads", type=int, default=8, metavar="N", help="objects sent at the same time")
    options = parser.parse_args(argv)
    if not s3.is_remote(options.url):
        parser.error(f"{options.url} does not begin with s3://")
    try:
        sent, there = upload_shards(options.folder, options.url, options.threads)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the objects that are missing", file=sys.stderr)
        return 130
    print(f"{sent + there} objects at {options.url}: {sent} sent and verified, {there} were there")
    return 0
