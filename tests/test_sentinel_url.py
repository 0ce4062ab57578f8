"""URLs and clients that name sentinels: what they mean, and what is refused by name.

Specification: ``redis+sentinel://[user:password@]host[:port],host[:port]/service[/database]``, with TLS as
``rediss+sentinel://`` (to the sentinels and to the server), and ``valkey`` for ``redis``. User, password, database and
options are the server's; the sentinels have ``sentinel_username`` and ``sentinel_password``. A redis-py client that was
made by ``Sentinel.master_for`` brings the same settings along. What makes no sense is refused in words that name the
part, and a password is never shown.
"""

from __future__ import annotations

import ssl
from typing import Any

import pytest
import redis.asyncio.sentinel
import redis.sentinel

from anybus import UnsupportedError, ValidationError, connect
from anybus.backends.redis import RedisBackend
from anybus.backends.redis._settings import Settings, from_client, from_url

SECRET = "hunter2hunter2"


def credentials_of(settings: Settings) -> tuple[Any, ...] | None:
    return None if settings.credentials is None else settings.credentials.get_credentials()


def addresses_of(settings: Settings) -> list[tuple[str, int]]:
    return [(sentinel.host, sentinel.port) for sentinel in settings.sentinels]


@pytest.mark.parametrize("scheme", ["redis", "rediss", "valkey", "valkeys"])
def test_all_parts_of_a_url_mean_something(scheme: str) -> None:
    settings = from_url(
        f"{scheme}+sentinel://user:p%40ss@one,TWO.example.org:26380,[::1],[fe80::1]:7/my%20shop/3"
        "?client_name=till&sentinel_username=su&sentinel_password=s%2Bp"
    )
    assert settings.service == "my shop"
    assert addresses_of(settings) == [("one", 26379), ("two.example.org", 26380), ("::1", 26379), ("fe80::1", 7)]
    assert (settings.db, settings.client_name) == (3, "till")
    assert credentials_of(settings) == ("user", "p@ss")
    for sentinel in settings.sentinels:
        assert credentials_of(sentinel) == ("su", "s+p")
        assert (sentinel.db, sentinel.client_name, sentinel.sentinels) == (0, "till", ())
        assert (sentinel.tls is not None) == (scheme in ("rediss", "valkeys"))
    assert (settings.tls is not None) == (scheme in ("rediss", "valkeys"))
    assert settings.place == "service 'my shop'"


def test_the_servers_credentials_do_not_go_to_the_sentinels() -> None:
    [sentinel] = from_url(f"redis+sentinel://user:{SECRET}@one/shop").sentinels
    assert sentinel.credentials is None


def test_tls_options_hold_for_the_sentinels_and_for_the_server() -> None:
    settings = from_url("rediss+sentinel://one,two/shop?ssl_check_hostname=false", connect_timeout=1, command_timeout=2)
    for one in (settings, *settings.sentinels):
        assert one.tls is not None
        assert (one.tls.verify_mode, one.tls.check_hostname) == (ssl.CERT_REQUIRED, False)
        assert (one.connect_timeout, one.command_timeout) == (1, 2)
    assert [sentinel.tls_hostname for sentinel in settings.sentinels] == ["one", "two"]
    assert settings.at("10.0.0.1", 6380).tls_hostname == "10.0.0.1"


def test_a_found_server_has_its_address_and_its_service_in_texts() -> None:
    found = from_url("redis+sentinel://one/shop").at("10.0.0.1", 6380)
    assert found.place == "10.0.0.1:6380 (service 'shop')"
    assert (found.sentinels, found.locator) == ((), None)


def test_the_slash_at_the_end_means_nothing() -> None:
    assert from_url("redis+sentinel://one/shop/").service == "shop"
    assert from_url("redis+sentinel://one/shop/2/").db == 2


def test_a_backend_shows_the_service_and_no_password() -> None:
    url = f"redis+sentinel://user:{SECRET}@one/shop?sentinel_password={SECRET}"
    for backend in (connect(url).backend, RedisBackend(url)):
        assert repr(backend) == "<RedisBackend service 'shop' not connected>"
    assert SECRET not in repr(from_url(url))


REFUSALS: dict[str, tuple[str, str]] = {
    "no service": ("redis+sentinel://one,two", "the name of the service after its sentinels: redis+sentinel://host"),
    "an empty service": ("redis+sentinel://one/", "the name of the service after its sentinels"),
    "a blank service": ("redis+sentinel://one/%20/1", "the name of the service after its sentinels"),
    "no service, but a database": ("redis+sentinel://one//1", "the name of the service after its sentinels"),
    "three parts in the path": ("redis+sentinel://one/shop/1/2", "at most two parts in its path, the service and the"),
    "no sentinel": ("redis+sentinel:///shop", "a host for each sentinel"),
    "an empty sentinel": ("redis+sentinel://one,,two/shop", "a host for each sentinel"),
    "a comma at the end": ("redis+sentinel://one,/shop", "a host for each sentinel"),
    "a port alone": ("redis+sentinel://:26379/shop", "a host for each sentinel"),
    "a port of letters": ("redis+sentinel://one,two:abc/shop", "a port from 1 to 65535, not 'abc'"),
    "port 0": ("redis+sentinel://one:0/shop", "a port from 1 to 65535, not '0'"),
    "IPv6 without brackets": ("redis+sentinel://one,::1:26379/shop", "an IPv6 address in brackets"),
    "IPv6 with one bracket": ("redis+sentinel://[::1/shop", "an IPv6 address in"),
    "a database of letters": ("redis+sentinel://one/shop/zero", "a number from 0 to 2147483647, not 'zero'"),
    "the database in two places": ("redis+sentinel://one/shop/1?db=2", "the database only once"),
    "an unknown option": ("redis+sentinel://one/shop?sentinel_kwargs=1", ", not sentinel_kwargs"),
    "an unknown option, all known": ("redis+sentinel://one/shop?x=1", "sentinel_password, sentinel_username, username"),
    "an option twice": (
        "redis+sentinel://one/shop?sentinel_password=a&sentinel_password=b",
        "sentinel_password 2 time",
    ),
    "an empty option": ("redis+sentinel://one/shop?sentinel_username=", "a value for sentinel_username"),
    "TLS options without TLS": ("redis+sentinel://one/shop?ssl_cert_reqs=none", ", not ssl_cert_reqs"),
    "sentinel options without sentinels": ("redis://localhost?sentinel_password=x", ", not sentinel_password"),
    "a fragment": ("redis+sentinel://one/shop#1", "no '#'"),
    "a password twice": (f"redis+sentinel://:{SECRET}@one/shop?password={SECRET}", "the password only once"),
    "escapes that are no UTF-8": ("redis+sentinel://one/%ff", "a service whose %-escapes are UTF-8"),
    "a password with a slash": (f"redis+sentinel://user:1/{SECRET}@one/shop", "no '@' after the sentinels"),
    "a password with a slash, a number": (f"redis+sentinel://user:1/{SECRET}@one/3", "no '@' after the sentinels"),
    "a password with a question mark": (f"redis+sentinel://user:{SECRET}?x@one/shop", "a port from 1 to 65535"),
    "a password with an at sign": (f"redis+sentinel://user:a@b:{SECRET}@one:x/shop", "a port from 1 to 65535"),
    "sockets": ("unix+sentinel:///run/sentinel.sock", "redis+sentinel://"),
}


@pytest.mark.parametrize(("url", "said"), REFUSALS.values(), ids=REFUSALS.keys())
def test_what_makes_no_sense_is_refused_by_name(url: str, said: str) -> None:
    for make in (RedisBackend, connect):
        with pytest.raises(ValidationError, match="url") as caught:
            make(url)
        text = str(caught.value)
        assert said in text
        assert "hunter2" not in text
        assert len(text) < 600


SENTINELS = [redis.sentinel.Sentinel, redis.asyncio.sentinel.Sentinel]


@pytest.mark.parametrize("kind", SENTINELS, ids=["redis", "redis.asyncio"])
def test_a_client_behind_sentinels_brings_its_settings_along(kind: Any) -> None:
    manager = kind(
        [("one", 26379), ("two", 26380)],
        sentinel_kwargs={"username": "su", "password": "sp", "ssl": True, "ssl_check_hostname": False},
        username="user",
        password="p",
        db=3,
        client_name="till",
    )
    settings = from_client(manager.master_for("shop"))
    assert (settings.service, settings.db, settings.client_name) == ("shop", 3, "till")
    assert credentials_of(settings) == ("user", "p")
    assert settings.tls is None
    assert addresses_of(settings) == [("one", 26379), ("two", 26380)]
    for sentinel in settings.sentinels:
        assert credentials_of(sentinel) == ("su", "sp")
        assert sentinel.tls is not None
    backend = RedisBackend.from_client_settings(manager.master_for("shop"))
    assert repr(backend) == "<RedisBackend service 'shop' not connected>"


@pytest.mark.parametrize("kind", SENTINELS, ids=["redis", "redis.asyncio"])
def test_tls_of_a_client_behind_sentinels_is_its_own(kind: Any) -> None:
    manager = kind([("one", 26379)])
    settings = from_client(manager.master_for("shop", ssl=True))
    assert settings.tls is not None
    assert settings.sentinels[0].tls is None


@pytest.mark.parametrize("kind", SENTINELS, ids=["redis", "redis.asyncio"])
def test_what_would_be_ignored_of_a_client_is_refused(kind: Any) -> None:
    one = [("one", 26379)]
    with pytest.raises(UnsupportedError, match="master_for"):
        RedisBackend.from_client_settings(kind(one).slave_for("shop"))
    with pytest.raises(UnsupportedError, match="min_other_sentinels"):
        RedisBackend.from_client_settings(kind(one, min_other_sentinels=1).master_for("shop"))
    with pytest.raises(UnsupportedError, match="force_master_ip"):
        RedisBackend.from_client_settings(kind(one, force_master_ip="127.0.0.1").master_for("shop"))
    with pytest.raises(ValidationError, match="at least one sentinel"):
        RedisBackend.from_client_settings(kind([]).master_for("shop"))
    with pytest.raises(ValidationError, match="client"):
        RedisBackend.from_client_settings(kind(one))
