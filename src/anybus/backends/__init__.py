"""Backends that come with the library."""

from .memory import MemoryBackend as MemoryBackend
