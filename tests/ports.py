"""Ports of the loopback interface for servers that come back on the same one; connections that end."""

import random
import socket

FIRST, LAST = 10_000, 32_000  # below those that outgoing connections are given (Linux: 32768 and above)

GONE = (ConnectionError, RuntimeError)
"""What tells a writer that nobody is there any more; the second is uvloop's word for it."""


def free_port() -> int:
    """Return a port that nobody listens on, and that no outgoing connection takes meanwhile."""
    while True:
        port = random.SystemRandom().randint(FIRST, LAST)  # no seed that others share
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
