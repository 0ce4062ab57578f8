"""The server's address and the credentials, from a URL or from a configured redis-py client."""

from __future__ import annotations

import inspect
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import redis.connection
from redis.credentials import CredentialProvider, UsernamePasswordCredentialProvider

from ..._ground.checks import check_delay, check_text, refuse
from ..._ground.errors import UnsupportedError, ValidationError
from ._url import MAX_DATABASE, checked_url

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
        """The server's address, for texts: without credentials."""
        if self.path is not None:
            return self.path
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def from_url(url: str, **more: Any) -> Settings:
    """
    :raises ValidationError: if the URL is invalid, or has unknown options.
    """
    text = checked_url(url, _URL_OPTIONS, _TLS_OPTIONS)
    try:
        given = dict(_parse_url(text))
    except (ValueError, TypeError, AttributeError):
        # The error shows neither the URL nor the parser's text: both may contain a password that is not escaped.
        given = None
    if given is None:
        raise ValidationError("url must be one that redis-py can parse (user and password %-escaped)")
    given.pop("connection_class", None)
    return _settings(given, secure=text.startswith("rediss://"), **more)


def from_client(client: Any, **more: Any) -> Settings:
    """
    :raises UnsupportedError: if the client is for a cluster, is behind a sentinel, or checks certificates by OCSP.
    :raises ValidationError: if it is not a redis-py client.
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
        raise UnsupportedError("OCSP is not supported: the certificate check that this client demands would be skipped")
    names = [base.__name__ for base in inspect.getmro(pool.connection_class)]
    return _settings(given, secure="SSLConnection" in names, **more)


def _settings(given: dict[str, Any], *, secure: bool, **more: Any) -> Settings:
    credentials = given.get("credential_provider")
    if credentials is None and (given.get("password") is not None or given.get("username") is not None):
        credentials = UsernamePasswordCredentialProvider(given.get("username"), given.get("password"))
    context = _tls_context(given) if secure else None
    return Settings(
        host=_text("host", given) or "localhost",
        port=_number("port", given, 6379, least=1, most=65535),
        path=_text("path", given),
        db=_number("db", given, 0, least=0, most=MAX_DATABASE),
        credentials=credentials,
        client_name=_text("client_name", given),
        tls=context,
        tls_hostname=_text("host", given) or "localhost",
        **more,
    )


def _text(name: str, given: dict[str, Any]) -> str | None:
    value = given.get(name)
    return None if value is None else check_text(name, value)


def _number(name: str, given: dict[str, Any], default: int, *, least: int, most: int) -> int:
    """A number. Like redis-py, this accepts its digits as text."""
    value = given.get(name)
    if value is None:
        return default
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = -1
    if not least <= number <= most:
        refuse(name, value, f"a number from {least} to {most}")
    return number


def _tls_context(given: dict[str, Any]) -> ssl.SSLContext:
    """The TLS context. Certificates are verified unless the URL or the client says otherwise, by redis-py's options."""
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
            # An empty password, because without one OpenSSL would ask for it at the terminal.
            password = given.get("ssl_password") or ""
            context.load_cert_chain(given["ssl_certfile"], given.get("ssl_keyfile"), password)
        if given.get("ssl_min_version") is not None:
            context.minimum_version = ssl.TLSVersion(int(given["ssl_min_version"]))
        if given.get("ssl_ciphers"):
            context.set_ciphers(given["ssl_ciphers"])
    except (OSError, ValueError, TypeError) as error:
        named = {name: given[name] for name in _TLS_OPTIONS - {"ssl_password", "ssl_ca_data"} if given.get(name)}
        refuse("ssl options", named, f"usable files and values ({error})")
    for flag in given.get("ssl_include_verify_flags") or ():
        context.verify_flags |= flag
    for flag in given.get("ssl_exclude_verify_flags") or ():
        context.verify_flags &= ~flag
    return context
