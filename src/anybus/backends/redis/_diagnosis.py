"""Tells why a connection could not be opened, and what to check."""

from __future__ import annotations

import errno
import re
import socket
import ssl
import sys
from collections.abc import Iterator
from typing import Literal

from ..._ground.errors import words
from ._protocol import BrokenProtocolError
from ._settings import Settings

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

Stage = Literal["connecting", "securing", "greeting"]
"""How far the connection came: to the socket, to TLS, to the first commands."""

_NO_DESCRIPTOR = {
    errno.EMFILE: "this process has no file descriptor left: raise its limit (ulimit -n), or find the leak",
    errno.ENFILE: "this machine has no file descriptor left: raise its limit (fs.file-max)",
}
_NOT_TLS = (
    "WRONG_VERSION_NUMBER",
    "RECORD_LAYER_FAILURE",
    "PACKET_LENGTH_TOO_LONG",
    "HTTP_REQUEST",
    "UNKNOWN_PROTOCOL",
)
_CLIENT_CERTIFICATE = ("CERTIFICATE_REQUIRED", "HANDSHAKE_FAILURE", "ALERT_BAD_CERTIFICATE", "ALERT_UNKNOWN_CA")
_TYPE_BYTE = re.compile(r'got "(.+)" as reply type byte')


def why(error: BaseException, settings: Settings, stage: Stage) -> str:
    """What the error means, and what to do about it."""
    causes = list(_causes(error))
    for cause in causes:
        told = _of_the_system(cause)
        if told is not None:
            return told
    for cause in causes:
        if isinstance(cause, ssl.SSLError):
            return _of_tls(cause)
    if isinstance(error, TimeoutError):
        return _of_silence(settings, stage)
    if isinstance(error, BrokenProtocolError):
        return _of_another_protocol(error)
    if stage == "connecting":
        return "; ".join(dict.fromkeys(words(cause) for cause in causes))
    if stage == "securing":
        return (
            "the server closed the connection during the TLS handshake: does this port speak TLS? "
            "(redis:// is without TLS)"
        )
    if settings.tls is not None:
        return (
            "the server closed the connection at the first command: does it require a client certificate "
            "(ssl_certfile)?"
        )
    return "the server closed the connection at the first command: does this port require TLS (rediss://)?"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The errors of the single addresses, which AnyIO wraps if a host has several; otherwise the error itself."""
    cause = error.__cause__
    if isinstance(cause, BaseExceptionGroup):
        for member in cause.exceptions:  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
            yield from _causes(member)  # pyright: ignore[reportUnknownArgumentType]
    elif isinstance(cause, OSError):
        yield from _causes(cause)
    else:
        yield error


def _of_the_system(error: BaseException) -> str | None:
    if isinstance(error, socket.gaierror):
        # Without a file descriptor, no name can be resolved either, and the resolver does not say why.
        told = _no_descriptor_for_a_socket()
        return told or f"the host name cannot be resolved ({error.strerror or words(error)})"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused: no server listens there"
    if isinstance(error, OSError):
        return _NO_DESCRIPTOR.get(error.errno or 0)
    return None


def _no_descriptor_for_a_socket() -> str | None:
    try:
        socket.socket().close()
    except OSError as error:
        return _NO_DESCRIPTOR.get(error.errno or 0)
    return None


def _of_tls(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"the server's certificate is not accepted: {error.verify_message} "
            "(set ssl_ca_certs to the certificate of a CA to trust)"
        )
    text = f"{error.reason or ''} {error}".upper().replace(" ", "_")
    if any(part in text for part in _NOT_TLS):
        return f"the server does not speak TLS on this port: redis:// is without TLS ({words(error)})"
    if any(part in text for part in _CLIENT_CERTIFICATE):
        return (
            "the server refused the TLS handshake: does it require another client certificate "
            f"(ssl_certfile, ssl_keyfile)? ({words(error)})"
        )
    return f"TLS failed: {words(error)}"


def _of_silence(settings: Settings, stage: Stage) -> str:
    within = f"within connect_timeout ({settings.connect_timeout} s)"
    if stage == "connecting":
        return f"no answer {within}: is the address right, or does a firewall drop the packets?"
    if stage == "securing":
        return f"no answer to the TLS handshake {within}: does this port speak TLS? (redis:// is without TLS)"
    return f"connected, but no answer to the first commands {within}: is it a Redis or Valkey server?"


def _of_another_protocol(error: BrokenProtocolError) -> str:
    found = _TYPE_BYTE.search(str(error))
    first = found.group(1) if found else ""
    if first == "\\x15":
        return "the server answers in TLS: use rediss://"
    if first == "H":
        return "the server speaks HTTP, not the Redis protocol: is the port right?"
    return f"the server does not speak the Redis protocol ({words(error)}): is the port right?"
