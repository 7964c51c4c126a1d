"""Against a real S3 server: writes are verified, failed requests are retried, and errors name the object."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_vlm.data.errors import DataError
from megatron_vlm.data.loader import build_loader
from megatron_vlm.data.prepare.shard_writer import merge_parts, prepare_shards
from megatron_vlm.data.shards import s3
from megatron_vlm.data.shards.cache import ShardCache
from megatron_vlm.data.shards.mds_format import ShardSample
from megatron_vlm.data.shards.reader import ShardFolder
from megatron_vlm.runtime.s3 import client
from tests.data.helpers import make_recipe, mixed_folder, tiny_tokenizer_folder
from tests.support.s3_server import BUCKET, Fault, Proxy, fast_retries, put_folder, wait_for

URL = f"s3://{BUCKET}/train"


@pytest.fixture
def proxy(one_store: Proxy) -> Iterator[Proxy]:
    with fast_retries(one_store, attempts=4, timeout=1.0):
        yield one_store


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 samples in 3 parts of several shards each."""
    root = tmp_path_factory.mktemp("local")
    folder = mixed_folder(root, 30)
    prepare_shards([folder.write()], folder.images, root / "s", 1, size_limit=4000, samples_per_part=10)
    return root / "s"


def read_all(folder: ShardFolder) -> list[ShardSample]:
    return [folder[index] for index in range(len(folder))]


def test_shards_written_to_a_store_equal_those_on_disk(tmp_path: Path, proxy: Proxy, shards: Path) -> None:
    folder = mixed_folder(tmp_path, 30)
    proxy.faults += [Fault("error", "00001/", 3, "PUT"), Fault("error", "index.json", 1, "HEAD")]
    summary = prepare_shards([folder.write()], folder.images, URL, 1, size_limit=4000, samples_per_part=10)
    assert (summary.read, summary.written) == (30, 30)
    remote = ShardFolder(URL, ShardCache(tmp_path / "cache"))
    assert read_all(remote) == read_all(ShardFolder(shards))
    puts = [path for method, path in proxy.requests if method == "PUT"]
    assert puts[-1].endswith("index.json")  # the index is written last
    with pytest.raises(DataError, match="already holds a shard set"):
        prepare_shards([folder.write()], folder.images, URL, 1)


def test_several_jobs_and_an_interruption_between_them(tmp_path: Path, proxy: Proxy, shards: Path) -> None:
    folder = mixed_folder(tmp_path, 30)
    arguments = ([folder.write()], folder.images, URL, 1, 4000, 10)
    assert prepare_shards(*arguments, job=(2, 2)).written == 10
    with pytest.raises(DataError, match="2 of 3 parts .* are missing, the first is part 0"):
        merge_parts(URL)
    with pytest.raises(DataError, match="has no index"):
        ShardFolder(URL, ShardCache(tmp_path / "cache"))
    assert prepare_shards(*arguments, job=(1, 2)).written == 20
    proxy.requests.clear()
    assert prepare_shards(*arguments, job=(1, 2)).written == 20  # nothing left to do
    assert not [path for method, path in proxy.requests if method == "PUT"]
    assert merge_parts(URL).written == 30
    assert read_all(ShardFolder(URL, ShardCache(tmp_path / "cache"))) == read_all(ShardFolder(shards))


def test_metadata_files_give_lengths_without_downloading_shards(tmp_path: Path, proxy: Proxy, shards: Path) -> None:
    put_folder(shards, URL)
    remote = ShardFolder(URL, ShardCache(tmp_path / "cache"))
    local = ShardFolder(shards)
    for index in range(30):
        full, metadata = local[index], remote.metadata(index)
        assert (metadata.annotation, metadata.image_sizes) == (full.annotation, full.image_sizes)
    assert not [path for method, path in proxy.requests if method == "GET" and path.endswith(".mds")]


def test_a_mixture_of_annotations_and_local_and_remote_shards(tmp_path: Path, proxy: Proxy, shards: Path) -> None:
    put_folder(shards, URL)
    folder = mixed_folder(tmp_path, 8)
    for entry in folder.entries:
        entry["id"] = f"local {entry['id']}"
    prepare_shards([folder.write()], folder.images, tmp_path / "local", 1)
    for entry in folder.entries:
        entry["id"] = entry["id"].replace("local", "file")
    file = folder.write("file.jsonl")
    (tmp_path / "mix.yaml").write_text(
        f"datasets: [{{shard_path: train, choose: 5}}, {{json_path: {file}, sampling_strategy: 'repeat:2'}},"
        f" {{shard_path: {tmp_path / 'local'}, repeat: 3}}]"
    )
    recipe = make_recipe(
        [str(tmp_path / "mix.yaml")], folder.images, tiny_tokenizer_folder(tmp_path / "t"), global_batch_size=1,
        data_root=f"s3://{BUCKET}", cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    loader = build_loader(recipe, dp_rank=0, dp_size=1, consumed_rows=0, need_tiles=True)
    counts = Counter(name for _ in range(loader.plan.rows) for name in next(loader).sample_ids)
    assert {name: count for name, count in counts.items() if name.startswith(("file", "local"))} == {
        **{f"file s{n}": 2 for n in range(8)}, **{f"local s{n}": 3 for n in range(8)},
    }  # fmt: skip
    assert counts.total() == 5 + 16 + 24 and max(count for name, count in counts.items() if name[0] == "s") == 1


@pytest.mark.parametrize("kind", ["error", "disconnect", "stall", "truncate"])
def test_transient_errors_are_retried(tmp_path: Path, proxy: Proxy, shards: Path, kind: str) -> None:
    put_folder(shards, URL)
    proxy.faults += [Fault(kind, "00000/shard.00001", 1 if kind == "stall" else 2), Fault("error", "/index.json", 1)]
    remote = ShardFolder(URL, ShardCache(tmp_path / "cache"))
    assert read_all(remote) == read_all(ShardFolder(shards))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("error", "tried 4 times"),
        ("disconnect", "tried 4 times"),
        ("truncate", "received .* bytes, expected"),
        ("stall", "tried 4 times, last error ReadTimeoutError"),
    ],
)
def test_permanent_errors_name_the_shard(tmp_path: Path, proxy: Proxy, shards: Path, kind: str, message: str) -> None:
    put_folder(shards, URL)
    proxy.faults.append(Fault(kind, "00000/shard.00001"))
    remote = ShardFolder(URL, ShardCache(tmp_path / "cache"))
    with pytest.raises(DataError, match=rf"{URL}/00000/shard.00001.mds.*{message}"):
        read_all(remote)
    assert not list(tmp_path.rglob("*.partial"))


def test_missing_and_replaced_objects(tmp_path: Path, proxy: Proxy, shards: Path) -> None:
    put_folder(shards, URL)
    remote = ShardFolder(URL, ShardCache(tmp_path / "cache"))
    client.client().delete_object(Bucket=BUCKET, Key="train/00001/shard.00000.mds")
    with pytest.raises(DataError, match=rf"{URL}/00001/shard.00000.mds does not exist"):
        read_all(remote)
    data = bytearray((shards / "00000" / "shard.00000.mds").read_bytes())
    data[-1] ^= 1
    s3.upload(bytes(data), f"{URL}/00000/shard.00000.mds")
    with pytest.raises(DataError, match="sha1 differs from the index"):
        ShardFolder(URL, ShardCache(tmp_path / "other"))[0]
    with pytest.raises(DataError, match="s3://nosuch/x"):
        ShardFolder("s3://nosuch/x", ShardCache(tmp_path / "cache"))
    with pytest.raises(DataError, match="set cache_dir"):
        ShardFolder(URL)


def test_the_cache_limit_is_respected(tmp_path: Path, proxy: Proxy, shards: Path) -> None:
    put_folder(shards, URL)
    total = sum(path.stat().st_size for path in shards.rglob("*.mds"))
    cache = ShardCache(tmp_path / "cache", limit=total // 3)
    remote = ShardFolder(URL, cache)
    expected = read_all(ShardFolder(shards))
    for index in [*range(30), *range(29, -1, -1)]:
        assert remote[index] == expected[index]
        assert cache.used <= total // 3
    gets = [path for method, path in proxy.requests if method == "GET" and path.endswith(".mds")]
    assert len(gets) > len(set(gets))  # some were evicted and downloaded again
    with pytest.raises(DataError, match="raise cache_limit"):
        ShardFolder(URL, ShardCache(tmp_path / "tiny", limit=100))[0]


def test_damaged_cache_files_are_downloaded_again(tmp_path: Path, proxy: Proxy, shards: Path) -> None:
    put_folder(shards, URL)
    remote, expected = ShardFolder(URL, ShardCache(tmp_path / "cache")), read_all(ShardFolder(shards))
    assert read_all(remote) == expected
    truncated, overwritten = sorted((tmp_path / "cache").rglob("shard.*.mds"))[:2]
    truncated.write_bytes(truncated.read_bytes()[:100])
    overwritten.write_bytes(bytes(overwritten.stat().st_size))
    assert read_all(remote) == expected


def test_damaged_shards_without_hashes_are_reported(tmp_path: Path, proxy: Proxy, shards: Path) -> None:
    """The published index has no hashes, so damage is found when a sample is read."""
    damaged = shutil.copytree(shards, tmp_path / "damaged")
    index = json.loads((damaged / "index.json").read_text())
    for shard in index["shards"]:
        shard["raw_data"]["hashes"] = {}
    (damaged / "index.json").write_text(json.dumps(index))
    shard_file = damaged / "00000" / "shard.00000.mds"
    shard_file.write_bytes(bytes(shard_file.stat().st_size))
    put_folder(damaged, URL)
    for folder in (ShardFolder(damaged), ShardFolder(URL, ShardCache(tmp_path / "cache"))):
        with pytest.raises(DataError, match=r"00000/shard.00000.mds is damaged at its sample 0: "):
            folder[0]


@contextmanager
def environment(**variables: str | None) -> Iterator[None]:
    """Environment variables for the block; None removes one."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.delenv(name, raising=False) if value is None else patch.setenv(name, value)
        client.client_of.cache_clear()
        yield
    client.client_of.cache_clear()


def test_invalid_endpoint_and_missing_credentials(tmp_path: Path, proxy: Proxy) -> None:
    with (
        environment(S3_ENDPOINT_URL="localhost:9000"),
        pytest.raises(DataError, match="S3_ENDPOINT_URL is 'localhost:9000': expected an address like"),
    ):
        ShardFolder(URL, ShardCache(tmp_path / "cache"))
    with (
        environment(AWS_ACCESS_KEY_ID=None, AWS_SECRET_ACCESS_KEY=None, AWS_EC2_METADATA_DISABLED="true"),
        pytest.raises(DataError, match=f"cannot read {URL}/index.json: no credentials. Set AWS_ACCESS_KEY_ID"),
    ):
        ShardFolder(URL, ShardCache(tmp_path / "cache"))


def test_credentials_are_read_from_the_aws_files(tmp_path: Path, proxy: Proxy, shards: Path) -> None:
    put_folder(shards, URL)
    file = tmp_path / "credentials"
    file.write_text("[mine]\naws_access_key_id = of-a-file\naws_secret_access_key = secret\n")
    with environment(
        AWS_ACCESS_KEY_ID=None, AWS_SECRET_ACCESS_KEY=None, AWS_SHARED_CREDENTIALS_FILE=str(file), AWS_PROFILE="mine"
    ):
        proxy.keys.clear()
        assert len(ShardFolder(URL, ShardCache(tmp_path / "cache"))) == 30
        assert proxy.keys == {"of-a-file"}


def _read_shuffled(shards: Path, cache_folder: Path, limit: int, seed: int) -> None:
    import numpy as np

    cache = ShardCache(cache_folder, limit)
    remote, local = ShardFolder(URL, cache), ShardFolder(shards)
    for index in np.random.default_rng(seed).permutation(30).tolist():
        assert remote[index] == local[index]
        assert cache.used <= limit


def test_processes_share_a_cache_while_others_are_killed(tmp_path: Path, proxy: Proxy, shards: Path) -> None:
    """Three processes keep reading while three others are killed one by one during a download."""
    put_folder(shards, URL)
    limit = 6 * max(path.stat().st_size for path in shards.rglob("*.mds"))
    fork = multiprocessing.get_context("fork")

    def start(seed: int) -> multiprocessing.process.BaseProcess:
        process = fork.Process(target=_read_shuffled, args=(shards, tmp_path / "cache", limit, seed))
        process.start()
        return process

    readers: list[multiprocessing.process.BaseProcess] = []
    for victim in range(3):
        proxy.faults.append(Fault("stall", ".mds", 1))
        killed = start(100 + victim)
        wait_for(lambda: not proxy.faults[-1].times and list((tmp_path / "cache").rglob("*.partial")), 60)
        readers.append(start(victim))
        time.sleep(0.1)  # the readers need the same shard or its space
        killed.kill()
        killed.join()
        assert killed.exitcode == -signal.SIGKILL
    for process in readers:
        process.join(120)
        assert process.exitcode == 0
    _read_shuffled(shards, tmp_path / "cache", limit, 9)
    assert ShardCache(tmp_path / "cache").used <= limit and not list((tmp_path / "cache").rglob("*.partial"))


def test_concurrent_processes_download_a_shard_once(tmp_path: Path, proxy: Proxy, shards: Path) -> None:
    put_folder(shards, URL)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_read_shuffled, args=(shards, tmp_path / "cache", 10**9, 1)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    gets = [path for method, path in proxy.requests if method == "GET" and path.endswith(".mds")]
    assert len(gets) == len(set(gets)) > 3
