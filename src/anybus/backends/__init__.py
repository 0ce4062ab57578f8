"""Backends that come with the library."""

from .memory.backend import MemoryBackend as MemoryBackend
