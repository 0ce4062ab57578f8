"""The contract of a codec: it turns messages into bytes, and bytes into messages."""

from __future__ import annotations

import abc

from .._messages.message import Message


class Codec(abc.ABC):
    """Encodes and decodes the field of an entry that holds a message. Stateless, so it can be shared."""

    name: str
    """The codec's name in errors and logs."""

    @abc.abstractmethod
    def encode(self, message: Message) -> bytes:
        """Encode a message.

        :raises SerializationError: if it cannot be encoded.
        """

    @abc.abstractmethod
    def decode(self, data: bytes) -> Message:
        """Decode a message, as it was written. (The bus copies headers to fields later.)

        :raises SerializationError: if the bytes are not a valid message. It is the only error to raise, whatever the
            bytes are: the bus then treats this one entry as malformed.
        """
