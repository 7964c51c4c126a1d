"""tools/upload_shards.py resumes, verifies each object, and uploads the index last."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_vlm.commands import upload_shards
from megatron_vlm.data.prepare.shard_writer import prepare_shards
from megatron_vlm.data.shards import s3
from megatron_vlm.data.shards.cache import ShardCache
from megatron_vlm.data.shards.reader import ShardFolder
from megatron_vlm.runtime.s3 import client
from tests.data.helpers import mixed_folder
from tests.support.s3_server import BUCKET, Fault, Proxy, store

URL = f"s3://{BUCKET}/up"


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    monkeypatch.setattr(client, "retry_policy", client.RetryPolicy(attempts=2, first_delay=0.02, timeout=2.0))
    with store() as running:
        yield running


def test_upload(tmp_path: Path, proxy: Proxy, capsys: pytest.CaptureFixture[str]) -> None:
    tool = upload_shards
    folder = mixed_folder(tmp_path, 30)
    prepare_shards([folder.write()], folder.images, tmp_path / "s", 1, size_limit=4000)
    proxy.faults.append(Fault("error", "shard.00002.mds", 2, "PUT"))  # more failures than attempts
    assert tool.main([str(tmp_path / "s"), URL, "--threads", "1"]) == 2
    assert "shard.00002.mds" in capsys.readouterr().err
    assert not s3.exists(f"{URL}/index.json")
    proxy.requests.clear()
    assert tool.main([str(tmp_path / "s"), URL]) == 0
    puts = [path for method, path in proxy.requests if method == "PUT"]
    assert puts[-1].endswith("/index.json") and not any(path.endswith("shard.00000.mds") for path in puts)
    local, remote = ShardFolder(tmp_path / "s"), ShardFolder(URL, ShardCache(tmp_path / "cache"))
    assert [remote[i] for i in range(30)] == [local[i] for i in range(30)]
    client.client().put_object(Bucket=BUCKET, Key="up/00000/shard.00000.mds", Body=b"other")  # a damaged object
    assert tool.main([str(tmp_path / "s"), URL]) == 0
    assert "1 uploaded and verified" in capsys.readouterr().out
    prepare_shards([folder.write()], folder.images, tmp_path / "other", 1, size_limit=9000)
    proxy.requests.clear()
    assert tool.main([str(tmp_path / "other"), URL]) == 2 and "holds another shard set" in capsys.readouterr().err
    assert not [path for method, path in proxy.requests if method == "PUT"]
    assert tool.main([str(tmp_path), URL]) == 2 and "no index.json" in capsys.readouterr().err
