"""Recurring publishing: what :meth:`anybus.StreamBus.schedule` yields, and the types of its parameters."""

from ._scheduling.definition import MessageFactory, Missed
from ._scheduling.recurring import Schedule

__all__ = ["MessageFactory", "Missed", "Schedule"]
