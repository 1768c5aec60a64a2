"""Ports of the loopback interface for servers that stop and come back on the same one."""

import random
import socket

FIRST, LAST = 10_000, 32_000  # below those that outgoing connections are given (Linux: 32768 and above)


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
