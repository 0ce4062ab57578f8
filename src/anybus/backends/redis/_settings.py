"""Where the server is and who we are there: from a URL, or from a client that is configured already."""

from __future__ import annotations

import inspect
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import redis.connection
from redis.credentials import CredentialProvider, UsernamePasswordCredentialProvider

from ..._checks import check_delay, refuse
from ..._errors import UnsupportedError

_URL_OPTIONS = frozenset(
    {
        "client_name",
        "credential_provider",
        "db",
        "host",
        "password",
        "path",
        "port",
        "username",
        "ssl_ca_certs",
        "ssl_ca_path",
        "ssl_cert_reqs",
        "ssl_certfile",
        "ssl_check_hostname",
        "ssl_keyfile",
        "ssl_keyfile_password",
    }
)


_parse_url = cast("Callable[[str], dict[str, Any]]", redis.connection.parse_url)  # pyright: ignore[reportUnknownMemberType]


@dataclass(frozen=True)
class Settings:
    """How to open a connection. Durations are seconds."""

    host: str = "localhost"
    port: int = 6379
    path: str | None = None
    db: int = 0
    credentials: CredentialProvider | None = field(default=None, repr=False)
    client_name: str | None = None
    tls: ssl.SSLContext | None = None
    tls_hostname: str | None = None
    connect_timeout: float = 5.0
    command_timeout: float = 5.0

    def __post_init__(self) -> None:
        check_delay("connect_timeout", self.connect_timeout, positive=True)
        check_delay("command_timeout", self.command_timeout, positive=True)

    @property
    def place(self) -> str:
        """Where the server is, for people: without credentials."""
        return self.path if self.path is not None else f"{self.host}:{self.port}"


def from_url(url: str, **more: Any) -> Settings:
    """
    :raises ValidationError: if the URL cannot be understood, or asks for what is not known here.
    """
    try:
        given: dict[str, Any] = dict(_parse_url(url))
    except (ValueError, TypeError) as error:
        # The URL itself may hold a password: it is not repeated.
        refuse("url", "the given URL", f"redis://, rediss:// or unix:// with valid parts ({error})")
    secure = url.startswith("rediss://")
    given.pop("connection_class", None)
    unknown = sorted(given.keys() - _URL_OPTIONS)
    if unknown:
        refuse("url", f"with {', '.join(unknown)}", f"without other options than {', '.join(sorted(_URL_OPTIONS))}")
    return _settings(given, secure=secure, **more)


def from_client(client: Any, **more: Any) -> Settings:
    """
    :raises UnsupportedError: if the client is one for a cluster, or behind a sentinel.
    :raises ValidationError: if it is no redis-py client.
    """
    pool = getattr(client, "connection_pool", None)
    if pool is None or not hasattr(pool, "connection_kwargs"):
        if type(client).__name__.endswith("Cluster"):
            raise UnsupportedError("clients of a cluster are not supported yet")
        refuse("client", client, "a redis.Redis or redis.asyncio.Redis")
    if "Sentinel" in type(pool).__name__:
        raise UnsupportedError("clients behind a sentinel are not supported yet")
    given = {name: value for name, value in pool.connection_kwargs.items() if name in _URL_OPTIONS}
    names = [base.__name__ for base in inspect.getmro(pool.connection_class)]
    return _settings(given, secure="SSLConnection" in names, **more)


def _settings(given: dict[str, Any], *, secure: bool, **more: Any) -> Settings:
    credentials = given.get("credential_provider")
    if credentials is None and (given.get("password") is not None or given.get("username") is not None):
        credentials = UsernamePasswordCredentialProvider(given.get("username"), given.get("password"))
    context = _tls_context(given) if secure else None
    return Settings(
        host=given.get("host") or "localhost",
        port=int(given.get("port") or 6379),
        path=given.get("path"),
        db=int(given.get("db") or 0),
        credentials=credentials,
        client_name=given.get("client_name"),
        tls=context,
        tls_hostname=given.get("host") or "localhost",
        **more,
    )


def _tls_context(given: dict[str, Any]) -> ssl.SSLContext:
    """Verification is on unless the URL or the client says otherwise, in redis-py's own words."""
    context = ssl.create_default_context(cafile=given.get("ssl_ca_certs"), capath=given.get("ssl_ca_path"))
    requirement = given.get("ssl_cert_reqs", "required")
    check = given.get("ssl_check_hostname", True)
    if requirement in ("none", ssl.CERT_NONE, None):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        context.check_hostname = str(check).lower() not in ("false", "no", "0", "n", "f")
        context.verify_mode = ssl.CERT_OPTIONAL if requirement in ("optional", ssl.CERT_OPTIONAL) else ssl.CERT_REQUIRED
    if given.get("ssl_certfile"):
        context.load_cert_chain(given["ssl_certfile"], given.get("ssl_keyfile"), given.get("ssl_keyfile_password"))
    return context
