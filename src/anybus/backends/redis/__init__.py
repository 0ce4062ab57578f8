"""Redis Streams as a backend: Redis 6.2 and newer, and Valkey. Needs the extra ``anybus[redis]``."""

from ._backend import RedisBackend as RedisBackend
