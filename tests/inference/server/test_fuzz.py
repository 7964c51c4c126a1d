"""schemathesis makes requests from the OpenAPI document: no status 5xx, and every answer as documented."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.inference.server.running import RunningServer, run_server
from tests.support.environments import empty_environment

CHECKS = [
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
    "negative_data_rejection", "missing_required_header", "unsupported_method",
]  # fmt: skip


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_requests_made_from_the_document(server: RunningServer, tmp_path: Path) -> None:
    environment = empty_environment(tmp_path / "environment")  # where it is installed, it changes how pytest runs
    environment.pip("schemathesis>=4,<5")
    with run_server(server.engine, default_max_tokens=2) as quick:
        command = [environment.folder / "bin" / "st", "run", f"{quick.url}/openapi.json", "--checks", ",".join(CHECKS)]
        done = subprocess.run(
            [*command, "--max-examples", "60", "--request-timeout", "300", "--no-color"],
            capture_output=True,
            text=True,
            timeout=1500,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr
        assert server.chat("What?", max_tokens=2)["usage"]["completion_tokens"] == 2
        assert max(quick.statuses()) < 500
