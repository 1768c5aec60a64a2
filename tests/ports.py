"""Ports of the loopback interface for servers that come back on the same one; connections that end."""

import functools
import itertools
import random
import socket

FIRST, LAST = 10_000, 32_000  # below those that outgoing connections are given (Linux: 32768 and above)
LANE = 500
"""So many ports in a row belong to one process. A random port of all of them would be given to two
processes once in a few runs of all tests, each before the other listens on it."""

GONE = (ConnectionError, RuntimeError)
"""What tells a writer that nobody is there any more; the second is uvloop's word for it."""


def free_port() -> int:
    """Return a port that nobody listens on, and that nobody else takes meanwhile."""
    _, lane = _lane()
    for port in itertools.islice(lane, LANE):
        if (probe := _bound(port)) is not None:
            probe.close()
            return port
    raise AssertionError("every port of this process is in use")


@functools.cache
def _lane() -> tuple[socket.socket, "itertools.cycle[int]"]:
    """Claim a lane for as long as this process lives, by holding its first port."""
    starts = list(range(FIRST, LAST, LANE))
    random.SystemRandom().shuffle(starts)  # no seed that others share
    for start in starts:
        if (claim := _bound(start)) is not None:
            return claim, itertools.cycle(range(start + 1, start + LANE))
    raise AssertionError("every lane of ports is taken")


def _bound(port: int) -> socket.socket | None:
    """Return a socket bound to this port, or None when somebody else has it."""
    bound = socket.socket()
    try:
        bound.bind(("127.0.0.1", port))
    except OSError:
        bound.close()
        return None
    return bound
