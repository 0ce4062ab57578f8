"""Where the server is and who we are there: from a URL, or from a client that is configured already."""

from __future__ import annotations

import inspect
import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import parse_qs, unquote, urlsplit

import redis.connection
from redis.credentials import CredentialProvider, UsernamePasswordCredentialProvider

from ..._checks import check_delay, refuse
from ..._errors import UnsupportedError

_TLS_OPTIONS = frozenset(
    {
        "ssl_ca_certs",
        "ssl_ca_data",
        "ssl_ca_path",
        "ssl_cert_reqs",
        "ssl_certfile",
        "ssl_check_hostname",
        "ssl_ciphers",
        "ssl_keyfile",
        "ssl_min_version",
        "ssl_password",
    }
)
_URL_OPTIONS = _TLS_OPTIONS | {"client_name", "db", "password", "username"}
_CLIENT_OPTIONS = _URL_OPTIONS | {
    "credential_provider",
    "host",
    "path",
    "port",
    "ssl_exclude_verify_flags",
    "ssl_include_verify_flags",
}
_OCSP = ("ssl_validate_ocsp", "ssl_validate_ocsp_stapled", "ssl_ocsp_context", "ssl_ocsp_expected_cert")
_REQUIREMENTS = {
    "none": ssl.CERT_NONE,
    "optional": ssl.CERT_OPTIONAL,
    "required": ssl.CERT_REQUIRED,
    "CERT_NONE": ssl.CERT_NONE,
    "CERT_OPTIONAL": ssl.CERT_OPTIONAL,
    "CERT_REQUIRED": ssl.CERT_REQUIRED,
}


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
        for name in ("connect_timeout", "command_timeout"):
            object.__setattr__(self, name, check_delay(name, getattr(self, name), positive=True))

    @property
    def place(self) -> str:
        """Where the server is, for people: without credentials."""
        return self.path if self.path is not None else f"{self.host}:{self.port}"


def from_url(url: str, **more: Any) -> Settings:
    """
    :raises ValidationError: if the URL cannot be understood, or asks for what is not known here.
    """
    given = _understood(url)
    if given is None:
        # Neither the URL nor what the parser says of it is repeated: a password that is not escaped may be in either.
        refuse("url", "the given URL", "redis://, rediss:// or unix:// with valid parts, user and password %-escaped")
    secure = url.startswith("rediss://")
    allowed = _URL_OPTIONS if secure else _URL_OPTIONS - _TLS_OPTIONS
    unknown = sorted(parse_qs(urlsplit(url).query, keep_blank_values=True).keys() - allowed)
    if unknown:
        refuse("url", f"with {', '.join(unknown)}", f"without other options than {', '.join(sorted(allowed))}")
    given.pop("connection_class", None)
    return _settings(given, secure=secure, **more)


def _understood(url: str) -> dict[str, Any] | None:
    """The URL's parts by redis-py's names, where every part of it has a meaning."""
    try:
        parts = urlsplit(url)
        given = dict(_parse_url(url))
    except (ValueError, TypeError, AttributeError):
        return None
    if parts.fragment:
        return None
    if parts.scheme == "unix":
        return given if given.get("path") and not parts.hostname else None
    # redis-py takes whatever is no number for the database 0.
    return given if re.fullmatch(r"(/\d*)?/?", unquote(parts.path), re.ASCII) else None


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
    given = {name: value for name, value in pool.connection_kwargs.items() if name in _CLIENT_OPTIONS}
    if any(pool.connection_kwargs.get(name) for name in _OCSP):
        raise UnsupportedError("OCSP is not supported: clients that ask for it would not get what they ask for")
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
    requirement = given.get("ssl_cert_reqs", "required")
    if requirement is None:
        requirement = ssl.CERT_NONE
    if not isinstance(requirement, ssl.VerifyMode):
        if requirement not in _REQUIREMENTS:
            refuse("ssl_cert_reqs", requirement, "'required', 'optional' or 'none'")
        requirement = _REQUIREMENTS[requirement]
    check = str(given.get("ssl_check_hostname", True)).lower() not in ("false", "no", "0", "n", "f")
    try:
        context = ssl.create_default_context(
            cafile=given.get("ssl_ca_certs"), capath=given.get("ssl_ca_path"), cadata=given.get("ssl_ca_data")
        )
        context.check_hostname = check and requirement is not ssl.CERT_NONE
        context.verify_mode = requirement
        if given.get("ssl_certfile"):
            # An empty password rather than none: OpenSSL would ask for one at the terminal.
            password = given.get("ssl_password") or ""
            context.load_cert_chain(given["ssl_certfile"], given.get("ssl_keyfile"), password)
        if given.get("ssl_min_version") is not None:
            context.minimum_version = ssl.TLSVersion(int(given["ssl_min_version"]))
        if given.get("ssl_ciphers"):
            context.set_ciphers(given["ssl_ciphers"])
    except (OSError, ValueError, TypeError) as error:
        named = {name: given[name] for name in _TLS_OPTIONS - {"ssl_password", "ssl_ca_data"} if given.get(name)}
        refuse("ssl options", named, f"files and values that can be used ({error})")
    for flag in given.get("ssl_include_verify_flags") or ():
        context.verify_flags |= flag
    for flag in given.get("ssl_exclude_verify_flags") or ():
        context.verify_flags &= ~flag
    return context
