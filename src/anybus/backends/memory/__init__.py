"""Streams in memory, for tests, for trying things out, and for applications of one process."""

from .backend import MemoryBackend as MemoryBackend
