"""The page on deduplication: its program prints what the page says, and its rights are enough."""

from __future__ import annotations

import re

import pytest
from acl import user_with
from servers import RedisHarness, RunningServer
from test_docs_programs import LOOPS, TOPIC, blocks, named, run

import anybus
from anybus.backends.redis._keys import dedup_ends, dedup_ids

PAGE = "docs/deduplication.md"


@pytest.mark.parametrize("loop", LOOPS)
def test_the_program_prints_what_the_page_says(loop: str, server: RunningServer) -> None:
    with server.client() as client:
        client.delete(TOPIC, dedup_ids(TOPIC), dedup_ends(TOPIC))
        out, err = run(named(PAGE, "placing.py"), loop, server.url)
        assert (out, err) == (blocks(PAGE, "text")[0], "")
        assert client.xlen(TOPIC) == 1
        client.delete(TOPIC, dedup_ids(TOPIC), dedup_ends(TOPIC))


async def test_the_rights_that_the_page_names_are_enough(server: RunningServer) -> None:
    (text,) = [block for block in blocks(PAGE, "text") if block.startswith("ACL SETUSER")]
    rights = [word for word in re.split(r"\s+", text) if word[:1] in ("+", "~")]
    options = anybus.PublishOptions(idempotency_key="order-1")
    async with user_with(server, "resetkeys", *rights) as user, anybus.connect(user.url) as bus:
        assert not isinstance(await bus.publish(anybus.Message("orders.rights"), options), anybus.Duplicate)
        assert isinstance(await bus.publish(anybus.Message("orders.rights"), options), anybus.Duplicate)
    assert len(await RedisHarness(server).entries("orders.rights")) == 1
    with server.client() as client:
        client.delete("orders.rights", dedup_ids("orders.rights"), dedup_ends("orders.rights"))
