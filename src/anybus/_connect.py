"""From a URL to a bus."""

from __future__ import annotations

from urllib.parse import urlsplit

from ._bus import StreamBus
from ._ground.checks import check_url, refuse
from ._ground.errors import UnsupportedError
from ._options import StreamBusOptions
from .abc import Codec, StreamBackend
from .backends.memory.backend import MemoryBackend

_ALLOWED = (
    "'memory://', 'memory://<name>', 'redis://…', 'rediss://…' (TLS), 'valkey://…', 'valkeys://…' (TLS) or 'unix://…'"
)


def connect(url: str, options: StreamBusOptions | None = None, *, codec: Codec | None = None) -> StreamBus:
    """A bus on the backend that the URL names, to be entered with ``async with``.

    ``memory://`` is private to this bus; ``memory://name`` is shared by all buses of that name in this event loop.
    ``redis://``, ``rediss://`` (TLS) and ``unix://`` need the extra ``anybus[redis]``; ``valkey://`` and ``valkeys://``
    are other words for the first two.

    :param codec: how messages are written on a server; JSON unless given. (In memory nothing is encoded.)
    :raises ValidationError: if the URL's scheme is unknown, or the rest of it makes no sense.
    :raises UnsupportedError: if the extra is not installed, or the URL is one of a cluster or sentinel.
    """
    url = check_url(url, _ALLOWED)
    scheme, separator, _ = url.partition("://")
    if separator and scheme == "memory":
        if codec is not None:
            refuse("codec", codec, "unset for memory://, where nothing is encoded")
        return StreamBus(_memory(url), options)
    if not separator or scheme not in ("redis", "rediss", "unix", "valkey", "valkeys"):
        # A URL may hold a password: no more of it is shown than its scheme.
        refuse("url", f"{scheme}://…" if separator else "a text without '://'", _ALLOWED)
    return StreamBus(_redis(url, codec), options)


def _memory(url: str) -> StreamBackend:
    try:
        parts = urlsplit(url)
    except ValueError:
        refuse("url", url, "'memory://' or 'memory://<name>'")
    if parts.path or parts.query or parts.fragment or "@" in parts.netloc or ":" in parts.netloc:
        # What stands before an @ may be a password.
        shown = "memory://…" if "@" in url else url
        refuse("url", shown, "'memory://' or 'memory://<name>', without user, port, path or query")
    return MemoryBackend(parts.netloc or None)


def _redis(url: str, codec: Codec | None) -> StreamBackend:
    try:
        from .backends.redis import RedisBackend  # noqa: PLC0415 - only for those who installed the extra
    except ImportError as error:
        raise UnsupportedError(f"{url.partition('://')[0]}:// needs the extra: pip install 'anybus[redis]'") from error
    return RedisBackend(url, codec=codec)
