"""Checks a server's URL before redis-py parses it, which silently replaces invalid parts by defaults.

No error shows a password. A password that is not %-escaped may be in any part of the URL. So a part is shown only if it
is short, and no ``@`` comes after it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Final, NoReturn
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

from ..._ground.checks import check_url
from ..._ground.errors import ValidationError

SCHEMES: Final = {"redis": "redis", "rediss": "rediss", "unix": "unix", "valkey": "redis", "valkeys": "rediss"}
"""What each scheme means to redis-py."""

_SENTINEL_SCHEMES: Final = {f"{scheme}+sentinel": scheme for scheme in SCHEMES if scheme != "unix"}
_CLUSTER_SCHEMES: Final = {f"{scheme}+cluster": scheme for scheme in SCHEMES if scheme != "unix"}
_CLUSTER_FORM: Final = "redis+cluster://host:6379,host:6379"
_CLUSTER_PORT: Final = 6379
_SENTINEL_PORT: Final = 26379
_SENTINEL_OPTIONS: Final = {"sentinel_username", "sentinel_password"}
_SENTINEL_FORM: Final = "redis+sentinel://host:26379,host:26379/service"

_ALLOWED: Final = "redis://, rediss://, valkey://, valkeys://, unix://, redis+sentinel:// or redis+cluster://"
_LONGEST_SHOWN: Final = {"port": 5, "database": 20}
MAX_DATABASE: Final = 2**31 - 1


def checked_url(url: object, options: AbstractSet[str], tls_options: AbstractSet[str]) -> str:
    """Check that every part of the URL is valid. Returns the URL with a scheme that redis-py knows.

    :raises ValidationError: if a part is invalid. The text names the part, and what is allowed there.
    """
    text = check_url(url, _ALLOWED)
    scheme, separator, rest = text.partition("://")
    if not separator or scheme not in SCHEMES:
        raise ValidationError(f"url must begin with {_ALLOWED}")
    text = f"{SCHEMES[scheme]}://{rest}"
    try:
        parts = urlsplit(text)
    except ValueError:
        _refuse("an IPv6 address in closed brackets, if the host is one: redis://[::1]:6379")
    if parts.fragment or text.endswith("#"):
        _refuse("no '#': write it as %23 in a user, password or path")
    given = _options(parts, _known(scheme, options, tls_options))
    if parts.scheme == "unix":
        _check_socket(parts)
    else:
        _check_host(parts)
        _check_database_path(parts, given)
    _check_database("db", given.get("db"), parts)
    _check_credentials(parts, given)
    return text


@dataclass(frozen=True)
class SentinelUrl:
    """The parts of a URL that names sentinels.

    :ivar server: a URL with all that is known of the server itself: user, password, database and options. Its host
        means nothing.
    """

    server: str = field(repr=False)
    service: str
    addresses: tuple[tuple[str, int], ...]
    username: str | None = None
    password: str | None = field(default=None, repr=False)


def sentinel_url(url: object, options: AbstractSet[str], tls_options: AbstractSet[str]) -> SentinelUrl | None:
    """Split a URL that names sentinels. Returns None if this URL names a server.

    :raises ValidationError: if a part is invalid. (The parts of ``server`` are checked by :func:`checked_url`.)
    """
    scheme, _, rest = check_url(url, _ALLOWED).partition("://")
    if scheme not in _SENTINEL_SCHEMES:
        return None
    scheme = _SENTINEL_SCHEMES[scheme]
    if "#" in rest:
        _refuse("no '#': write it as %23 in a user, password or path")
    # Not by urlsplit, which knows only one host.
    netloc = re.split("[/?]", rest, maxsplit=1)[0]
    path, _, query = rest[len(netloc) :].partition("?")
    user, at, hosts = netloc.rpartition("@")
    addresses = tuple(_sentinel_address(SplitResult("", host, path, query, "")) for host in hosts.split(","))
    given = _options(SplitResult("", "", path, query, ""), _known(scheme, options, tls_options) | _SENTINEL_OPTIONS)
    if "@" in path:  # what precedes it is a password, perhaps, and a service's name is shown
        _refuse("no '@' after the sentinels: write it as %40 in a user, password or path")
    parts = path.removesuffix("/").split("/")[1:]
    service = _unquoted("service", parts[0]) if parts else ""
    if not service.strip():
        _refuse(f"the name of the service after its sentinels: {_SENTINEL_FORM}")
    if len(parts) > 2:
        _refuse(f"at most two parts in its path, the service and the database: {_SENTINEL_FORM}/0")
    username, password = (given.pop(name, None) for name in ("sentinel_username", "sentinel_password"))
    server = f"{scheme}://{user}{at}server{'/'.join(('', *parts[1:]))}?{urlencode(given)}"
    return SentinelUrl(server, service, addresses, username, password)


def _sentinel_address(parts: SplitResult) -> tuple[str, int]:
    _check_host(parts)
    if not parts.hostname:
        _refuse(f"a host for each sentinel: {_SENTINEL_FORM}")
    return unquote(parts.hostname), parts.port or _SENTINEL_PORT


def cluster_url(url: object) -> tuple[str, tuple[tuple[str, int], ...]] | None:
    """Split a URL that names nodes of a cluster: a URL of the first of them, and all addresses. None if it does not.

    :raises ValidationError: if an address or the database is invalid. (The rest is checked by :func:`checked_url`.)
    """
    scheme, _, rest = check_url(url, _ALLOWED).partition("://")
    if scheme not in _CLUSTER_SCHEMES:
        return None
    # Not by urlsplit, which knows only one host.
    netloc = re.split("[/?#]", rest, maxsplit=1)[0]
    tail = rest[len(netloc) :]
    path, _, query = tail.partition("?")
    user, at, hosts = netloc.rpartition("@")
    addresses: list[tuple[str, int]] = []
    for host in hosts.split(","):
        parts = SplitResult("", host, path, query, "")
        _check_host(parts)
        if not parts.hostname:
            _refuse(f"a host for each node: {_CLUSTER_FORM}")
        addresses.append((unquote(parts.hostname), parts.port or _CLUSTER_PORT))
    database = path.strip("/") or dict(parse_qsl(query)).get("db", "0")
    if _is_number(database, MAX_DATABASE) and int(database):
        _refuse("no other database than 0: topics on a cluster are in that one")
    return f"{_CLUSTER_SCHEMES[scheme]}://{user}{at}{hosts.split(',')[0]}{tail}", tuple(addresses)


def _known(scheme: str, options: AbstractSet[str], tls_options: AbstractSet[str]) -> AbstractSet[str]:
    return options if scheme in ("rediss", "valkeys") else options - tls_options


def _refuse(allowed: str) -> NoReturn:
    raise ValidationError(f"url must have {allowed} (user and password %-escaped)")


def _shown(what: str, value: str, parts: SplitResult) -> str:
    """``, not 'value'`` if that cannot be a password."""
    behind = f"{parts.path}?{parts.query}"
    return "" if "@" in behind or len(value) > _LONGEST_SHOWN[what] else f", not {value!r}"


def _unquoted(what: str, value: str) -> str:
    try:
        return unquote(value, errors="strict")
    except UnicodeDecodeError:
        _refuse(f"a {what} whose %-escapes are UTF-8")


def _options(parts: SplitResult, known: AbstractSet[str]) -> dict[str, str]:
    try:
        pairs = parse_qsl(parts.query, keep_blank_values=True, errors="strict")
    except UnicodeDecodeError:
        _refuse("a query whose %-escapes are UTF-8")
    except ValueError:
        _refuse("a valid query")
    given = dict(pairs)
    unknown = sorted(given.keys() - known)
    if unknown:
        named = [name for name in unknown if re.fullmatch(r"[a-z_]{1,40}", name)]
        shown = f", not {', '.join(named)}" if len(named) == len(unknown) and "@" not in parts.query else ""
        _refuse(f"no other options than {', '.join(sorted(known))}{shown}")
    for name, times in Counter(name for name, _ in pairs).items():
        if times > 1:
            _refuse(f"each option once, not {name} {times} times")
        if not given[name]:
            _refuse(f"a value for {name}, not an empty one")
    return given


def _check_socket(parts: SplitResult) -> None:
    if parts.netloc.rpartition("@")[2]:
        _refuse("no host with unix://, and three slashes before the socket's path: unix:///run/redis.sock")
    if not _unquoted("path", parts.path).strip("/"):
        _refuse("the socket's path with unix://: unix:///run/redis.sock")


def _check_host(parts: SplitResult) -> None:
    place = parts.netloc.rpartition("@")[2]
    if "," in place:
        _refuse("one host: several are for redis+cluster:// or redis+sentinel://")
    host, bracket, rest = place.rpartition("]")
    if not bracket:
        host, _, port = place.partition(":")
    elif rest and not rest.startswith(":"):
        _refuse("a port after the host's brackets: redis://[::1]:6379")
    else:
        port = rest[1:]
    if ":" in port:
        _refuse("one host and one port; an IPv6 address in brackets: redis://[::1]:6379")
    if place.endswith(":") or (port and not (_is_number(port, 65535) and int(port))):
        _refuse(f"a port from 1 to 65535{_shown('port', port, parts)}")
    _unquoted("host", host)


def _check_database_path(parts: SplitResult, given: dict[str, str]) -> None:
    path = _unquoted("path", parts.path)
    if not re.fullmatch(r"(/[^/]*)?/?", path):
        _refuse(f"at most one part in its path, the database: a number from 0{_shown('database', path, parts)}")
    number = path.strip("/")
    if number:
        _check_database("database", number, parts)
        if "db" in given:
            _refuse("the database only once, not both in its path and as db")


def _check_database(name: str, value: str | None, parts: SplitResult) -> None:
    if value is not None and not _is_number(value, MAX_DATABASE):
        _refuse(f"a {name} that is a number from 0 to {MAX_DATABASE}{_shown('database', value, parts)}")


def _check_credentials(parts: SplitResult, given: dict[str, str]) -> None:
    for name, value in (("username", parts.username), ("password", parts.password)):
        if value:
            _unquoted(name, value)
            if name in given:
                _refuse(f"the {name} only once, not both before the host and as an option")


def _is_number(text: str, most: int) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 20 and int(text) <= most
