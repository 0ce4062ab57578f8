"""The contracts of backends, codecs and observers."""

from ._backend import Feature as Feature
from ._backend import LeaseKeeper as LeaseKeeper
from ._backend import PassSource as PassSource
from ._backend import PublishItem as PublishItem
from ._backend import RightsChecker as RightsChecker
from ._backend import SharedWaiting as SharedWaiting
from ._backend import StreamBackend as StreamBackend
from ._backend import StreamInspector as StreamInspector
from ._backend import TimedPublisher as TimedPublisher
from ._backend import TransferItem as TransferItem
from ._codec import Codec as Codec
from ._dead_letters import DeadLetterStore as DeadLetterStore
from ._dead_letters import Move as Move
from ._dead_letters import StoredEntry as StoredEntry
from ._deduplication import Duplicate as Duplicate
from ._entries import ClaimedMessage as ClaimedMessage
from ._entries import Confirmation as Confirmation
from ._entries import FetchedEntry as FetchedEntry
from ._entries import MalformedEntry as MalformedEntry
from ._entries import MissingEntry as MissingEntry
from ._entries import Output as Output
from ._entries import PendingEntry as PendingEntry
from ._entries import PublishSpec as PublishSpec
from ._entries import Redelivered as Redelivered
from ._observer import BusEvent as BusEvent
from ._observer import Observer as Observer
