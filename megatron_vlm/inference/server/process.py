"""The process of the server: a socket at once, the engine when it is loaded, and an end that finishes what runs.

Rank 0 of a torchrun job serves HTTP; the other ranks run the engine's steps. HTTP has a thread of its own, so that
`/health` answers while the model is being loaded in the main thread.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from contextlib import AbstractContextManager
from types import FrameType

import uvicorn

from megatron_vlm.inference.engine import Engine
from megatron_vlm.inference.request import EngineError
from megatron_vlm.inference.server.app import create_app
from megatron_vlm.inference.server.backend import Backend
from megatron_vlm.inference.server.settings import ServerSettings

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_KEEP_ALIVE = 30
"""Seconds for which an idle connection stays open."""
_LAST_ANSWERS = 5.0
"""Seconds for the answers to cancelled requests to be sent."""


class _Stopped(BaseException):
    """A signal came while the model was being loaded."""


def follow(opened: AbstractContextManager[Engine | None]) -> None:
    """Run the steps of rank 0's engine on another rank until it is closed; `opened` opens it.

    A signal to stop goes to every rank. Rank 0 alone heeds it, because it needs the others for the running requests.
    """
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    with opened as engine:
        assert engine is None  # it is on rank 0


class ServerProcess:
    """Rank 0. `run` returns after SIGTERM or SIGINT, when the running requests are finished."""

    def __init__(self, settings: ServerSettings) -> None:
        """Raises OSError if the address cannot be used."""
        self.settings = settings
        self._socket = _listen(settings.host, settings.port)
        self._backend = Backend(settings)
        self._http = uvicorn.Server(
            uvicorn.Config(
                create_app(self._backend),
                log_config=None,
                access_log=False,
                lifespan="off",
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE,
            )
        )
        self._thread = threading.Thread(target=self._http.run, args=[[self._socket]], name="http", daemon=True)
        self._stop = threading.Event()
        self._loading = True

    @property
    def url(self) -> str:
        """Where the server listens."""
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def run(self, opened: AbstractContextManager[Engine | None]) -> None:
        """Enter `opened`, which loads the model, and answer requests inside it.

        Raises:
            EngineError: the engine failed, for example because another rank died. All requests were answered with it.
        """
        for number in _STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        self._thread.start()
        print(f"listening on {self.url}, loading {self.settings.model_name}", flush=True)
        try:
            with opened as engine:
                assert engine is not None  # this is rank 0
                self._loading = False
                self._backend.ready(engine)
                print(f"ready: {self.url} serves {self.settings.model_name}", flush=True)
                self._wait(engine)
                self._finish(engine)
        except _Stopped:
            print("stopped while the model was being loaded", flush=True)
        finally:
            self._loading = False
            self._end_http(_LAST_ANSWERS)
            self._backend.close()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stop.is_set():
            print("stopped at once, by a second signal", file=sys.stderr, flush=True)
            os._exit(128 + number)
        self._stop.set()
        if self._loading:
            raise _Stopped

    def _wait(self, engine: Engine) -> None:
        """Until a signal comes. Raises EngineError if the engine or the HTTP thread ends before."""
        while not self._stop.wait(0.1):
            if engine.failure is not None:
                raise engine.failure
            if not self._thread.is_alive():
                raise EngineError("The thread that serves HTTP has ended.")

    def _finish(self, engine: Engine) -> None:
        """Accept nothing more and finish the running requests; cancel those that take too long."""
        running = engine.stats()
        print(f"stopping: {running.running + running.waiting} requests to finish", flush=True)
        if not self._end_http(self.settings.shutdown_timeout):
            print(f"requests are cancelled, {self.settings.shutdown_timeout:g} s after the signal", flush=True)
        engine.close(drain=False)
        if engine.failure is not None:  # a rank's death brings a signal of torchrun's, too
            raise engine.failure

    def _end_http(self, timeout: float) -> bool:
        """Close the socket and wait until the requests are answered; whether they all were in time."""
        self._http.should_exit = True
        self._thread.join(timeout)
        return not self._thread.is_alive()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=2048)
