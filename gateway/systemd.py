"""Telling systemd how the daemon is.

In charge of: the datagrams of sd_notify(3) and the beat of its watchdog.

Promises: without systemd (no NOTIFY_SOCKET) nothing happens.

Fails: never; a datagram that cannot be sent is not worth a fax.
"""

import contextlib
import socket
from collections.abc import Mapping


class Supervisor:
    """The service manager that started us, or none."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._address = environ.get("NOTIFY_SOCKET", "")
        # Half the time, as sd_watchdog_enabled(3) advises.
        self.beat: float | None = None
        with contextlib.suppress(ValueError):
            self.beat = int(environ.get("WATCHDOG_USEC", "")) / 2_000_000

    def tell(self, *lines: str) -> None:
        """Send lines such as READY=1, STOPPING=1, STATUS=…, WATCHDOG=1."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as door:
            door.sendto("\n".join(lines).encode(), address)
