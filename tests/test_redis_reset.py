"""A server that resets a connection at once, before anything was sent.

On uvloop, the transport has no socket then, and asking it for its addresses raises ``AttributeError``. On asyncio and
trio, the socket raises ``OSError``. Both mean that there is no connection now: whoever opens it tries again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from anyio.abc import ByteStream

from anybus import BackendError
from anybus.backends.redis import _link
from anybus.backends.redis._settings import Settings, from_url


class ResetStream(ByteStream):
    """What is left of a connection that has been reset."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.is_closed = False

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        raise self.error

    async def receive(self, max_bytes: int = 65536) -> bytes:
        raise AssertionError("nothing can be received")

    async def send(self, item: bytes) -> None:
        raise AssertionError("nothing can be sent")

    async def send_eof(self) -> None:
        raise AssertionError("nothing can be sent")

    async def aclose(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize(
    "error",
    [AttributeError("'NoneType' object has no attribute 'getpeername'"), OSError(107, "not connected")],
    ids=["no-socket", "not-connected"],
)
async def test_a_connection_that_is_reset_at_once_is_a_transient_error(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    stream = ResetStream(error)

    async def connected(settings: Settings) -> ByteStream:
        return stream

    monkeypatch.setattr(_link, "_open_stream", connected)
    settings = from_url("redis://127.0.0.1:1", connect_timeout=1.0, command_timeout=1.0)
    with pytest.raises(BackendError) as caught:
        await _link.open_link(settings)
    assert caught.value.can_pass
    assert not caught.value.may_have_happened
    assert stream.is_closed
