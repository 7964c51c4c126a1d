"""Upload a complete shard set to S3. Each object is verified, and objects that are already there are skipped.

megatron-vlm upload-shards shards/train s3://bucket/train

The shards may be ours or published ones. The index is uploaded last, so that the set becomes visible when it is
complete.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from megatron_vlm.commands.failures import describe
from megatron_vlm.commands.number_flags import positive_int
from megatron_vlm.data.errors import DataError
from megatron_vlm.data.shards import s3
from megatron_vlm.data.shards.mds_format import INDEX
from megatron_vlm.data.shards.reader import ShardFolder


def upload_shards(folder: Path, url: str, threads: int = 8) -> tuple[int, int]:
    """Upload a shard set, the index last.

    Args:
        folder: a complete shard set.
        url: s3://bucket/prefix
        threads: concurrent uploads.

    Returns:
        Objects uploaded, objects skipped.

    Raises:
        DataError: `folder` is not a complete shard set, `url` holds another one, or an upload failed.
    """
    ShardFolder(folder)  # checks that all files exist with the sizes in the index
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    names.remove(INDEX)

    index = s3.join(url, INDEX)
    if s3.exists(index) and not s3.is_uploaded(folder / INDEX, index):
        raise DataError(
            f"{url} holds another shard set, which may be in use, and uploading this one would mix the two. "
            "Choose another prefix or remove that set first."
        )

    def send(name: str) -> bool:
        if s3.is_uploaded(folder / name, s3.join(url, name)):
            return False
        s3.upload(folder / name, s3.join(url, name))
        return True

    pool = ThreadPoolExecutor(threads)
    try:
        sent = list(tqdm(pool.map(send, names), total=len(names), unit=" objects", desc=f"uploading to {url}"))
    finally:
        pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C the rest is not tried
    sent.append(send(INDEX))
    return sum(sent), len(sent) - sum(sent)


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Exit code: 0 the set is complete, 2 error, 130 Ctrl-C."""
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="a complete shard set")
    parser.add_argument("url", metavar="s3://BUCKET/PREFIX")
    parser.add_argument("--threads", type=positive_int, default=8, metavar="N", help="concurrent uploads; default: 8")
    options = parser.parse_args(argv)
    if not s3.is_remote(options.url):
        parser.error(f"{options.url} does not begin with s3://")
    try:
        uploaded, skipped = upload_shards(options.folder, options.url, options.threads)
    except (DataError, OSError) as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command to resume", file=sys.stderr)
        return 130
    print(f"{uploaded + skipped} objects at {options.url}: {uploaded} uploaded and verified, {skipped} already there")
    return 0
