"""anybus: an at-least-once event bus for AnyIO."""

from typing import TYPE_CHECKING

from . import abc as abc
from ._backoff import ExponentialBackoff as ExponentialBackoff
from ._batch import BatchOutcome as BatchOutcome
from ._bus import StreamBus as StreamBus
from ._codec import JsonCodec as JsonCodec
from ._codec import MsgpackCodec as MsgpackCodec
from ._connect import connect as connect
from ._copies import retry_stream as retry_stream
from ._dead_letter import DeadLetter as DeadLetter
from ._dead_letters import DeadLetterPage as DeadLetterPage
from ._dead_letters import DeadLetters as DeadLetters
from ._delivery import Delivery as Delivery
from ._delivery import DeliveryState as DeliveryState
from ._errors import AlreadySettledError as AlreadySettledError
from ._errors import BackendError as BackendError
from ._errors import ClosedError as ClosedError
from ._errors import EventBusError as EventBusError
from ._errors import GroupLostError as GroupLostError
from ._errors import HandlerTimeoutError as HandlerTimeoutError
from ._errors import LeaseLostError as LeaseLostError
from ._errors import SerializationError as SerializationError
from ._errors import UnsupportedError as UnsupportedError
from ._errors import ValidationError as ValidationError
from ._message import Headers as Headers
from ._message import Message as Message
from ._options import DROP as DROP
from ._options import PublishOptions as PublishOptions
from ._options import StreamBusOptions as StreamBusOptions
from ._options import SubscriptionConfig as SubscriptionConfig
from ._policies import CircuitBreaker as CircuitBreaker
from ._policies import Failure as Failure
from ._replay import ReplayProgress as ReplayProgress
from ._replay import ReplayReport as ReplayReport
from ._runtime._pool import Handler as Handler
from ._runtime._pull import DeliveryStream as DeliveryStream
from ._runtime._subscription import Subscription as Subscription
from ._schema import Schema as Schema
from ._statistics import SubscriptionStatistics as SubscriptionStatistics
from ._trace import TraceContext as TraceContext
from ._verdicts import Reject as Reject
from ._verdicts import Retry as Retry
from .abc import BusEvent as BusEvent
from .abc import Observer as Observer
from .backends.memory import MemoryBackend as MemoryBackend

__version__: str
"""The version of the installed package."""

if not TYPE_CHECKING:  # else a type checker would take any name for one of this module's

    def __getattr__(name: str) -> str:
        if name == "__version__":
            # Looked up when it is asked for: the import costs as much as a good part of this package.
            from importlib.metadata import version  # noqa: PLC0415

            return version("anybus")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
