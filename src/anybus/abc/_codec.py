"""The codec: how a message becomes bytes, and bytes a message again."""

from __future__ import annotations

import abc

from .._messages.message import Message


class Codec(abc.ABC):
    """Encodes and decodes the one field of an entry that holds a message. Stateless, safe to share."""

    name: str
    """What it is called in errors and logs."""

    @abc.abstractmethod
    def encode(self, message: Message) -> bytes:
        """The message as bytes.

        :raises SerializationError: if it cannot be encoded.
        """

    @abc.abstractmethod
    def decode(self, data: bytes) -> Message:
        """The message that the bytes hold, as it was written (headers are not lifted here).

        :raises SerializationError: if they hold none; whatever the input, it is an ordinary error of this one entry.
        """
