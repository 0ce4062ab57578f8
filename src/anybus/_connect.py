"""``connect``: create a bus from a URL."""

from __future__ import annotations

from urllib.parse import urlsplit

from ._bus import StreamBus
from ._ground.checks import check_url, refuse
from ._ground.errors import UnsupportedError, ValidationError
from ._options import StreamBusOptions
from .abc import Codec, StreamBackend
from .backends.memory.backend import MemoryBackend

_ALLOWED = (
    "'memory://', 'memory://<name>', 'redis://…', 'rediss://…' (TLS), 'valkey://…', 'valkeys://…' (TLS), 'unix://…', "
    "'redis+sentinel://…', 'rediss+sentinel://…' (TLS), 'redis+cluster://…' or 'rediss+cluster://…' (TLS)"
)
_REDIS = ("redis", "rediss", "valkey", "valkeys")


def connect(url: str, options: StreamBusOptions | None = None, *, codec: Codec | None = None) -> StreamBus:
    """Create a bus on the backend that the URL names. Enter it with ``async with``; that opens the connection.

    ``memory://`` is private to this bus. All buses with the same ``memory://name`` in one event loop share their
    streams. ``redis://``, ``rediss://`` (TLS) and ``unix://`` need the extra ``anybus[redis]``. ``valkey://`` means
    ``redis://``, and ``valkeys://`` means ``rediss://``. ``redis+sentinel://host,host/service`` asks sentinels for the
    server. ``redis+cluster://host,host`` asks nodes of a cluster for the others.

    :param codec: how messages are encoded on a server; None = JSON. Not allowed for ``memory://``, where nothing is
        encoded.
    :raises ValidationError: if the URL's scheme is unknown, or another part of the URL is invalid.
    :raises UnsupportedError: if the extra is not installed.
    """
    url = check_url(url, _ALLOWED)
    scheme, separator, _ = url.partition("://")
    if separator and scheme == "memory":
        if codec is not None:
            refuse("codec", codec, "unset for memory://, where nothing is encoded")
        return StreamBus(_memory(url), options)
    server = scheme.removesuffix("+sentinel").removesuffix("+cluster")
    if not separator or (server not in _REDIS and scheme != "unix"):
        if not separator:
            raise ValidationError(f"url must be {_ALLOWED}, not a text without '://'")
        # A URL may hold a password, so only the scheme is shown.
        refuse("url", f"{scheme}://…", _ALLOWED)
    return StreamBus(_redis(url, codec), options)


def _memory(url: str) -> StreamBackend:
    try:
        parts = urlsplit(url)
    except ValueError:
        refuse("url", url, "'memory://' or 'memory://<name>'")
    if parts.path or parts.query or parts.fragment or "@" in parts.netloc or ":" in parts.netloc:
        # The part before an @ may be a password.
        shown = "memory://…" if "@" in url else url
        refuse("url", shown, "'memory://' or 'memory://<name>', without user, port, path or query")
    return MemoryBackend(parts.netloc or None)


def _redis(url: str, codec: Codec | None) -> StreamBackend:
    try:
        from .backends.redis import RedisBackend  # noqa: PLC0415 - needs the extra
    except ImportError as error:
        scheme = url.partition("://")[0]
        raise UnsupportedError(f"{scheme}:// needs the extra 'redis': pip install 'anybus[redis]'") from error
    return RedisBackend(url, codec=codec)
