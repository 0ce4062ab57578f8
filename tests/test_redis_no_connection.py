"""A connection that cannot be opened says what it looks like, and what to look at.

A wrong port, TLS on one side only, a name that nobody knows, a certificate that is not accepted, no file descriptor
left: each is told from the others.
"""

from __future__ import annotations

import errno
import os
import resource
import socket
import ssl
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path

import anyio
import pytest
import trustme
from anyio.abc import ByteStream
from anyio.streams.tls import TLSStream
from fake_server import GONE, listening
from harness import SOON
from servers import RunningServer, free_port

from anybus import BackendError
from anybus.backends.redis import RedisBackend

PATIENCE = 1.0
"""The connect_timeout of tests in which nobody answers."""


async def refusal(url: str, *, connect_timeout: float = 5.0) -> str:
    """What entering says. It is transient, and nothing was done."""
    with anyio.fail_after(SOON), pytest.raises(BackendError) as caught:
        async with RedisBackend(url, connect_timeout=connect_timeout):
            pass
    assert (caught.value.can_pass, caught.value.may_have_happened) == (True, False)
    return str(caught.value)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    authority.issue_cert("localhost", "127.0.0.1").private_key_and_cert_chain_pem.write_to_path(
        str(folder / "localhost.pem")
    )
    authority.issue_cert("elsewhere.example").private_key_and_cert_chain_pem.write_to_path(
        str(folder / "elsewhere.pem")
    )
    return folder


@asynccontextmanager
async def tls_port(certificates: Path, name: str = "localhost", *, client: bool = False) -> AsyncGenerator[int, None]:
    """A server that speaks TLS, and nothing after that. With ``client`` it wants a certificate of its clients."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(certificates / "ca.pem"))
    context.load_cert_chain(certificates / f"{name}.pem")
    context.verify_mode = ssl.CERT_REQUIRED if client else ssl.CERT_NONE

    async def talk(stream: ByteStream) -> None:
        with suppress(*GONE):
            async with stream:
                secured = await TLSStream.wrap(stream, server_side=True, ssl_context=context, standard_compatible=False)
                while True:
                    await secured.receive()

    async with listening(talk) as port:
        yield port


@asynccontextmanager
async def answering(data: bytes) -> AsyncGenerator[int, None]:
    """Somebody who answers whatever comes with these bytes, and hangs up."""

    async def talk(stream: ByteStream) -> None:
        with suppress(*GONE):
            async with stream:
                await stream.receive()
                await stream.send(data)

    async with listening(talk) as port:
        yield port


async def test_tls_to_a_plain_server_says_that_it_does_not_speak_tls(server: RunningServer) -> None:
    said = await refusal(f"rediss://127.0.0.1:{server.port}", connect_timeout=PATIENCE)
    assert "TLS" in said
    assert "redis:// is without TLS" in said
    assert f"127.0.0.1:{server.port}" in said


async def test_tls_to_somebody_who_answers_in_plain_text_says_that_it_does_not_speak_tls() -> None:
    async with answering(b"-ERR Protocol error: too big inline request\r\n") as port:
        assert "redis:// is without TLS" in await refusal(f"rediss://127.0.0.1:{port}")


async def test_tls_to_somebody_who_hangs_up_says_that_it_may_not_speak_tls() -> None:
    async with answering(b"") as port:
        assert "does this port speak TLS?" in await refusal(f"rediss://127.0.0.1:{port}")


async def test_no_tls_to_a_tls_port_says_rediss(certificates: Path) -> None:
    async with tls_port(certificates) as port:
        assert "rediss://" in await refusal(f"redis://127.0.0.1:{port}")
        assert "rediss://" in await refusal(f"redis://user:password@127.0.0.1:{port}/2")


async def test_an_answer_in_tls_says_rediss() -> None:
    async with answering(b"\x15\x03\x01\x00\x02\x02\x46") as port:
        assert "answers in TLS: use rediss://" in await refusal(f"redis://127.0.0.1:{port}")


def tls_server(name: str, certificates: Path) -> tuple[RunningServer, int]:
    port = free_port()
    files = {"cert": "localhost.pem", "key": "localhost.pem", "ca-cert": "ca.pem"}
    options = [part for key, file in files.items() for part in (f"--tls-{key}-file", str(certificates / file))]
    return RunningServer(name, "--tls-port", str(port), *options), port


async def test_a_real_servers_tls_port_is_known_for_what_it_is(certificates: Path) -> None:
    """Its own TLS: many servers are built without. It wants a certificate of its clients, as it does by default."""
    try:
        running, port = tls_server("redis70", certificates)
        await anyio.to_thread.run_sync(running.start)
    except (LookupError, RuntimeError):
        pytest.skip("no server with TLS is installed")
    try:
        assert "rediss://" in await refusal(f"redis://localhost:{port}")
        trusted = f"rediss://localhost:{port}?ssl_ca_certs={certificates / 'ca.pem'}"
        assert "client certificate" in await refusal(trusted)
        assert "certificate is not accepted" in await refusal(f"rediss://localhost:{port}")
        pair = certificates / "localhost.pem"
        async with RedisBackend(f"{trusted}&ssl_certfile={pair}&ssl_keyfile={pair}") as backend:
            assert await backend.count_entries("t") == 0
    finally:
        await anyio.to_thread.run_sync(running.stop)


async def test_a_certificate_that_is_not_accepted_says_why(certificates: Path) -> None:
    async with tls_port(certificates) as port:
        said = await refusal(f"rediss://localhost:{port}")
        assert "certificate is not accepted" in said
        assert "ssl_ca_certs" in said
    async with tls_port(certificates, "elsewhere") as port:
        said = await refusal(f"rediss://localhost:{port}?ssl_ca_certs={certificates / 'ca.pem'}")
        assert "certificate is not accepted" in said
        assert "localhost" in said
    async with tls_port(certificates, client=True) as port:
        said = await refusal(f"rediss://localhost:{port}?ssl_ca_certs={certificates / 'ca.pem'}")
        assert "client certificate" in said


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "speaks HTTP"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "does not speak the Redis protocol"),
        (b"220 mail.example ESMTP\r\n", "does not speak the Redis protocol"),
        (b"\x00\x00\x00\x00", "does not speak the Redis protocol"),
        (b"", "closed the connection at the first command"),
    ],
    ids=["HTTP", "SSH", "SMTP", "zeros", "nothing"],
)
async def test_another_protocol_is_told_by_its_first_byte(answer: bytes, words: str) -> None:
    async with answering(answer) as port:
        assert words in await refusal(f"redis://127.0.0.1:{port}")


async def test_a_port_where_nobody_listens_says_so() -> None:
    port = free_port()
    for host in ("127.0.0.1", "localhost"):
        assert "refused: no server listens there" in await refusal(f"redis://{host}:{port}")
        assert "refused: no server listens there" in await refusal(f"rediss://{host}:{port}")


async def test_a_name_that_nobody_knows_says_so() -> None:
    assert "the host name cannot be resolved" in await refusal("redis://no-such-host.invalid")


async def test_a_socket_that_is_not_there_says_so(tmp_path: Path) -> None:
    said = await refusal(f"unix://{tmp_path}/none.sock")
    assert "No such file" in said
    assert f"{tmp_path}/none.sock" in said


async def test_silence_says_how_far_it_came() -> None:

    async def say_nothing(stream: ByteStream) -> None:
        with suppress(*GONE):
            async with stream:
                while True:
                    await stream.receive()

    async with listening(say_nothing) as port:
        said = await refusal(f"redis://127.0.0.1:{port}", connect_timeout=PATIENCE)
        assert "no answer to the first commands within connect_timeout (1.0 s)" in said
        said = await refusal(f"rediss://127.0.0.1:{port}", connect_timeout=PATIENCE)
        assert "no answer to the TLS handshake within connect_timeout (1.0 s)" in said


async def test_an_address_that_never_answers_says_so() -> None:
    """A queue of connections that is full: what comes then is dropped, as by a firewall."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            with suppress(BlockingIOError):
                waiting.connect(("127.0.0.1", port))
        said = await refusal(f"redis://127.0.0.1:{port}", connect_timeout=PATIENCE)
    assert "no answer within connect_timeout (1.0 s): is the address right" in said


class Descriptors:
    """All file descriptors that this process may have."""

    def __init__(self) -> None:
        self._limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._taken: list[int] = []

    def take(self) -> None:
        soft, hard = self._limits
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
        while True:
            try:
                self._taken.append(os.dup(0))
            except OSError as error:
                assert error.errno == errno.EMFILE
                return

    def give_back(self) -> None:
        while self._taken:
            os.close(self._taken.pop())
        resource.setrlimit(resource.RLIMIT_NOFILE, self._limits)


@pytest.fixture
def descriptors() -> Iterator[Descriptors]:
    descriptors = Descriptors()
    try:
        yield descriptors
    finally:
        descriptors.give_back()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "no-such-host.invalid"])
async def test_a_process_without_file_descriptors_says_so(
    descriptors: Descriptors, server: RunningServer, host: str
) -> None:
    descriptors.take()
    said = await refusal(f"redis://{host}:{server.port}")
    descriptors.give_back()
    assert "no file descriptor left" in said
    assert "ulimit" in said


async def test_a_bus_that_runs_out_of_file_descriptors_says_so_and_goes_on_when_there_are_some(
    descriptors: Descriptors, server: RunningServer, topic: str
) -> None:
    async with RedisBackend(server.url) as backend:
        await backend.create_group(topic, "g")
        descriptors.take()
        with anyio.fail_after(SOON), pytest.raises(BackendError, match="no file descr") as caught:  # noqa: PT012
            while True:  # a read that blocks wants a connection of its own
                await backend.read_new(topic, "g", "c", count=1, timeout=0.2)
        descriptors.give_back()
        assert caught.value.can_pass
        assert await backend.read_new(topic, "g", "c", count=1, timeout=0.2) == []
