"""Settings of the server: where it listens, what it accepts, how long it waits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServerSettings:
    """Limits protect the server from its clients; see docs/serving.md."""

    model_name: str
    """`model` in requests and responses."""
    host: str = "127.0.0.1"
    port: int = 5000
    """0: any free port."""
    api_keys: tuple[str, ...] = ()
    """A request needs one of them; empty: no key is needed."""
    default_max_tokens: int = 256
    """New tokens of a request that does not say how many; fewer if the prompt leaves less room."""
    allow_remote_images: bool = False
    """Fetch images from http(s) addresses, those of the public internet only."""
    max_images: int = 16
    """Images of a request."""
    max_image_pixels: int = 40_000_000
    """Pixels of all images of a request; a small file can claim any size, so nothing larger is decoded."""
    max_request_bytes: int = 32 * 2**20
    request_timeout: float = 60.0
    """Seconds in which the whole body of a request must arrive, and those of its remote images."""
    shutdown_timeout: float = 60.0
    """Seconds that running requests may take after SIGTERM; then they are cancelled."""
    encode_threads: int = 4
    """Requests whose images are decoded and tiled at the same time."""
