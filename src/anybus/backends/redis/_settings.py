"""The server's address and the credentials, from a URL or from a configured redis-py client."""

from __future__ import annotations

import inspect
import ssl
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import anyio
import redis.connection
from redis.credentials import CredentialProvider, UsernamePasswordCredentialProvider

from ..._ground.checks import check_delay, check_text, refuse
from ..._ground.errors import UnsupportedError, ValidationError
from ._url import MAX_DATABASE, checked_url, cluster_url, sentinel_url

if TYPE_CHECKING:
    from ._link import Link

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


_MOST_NAMED = 3

_parse_url = cast("Callable[[str], dict[str, Any]]", redis.connection.parse_url)  # pyright: ignore[reportUnknownMemberType]


class Locator(ABC):
    """Opens connections to a server whose address changes.

    :ivar news: set, and replaced by a new event, when another address becomes known.
    """

    news: anyio.Event

    @abstractmethod
    async def open(self, *, entering: bool) -> Link:
        """Like ``open_link``."""

    @abstractmethod
    async def watch(self) -> None:
        """Close the connections to a server that has been replaced, as soon as this is known. Runs until cancelled."""


@dataclass(frozen=True)
class Settings:
    """How to open a connection. Durations are seconds.

    :ivar service: the name under which sentinels know the server; None = the server has a fixed address.
    :ivar sentinels: how to connect to each sentinel. None if this is a connection to a known address.
    :ivar seeds: the nodes that are asked first for the slots of a cluster. None if this is a connection to one server.
    :ivar cluster: whether the server is a node of a cluster.
    :ivar asking: whether this node is asked to serve streams that are being moved to it.
    :ivar locator: opens the connection instead, to where the server is at that time.
    """

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
    service: str | None = None
    sentinels: tuple[Settings, ...] = ()
    seeds: tuple[Settings, ...] = ()
    cluster: bool = False
    asking: bool = False
    locator: Locator | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("connect_timeout", "command_timeout"):
            object.__setattr__(self, name, check_delay(name, getattr(self, name), positive=True))

    @property
    def place(self) -> str:
        """The server's address, for texts: without credentials."""
        if self.sentinels:
            return f"service {self.service!r}"
        if self.seeds:
            return f"the cluster of {', '.join(seed.place for seed in self.seeds[:_MOST_NAMED])}"
        if self.path is not None:
            return self.path
        address = f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
        return address if self.service is None else f"{address} (service {self.service!r})"

    def at(self, host: str, port: int) -> Settings:
        """The settings of a connection to this address, which the sentinels or the cluster's nodes have told."""
        return replace(self, host=host, port=port, path=None, tls_hostname=host, sentinels=(), seeds=(), locator=None)

    def as_cluster(self, *seeds: Settings) -> Settings:
        """The settings of the cluster to which these servers belong.

        :raises UnsupportedError: if they name a database, or come from sentinels.
        """
        if self.sentinels:
            raise UnsupportedError(
                f"{self.place} is a node of a cluster, not one behind sentinels: use redis+cluster://"
            )
        if self.db:
            raise UnsupportedError(f"only database 0 of a cluster can be used, not {self.db}")
        named = tuple(replace(seed, cluster=True) for seed in seeds)
        return replace(self, cluster=True, seeds=named, locator=None)


def from_url(url: str, **more: Any) -> Settings:
    """
    :raises ValidationError: if the URL is invalid, or has unknown options.
    """
    named = cluster_url(url)
    if named is not None:
        settings = _from_server_url(named[0], **more)
        return settings.as_cluster(*(settings.at(host, port) for host, port in named[1]))
    parts = sentinel_url(url, _URL_OPTIONS, _TLS_OPTIONS)
    if parts is None:
        return _from_server_url(url, **more)
    settings = _from_server_url(parts.server, **more)
    own: dict[str, Any] = {"username": parts.username, "password": parts.password}
    sentinels = tuple(
        replace(settings, host=host, port=port, tls_hostname=host, db=0, credentials=_credentials(own))
        for host, port in parts.addresses
    )
    return replace(settings, service=parts.service, sentinels=sentinels)


def _from_server_url(url: str, **more: Any) -> Settings:
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
    :raises UnsupportedError: if the client checks certificates by OCSP, if it is behind sentinels and is for replicas
        or has options for the sentinels' answers, or if it is for a cluster and translates addresses.
    :raises ValidationError: if it is not a redis-py client.
    """
    pool = getattr(client, "connection_pool", None)
    if pool is None or not hasattr(pool, "connection_kwargs"):
        if getattr(client, "nodes_manager", None) is not None:
            return _of_cluster(client, **more)
        refuse("client", client, "a redis.Redis or redis.asyncio.Redis, or a RedisCluster")
    given = {name: value for name, value in pool.connection_kwargs.items() if name in _CLIENT_OPTIONS}
    if any(pool.connection_kwargs.get(name) for name in _OCSP):
        raise UnsupportedError("OCSP is not supported: the certificate check that this client demands would be skipped")
    names = [base.__name__ for base in inspect.getmro(pool.connection_class)]
    settings = _settings(given, secure="SSLConnection" in names, **more)
    manager = getattr(pool, "sentinel_manager", None)
    return settings if manager is None else _behind_sentinels(settings, pool, manager, **more)


def _of_cluster(client: Any, **more: Any) -> Settings:
    """
    :param client: redis-py's ``RedisCluster``.
    """
    nodes = client.nodes_manager
    if getattr(nodes, "address_remap", None) is not None:
        raise UnsupportedError("address_remap is not supported: it would be ignored")
    # The asynchronous client keeps them itself.
    kept: dict[str, Any] = getattr(client, "connection_kwargs", None) or nodes.connection_kwargs
    if any(kept.get(name) for name in _OCSP):
        raise UnsupportedError("OCSP is not supported: the certificate check that this client demands would be skipped")
    given = {name: value for name, value in kept.items() if name in _CLIENT_OPTIONS - {"host", "port", "path"}}
    connection = kept.get("connection_class")
    secure = bool(kept.get("ssl")) or (
        connection is not None and "SSLConnection" in [base.__name__ for base in inspect.getmro(connection)]
    )
    settings = _settings(given, secure=secure, **more)
    seeds = [settings.at(str(node.host), int(node.port)) for node in nodes.startup_nodes.values()]
    if not seeds:
        raise ValidationError("client must have at least one startup node")
    return replace(settings, host=seeds[0].host, port=seeds[0].port).as_cluster(*seeds)


def _behind_sentinels(settings: Settings, pool: Any, manager: Any, **more: Any) -> Settings:
    """
    :param manager: redis-py's ``Sentinel``, which has a client for each sentinel.
    """
    if not pool.is_master:
        raise UnsupportedError("a client for replicas is not supported: the bus writes (use master_for)")
    if manager.min_other_sentinels or getattr(manager, "_force_master_ip", None) is not None:
        raise UnsupportedError("min_other_sentinels and force_master_ip are not supported: they would be ignored")
    service = pool.service_name.decode() if isinstance(pool.service_name, bytes) else str(pool.service_name)
    sentinels = tuple(from_client(sentinel, **more) for sentinel in manager.sentinels)
    if not sentinels:
        raise ValidationError("client must have at least one sentinel")
    return replace(settings, service=service, sentinels=sentinels)


def _credentials(given: dict[str, Any]) -> CredentialProvider | None:
    provider: CredentialProvider | None = given.get("credential_provider")
    if provider is None and (given.get("password") is not None or given.get("username") is not None):
        return UsernamePasswordCredentialProvider(given.get("username"), given.get("password"))
    return provider


def _settings(given: dict[str, Any], *, secure: bool, **more: Any) -> Settings:
    context = _tls_context(given) if secure else None
    return Settings(
        host=_text("host", given) or "localhost",
        port=_number("port", given, 6379, least=1, most=65535),
        path=_text("path", given),
        db=_number("db", given, 0, least=0, most=MAX_DATABASE),
        credentials=_credentials(given),
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
