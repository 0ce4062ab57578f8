"""From a URL to a bus."""

from __future__ import annotations

from urllib.parse import urlsplit

from anyio.lowlevel import RunVar

from ._bus import StreamBus
from ._checks import refuse
from ._options import StreamBusOptions
from .abc import StreamBackend
from .backends.memory import MemoryBackend

_shared: RunVar[dict[str, MemoryBackend]] = RunVar("anybus_shared_memory")


def connect(url: str, options: StreamBusOptions | None = None) -> StreamBus:
    """A bus on the backend that the URL names, to be entered with ``async with``.

    ``memory://`` is private to this bus; ``memory://name`` is shared by all buses of that name in this event loop.

    :raises ValidationError: if the URL's scheme is unknown, or the rest of it makes no sense.
    """
    if not isinstance(url, str):
        refuse("url", url, "a str such as 'memory://'")
    parts = urlsplit(url)
    if parts.scheme != "memory" or not url.startswith("memory://"):
        refuse("url", url, "'memory://' or 'memory://<name>'")
    if parts.path or parts.query or parts.fragment or "@" in parts.netloc or ":" in parts.netloc:
        refuse("url", url, "'memory://' or 'memory://<name>', without anything after the name")
    return StreamBus(_memory(parts.netloc), options)


def _memory(name: str) -> StreamBackend:
    if not name:
        return MemoryBackend()
    try:
        backends = _shared.get()
    except LookupError:
        backends = dict[str, MemoryBackend]()
        _shared.set(backends)
    return backends.setdefault(name, MemoryBackend())
