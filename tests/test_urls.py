"""A server's URL: each part of it means something, or is refused by name.

Specification: ``valkey://`` and ``valkeys://`` mean ``redis://`` and ``rediss://``. What redis-py would take for a
default, or pass over (port 0, a database in two places, an option given twice), is refused in words that name the part,
show it where that is harmless, and say what is allowed. A password is never shown, wherever it stands.
"""

from __future__ import annotations

import ssl
from typing import Any

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from servers import RunningServer

from anybus import Message, ValidationError, connect
from anybus.backends.redis import RedisBackend
from anybus.backends.redis._settings import Settings, from_client, from_url

SECRET = "hunter2hunter2"


@pytest.mark.parametrize("rest", ["localhost", "user:p%40ss@example.org:6380/3?client_name=shop", "[::1]:7000/2", ""])
def test_valkey_means_redis(rest: str) -> None:
    one, other = from_url(f"valkey://{rest}"), from_url(f"redis://{rest}")
    assert (one.host, one.port, one.db, one.client_name) == (other.host, other.port, other.db, other.client_name)
    assert repr(connect(f"valkey://{rest}").backend) == repr(connect(f"redis://{rest}").backend)
    assert one.tls is None


def test_valkeys_means_redis_with_tls() -> None:
    settings = from_url("valkeys://example.org?ssl_check_hostname=false")
    assert settings.tls is not None
    assert (settings.tls.verify_mode, settings.tls.check_hostname) == (ssl.CERT_REQUIRED, False)
    assert repr(connect("valkeys://example.org").backend) == "<RedisBackend example.org:6379 not connected>"


async def test_a_bus_on_a_valkey_url_works(server: RunningServer, topic: str) -> None:
    async with connect(server.url.replace("redis://", "valkey://")) as bus:
        assert await bus.publish(Message(topic))


REFUSALS: dict[str, tuple[str, str]] = {
    "a port of letters": ("redis://localhost:abc", "a port from 1 to 65535, not 'abc'"),
    "port 0": ("redis://localhost:0", "a port from 1 to 65535, not '0'"),
    "port 00": ("redis://localhost:00/1", "a port from 1 to 65535, not '00'"),
    "a port too large": ("redis://localhost:65536", "a port from 1 to 65535, not '65536'"),
    "a negative port": ("redis://localhost:-1", "a port from 1 to 65535, not '-1'"),
    "a port in other digits": ("redis://localhost:\uff16\uff13", "a port from 1 to 65535, not '\uff16\uff13'"),
    "no port after the colon": ("redis://localhost:/1", "a port from 1 to 65535, not ''"),
    "several hosts": ("redis://a,b", "several are for redis+cluster:// or redis+sentinel://"),
    "several hosts and ports": ("rediss://user:secret@a:1,b:2/0", "several are for redis+cluster://"),
    "two ports": ("redis://a:1:2", "one host and one port"),
    "IPv6 without brackets": ("redis://::1:6379", "an IPv6 address in brackets: redis://[::1]:6379"),
    "IPv6 with one bracket": ("redis://[::1", "in closed brackets"),
    "text after the brackets": ("redis://[::1]6379", "a port "),
    "a database of letters": ("redis://localhost/zero", "a number from 0 to 2147483647, not 'zero'"),
    "a negative database": ("redis://localhost/-1", "a number from 0 to 2147483647, not '-1'"),
    "a database too large": ("redis://localhost/2147483648", "not '2147483648'"),
    "two parts in the path": ("redis://localhost/1/2", "at most one part in its path, the database: a number from 0"),
    "a negative db": ("redis://localhost?db=-1", "a db that is a number from 0 to 2147483647, not '-1'"),
    "a db with a sign": ("redis://localhost?db=%2B1", "not '+1'"),
    "a db of letters": ("unix:///run/redis.sock?db=one", "a db that is a number from 0 to 2147483647, not 'one'"),
    "the database in two places": ("redis://localhost/1?db=2", "only once, not both in its path and as db"),
    "the same database in two places": ("redis://localhost/1?db=1", "the database only once"),
    "an option twice": ("redis://localhost?db=1&db=2", "each option once, not db 2 times"),
    "an empty option": ("redis://localhost?db=", "a value for db, not an empty one"),
    "an unknown option": ("redis://localhost?socket_timeout=5", "no other options than client_name, db, password, u"),
    "an unknown option, named": ("redis://localhost?socket_timeout=5", ", not socket_timeout"),
    "TLS options without TLS": ("valkey://localhost?ssl_cert_reqs=none", ", not ssl_cert_reqs"),
    "a fragment": ("redis://localhost#1", "no '#': write it as %23 in a user, password or path"),
    "an empty fragment": ("redis://localhost#", "no '#'"),
    "a socket without a path": ("unix://", "the socket's path with unix://: unix:///run/redis.sock"),
    "a socket's path that is a root": ("unix:///", "the socket's path"),
    "a relative socket": ("unix://run/redis.sock", "three slashes before the socket's path"),
    "a socket on a port": ("unix://:6379/run/redis.sock", "no host with unix://"),
    "a user twice": ("redis://u@localhost?username=v", "the username only once"),
    "a password twice": (f"redis://:{SECRET}@localhost?password={SECRET}", "the password only once"),
    "escapes that are no UTF-8 in a password": (f"redis://:{SECRET}%ff@localhost", "a password whose %-escapes"),
    "escapes that are no UTF-8 in a user": ("redis://%ff:x@localhost", "a username whose %-escapes are UTF-8"),
    "escapes that are no UTF-8 in a path": ("unix:///%ff", "a path whose %-escapes are UTF-8"),
    "escapes that are no UTF-8 in a query": (f"redis://localhost?password={SECRET}%ff", "a query whose %-escapes"),
    "half a character": ("redis://localhost/\ud800", "UTF-8"),
}


@pytest.mark.parametrize(("url", "said"), REFUSALS.values(), ids=REFUSALS.keys())
def test_what_makes_no_sense_is_refused_by_name(url: str, said: str) -> None:
    for make in (RedisBackend, connect):
        with pytest.raises(ValidationError, match="url") as caught:
            make(url)
        text = str(caught.value)
        assert said in text
        assert "hunter2" not in text
        assert len(text) < 500


@pytest.mark.parametrize("scheme", ["http", "kafka", "valkey+unix", "REDIS", ""])
def test_an_unknown_scheme_is_refused_with_all_that_are_known(scheme: str) -> None:
    for make in (RedisBackend, connect):
        with pytest.raises(ValidationError, match="url") as caught:
            make(f"{scheme}://user:{SECRET}@localhost")
        assert all(f"{known}://" in str(caught.value) for known in ("redis", "rediss", "valkey", "valkeys", "unix"))
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        f"redis://user:{SECRET}/x@localhost",
        f"redis://user:{SECRET}?x@localhost",
        f"redis://user:{SECRET}#x@localhost",
        f"redis://user:1/{SECRET}@localhost",
        f"redis://user:1?{SECRET}@localhost",
        f"redis://user:{SECRET}",
        f"redis://:{SECRET}",
        f"redis://user:a@b:{SECRET}@localhost:x",
        f"redis://localhost?{SECRET}",
        f"unix://user:{SECRET}@",
        f"unix://{SECRET}@run/redis.sock",
        f"valkeys://user:{SECRET}@localhost:0",
    ],
)
def test_a_password_is_never_shown_wherever_it_stands(url: str) -> None:
    for make in (RedisBackend, connect):
        with pytest.raises(ValidationError) as caught:
            make(url)
        error: BaseException | None = caught.value
        while error is not None:
            assert "hunter2" not in str(error)
            error = error.__cause__ or error.__context__


@given(st.text(st.sampled_from("hunter2:/?#@[]%&=. é")), st.text(st.sampled_from("local:/?#@[]%&=19")))
def test_a_url_of_any_text_is_understood_or_refused_without_its_password(before: str, after: str) -> None:
    url = f"redis://user:{SECRET}{before}@{after}"
    try:
        settings = from_url(url)
    except ValidationError as error:
        assert SECRET not in str(error)
    else:
        assert SECRET not in repr(settings)


@pytest.mark.parametrize("url", [f"redis://u:{SECRET}@h", b"redis://u:%s@h" % SECRET.encode(), 5, None], ids=repr)
def test_a_url_of_another_type_is_refused_without_its_password(url: Any) -> None:
    class Url:
        def __repr__(self) -> str:
            return f"Url({url!r})"

    for make in (RedisBackend, connect):
        given: Any = Url() if isinstance(url, str) else url
        with pytest.raises(ValidationError, match="as a str, not") as caught:
            make(given)
        assert "hunter2" not in str(caught.value)


def test_an_ipv6_address_is_shown_in_brackets() -> None:
    settings = from_url("redis://[::1]:7000/2")
    assert (settings.host, settings.port, settings.db, settings.place) == ("::1", 7000, 2, "[::1]:7000")


# --- a client that is configured already


@pytest.mark.parametrize(
    ("field", "value"), [("port", 0), ("port", 65536), ("port", "abc"), ("db", -1), ("db", "one"), ("host", 5)]
)
def test_a_clients_settings_that_make_no_sense_are_refused_by_name(field: str, value: Any) -> None:
    client = redis.Redis()
    client.connection_pool.connection_kwargs[field] = value
    with pytest.raises(ValidationError, match=rf"^{field} must be .* not {value!r}"):
        from_client(client)


def test_a_clients_port_and_database_may_be_written_as_text() -> None:
    client = redis.Redis()
    client.connection_pool.connection_kwargs.update(port="6380", db="3")
    settings = from_client(client)
    assert (settings.port, settings.db) == (6380, 3)
    assert isinstance(settings, Settings)
