"""Call a function in a process of its own, so that its time and memory are not mixed with the caller's."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


def run_in_own_process(function: Callable[..., Any], *arguments: Any, what: str, fork: bool = False) -> Any:
    """Return `function(*arguments)`, called in a new process (spawned or forked); `what` names the call in errors.

    Raises:
        RuntimeError: the process ended without a result; its own message is on stderr.
    """
    context = multiprocessing.get_context("fork") if fork else multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(sender, function, *arguments))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        raise RuntimeError(f"{what} failed, see above") from None
    process.join()
    return result


def _send_result(sender: Connection, function: Callable[..., Any], *arguments: Any) -> None:
    sender.send(function(*arguments))
