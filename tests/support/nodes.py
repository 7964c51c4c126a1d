"""Nodes of a cluster on one machine: an address each, and an agent of torchrun's that is started and killed there.

Each is a network namespace where root may make one; elsewhere an alias of the loopback address.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.support.launch import ROOT, free_port

PORT = 29511


@dataclass
class Node:
    """One of two."""

    address: str
    namespace: str | None = None
    interface: str | None = None
    agents: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, *arguments: str, log: Path, head: str, meeting: str = "", cwd: Path = ROOT) -> psutil.Popen:
        """Start an agent with arguments for `megatron_vlm.launch`; nodes meet at the address `head`, as `meeting` says.

        Code in the folder `cwd` comes before this repository's.
        """
        is_host = f"is_host={int(head.startswith(self.address + ':'))}"  # all have the same host name here
        flags = (
            "--rdzv-backend", "c10d", "--rdzv-endpoint", head, "--local-addr", self.address,
            "--rdzv-conf", f"{is_host},{meeting}" if meeting else is_host,
        )  # fmt: skip
        inside = ["ip", "netns", "exec", self.namespace] if self.namespace else []
        gloo = {"GLOO_SOCKET_IFNAME": self.interface} if self.interface else {}
        with log.open("a") as output:
            agent = psutil.Popen(
                [*inside, sys.executable, "-m", "megatron_vlm.launch", *flags, *arguments],
                cwd=cwd,
                env={
                    **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
                    **gloo,
                },
                stdout=output,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.agents.append(agent)
        return agent

    def kill(self) -> None:
        """As a power failure does: the agents and all their processes at once."""
        for agent in self.agents:
            if agent.poll() is None:
                processes = [psutil.Process(agent.pid), *psutil.Process(agent.pid).children(recursive=True)]
                for process in processes:
                    if process.is_running():
                        process.send_signal(signal.SIGKILL)
                agent.wait()
                psutil.wait_procs(processes, timeout=10)
        self.agents.clear()


def _ip(*arguments: str) -> bool:
    try:
        return subprocess.run(["ip", *arguments], stderr=subprocess.DEVNULL).returncode == 0
    except FileNotFoundError:
        return False


def _namespaces() -> list[Node]:
    """Two namespaces that see each other and nothing else; none where that is not allowed."""
    name = f"vlm{os.getpid()}"
    nodes = [Node(f"10.213.7.{i + 1}", f"{name}-{i}", f"{name}v{i}") for i in range(2)]
    first, second = nodes
    if not all(_ip("netns", "add", str(node.namespace)) for node in nodes):
        return []
    made = _ip(
        "link", "add", str(first.interface), "netns", str(first.namespace), "type", "veth",
        "peer", "name", str(second.interface), "netns", str(second.namespace),
    )  # fmt: skip
    for node in nodes if made else []:
        inside = ("-n", str(node.namespace))
        made &= _ip(*inside, "addr", "add", f"{node.address}/24", "dev", str(node.interface))
        made &= _ip(*inside, "link", "set", str(node.interface), "up") and _ip(*inside, "link", "set", "lo", "up")
    return nodes if made else []


@contextmanager
def two_nodes() -> Iterator[tuple[Node, Node, str]]:
    """Two nodes, and where they meet; what they started is killed afterwards."""
    first, second = _namespaces() or [Node("127.0.0.2"), Node("127.0.0.3")]
    try:
        yield first, second, f"{first.address}:{PORT if first.namespace else free_port()}"
    finally:
        for node in (first, second):
            node.kill()
        for number in range(2):
            _ip("netns", "delete", f"vlm{os.getpid()}-{number}")
