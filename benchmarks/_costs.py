"""What a run costs: its time, and the processor time of this process and of the server. Also commands, when idle."""

from __future__ import annotations

import time

from _figures import CLIENT, RATE, SERVER, Measured
from _wire import Wire


def server_time(wire: Wire) -> float:
    """Seconds that all threads of the server have computed, as the server says."""
    facts = wire.info("cpu")
    return float(facts["used_cpu_user"]) + float(facts["used_cpu_sys"])


class Stopwatch:
    """Runs from its creation until :meth:`stop`. All contestants are measured by it.

    :param port: of the server; None if there is none.
    """

    def __init__(self, port: int | None) -> None:
        self._wire = None if port is None else Wire(port)
        self._server = 0.0 if self._wire is None else server_time(self._wire)
        self._client, self._began = time.process_time(), time.perf_counter()

    def stop(self, count: int) -> Measured:
        """What each of ``count`` messages took since the beginning."""
        seconds, client = time.perf_counter() - self._began, time.process_time() - self._client
        measured = {RATE: count / seconds, CLIENT: client / count * 1e6}
        if self._wire is not None:
            measured[SERVER] = (server_time(self._wire) - self._server) / count * 1e6
            self._wire.close()
        return measured


class IdleMeter:
    """Counts commands until :meth:`read` is called. Only MONITOR tells which commands came from a client."""

    def __init__(self, port: int) -> None:
        self._wire = Wire(port)
        self._wire.call("MONITOR")
        self._began, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> Measured:
        """The cost of waiting.

        The share of one core that this process used, the commands per second that clients sent, and those that the
        server executed, including those within scripts.
        """
        cpu, seconds = time.process_time() - self._cpu, time.perf_counter() - self._began
        lines = self._wire.waiting_lines()
        sent = sum(b" lua] " not in line for line in lines)
        return {"core_share": cpu / seconds, "sent_per_s": sent / seconds, "executed_per_s": len(lines) / seconds}
