"""Images from http(s) addresses, for servers that allow it.

A client must not reach through the server what only the server can reach. So every address that a name resolves to has
to be public, the connection goes to the address that was checked, and each redirect is checked like the first address.
"""

from __future__ import annotations

import asyncio
import http.client
import ipaddress
import ssl
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from socket import SHUT_RDWR, SOCK_STREAM, create_connection, getaddrinfo
from urllib.parse import SplitResult, urljoin, urlsplit

from megatron_vlm.inference.server.errors import ApiError
from megatron_vlm.inference.server.settings import ServerSettings

_MOST_REDIRECTS = 3
_CHUNK = 1 << 16
_TRANSLATED = tuple(map(ipaddress.IPv6Network, ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")))
"""IPv6 networks whose addresses hold an IPv4 address that the packets may go to in the end."""
_threads = ThreadPoolExecutor(16, "fetch images")


class _Rejected(Exception):
    """Why an image was not fetched; for the client."""


async def fetch_all(urls: Sequence[tuple[str, str]], settings: ServerSettings) -> dict[str, bytes]:
    """Fetch images at the same time.

    Args:
        urls: (field of the request, http(s) address) of each.

    Returns:
        Field -> content.

    Raises:
        ApiError: one cannot be fetched within the limits.
    """
    loop = asyncio.get_running_loop()

    async def one(where: str, url: str) -> bytes:
        try:
            async with asyncio.timeout(settings.request_timeout):
                return await loop.run_in_executor(
                    _threads, fetch, url, settings.max_request_bytes, settings.request_timeout
                )
        except (_Rejected, TimeoutError) as error:
            reason = str(error) or f"it did not arrive within {settings.request_timeout:g} s"
            raise ApiError(400, f"{where}: the image was not fetched: {reason}", param=where) from error

    contents = await asyncio.gather(*(one(where, url) for where, url in urls))
    return dict(zip((where for where, _ in urls), contents, strict=True))


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        if any(ip in network for network in _TRANSLATED):
            return False
    return ip.is_global and not ip.is_multicast


def fetch(url: str, max_bytes: int, seconds: float) -> bytes:
    """The content at an http(s) address. Raises _Rejected with a reason."""
    deadline = time.monotonic() + seconds
    for _ in range(_MOST_REDIRECTS + 1):
        parts = _checked(url)
        try:
            found = _get(parts, _resolve(parts), max_bytes, deadline)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if time.monotonic() >= deadline:
                raise _Rejected(f"it did not arrive within {seconds:g} s") from error
            raise _Rejected(f"the connection to {parts.hostname} failed ({type(error).__name__})") from error
        if isinstance(found, bytes):
            return found
        url = urljoin(url, found)
    raise _Rejected(f"more than {_MOST_REDIRECTS} redirects")


def _checked(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise _Rejected(f"the address is malformed ({error})") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise _Rejected("the address, or one that it redirects to, is not http(s)://HOST/...")
    if parts.username is not None or parts.password is not None:
        raise _Rejected("addresses with a user or password are not accepted")
    if not url.isascii() or not url.isprintable() or " " in url:
        raise _Rejected("the address has characters that must be percent-encoded")
    return parts


def _port(parts: SplitResult) -> int:
    return parts.port or (443 if parts.scheme == "https" else 80)


def _resolve(parts: SplitResult) -> str:
    """The address to connect to. Raises _Rejected unless all addresses of the name are public."""
    try:
        found = getaddrinfo(parts.hostname, _port(parts), type=SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise _Rejected(f"there is no host {parts.hostname}") from error
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(map(is_public, addresses)):
        raise _Rejected(f"{parts.hostname} is not an address of the public internet")
    return addresses[0]


def _get(parts: SplitResult, address: str, max_bytes: int, deadline: float) -> bytes | str:
    """The content, or where the server redirects to."""
    connection = http.client.HTTPConnection(parts.netloc)
    with create_connection((address, _port(parts)), max(0.1, deadline - time.monotonic())) as plain:
        # A timeout of the socket begins again with every byte; this one does not.
        timer = threading.Timer(max(0.0, deadline - time.monotonic()), plain.shutdown, [SHUT_RDWR])
        timer.daemon = True
        timer.start()
        try:
            connection.sock = plain
            if parts.scheme == "https":
                context = ssl.create_default_context()
                connection.sock = context.wrap_socket(plain, server_hostname=parts.hostname)
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            headers = {"User-Agent": "megatron-vlm", "Accept": "image/*", "Accept-Encoding": "identity"}
            connection.request("GET", target, headers=headers)
            response = connection.getresponse()
            if response.status in (301, 302, 303, 307, 308) and response.getheader("Location"):
                return str(response.getheader("Location"))
            if response.status != 200:
                raise _Rejected(f"{parts.hostname} answered with status {response.status}")
            content = bytearray()
            while chunk := response.read(_CHUNK):
                content += chunk
                if len(content) > max_bytes:
                    raise _Rejected(f"it is larger than {max_bytes / 2**20:g} MiB")
            if time.monotonic() >= deadline:
                raise TimeoutError
            return bytes(content)
        finally:
            timer.cancel()
            connection.close()
