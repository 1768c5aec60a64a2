"""Another client, in a process of its own, that times answers: `probe.py SECONDS SMTP-PORT HTTP-PORT`.

A NOOP every 5 ms, and every 10 ms a signed webhook about a fax that nobody knows (HTTP-PORT 0: none). It runs
at a high priority where it may: its own waiting for a processor is not the server's doing. It prints all
times in milliseconds.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable

from events import event, request

_NOOPS = 90  # in one session: the gateway allows 100
_PATIENCE = 60.0


def _line(client: socket.socket, code: bytes) -> None:
    answer = b""
    while not answer.endswith(b"\n"):
        piece = client.recv(4096)
        answer += piece
        if not piece:
            break
    if not answer.startswith(code):
        raise SystemExit(f"wanted {code.decode()}, was told {answer!r}")


def noops(port: int, times: list[float], end: float) -> None:
    """Time NOOPs."""
    while time.monotonic() < end:
        with socket.create_connection(("127.0.0.1", port), _PATIENCE) as client:
            _line(client, b"220")
            client.sendall(b"HELO probe.example.com\r\n")
            _line(client, b"250")
            for _ in range(_NOOPS):
                times.append(_timed(lambda client=client: _noop(client)))  # type: ignore[misc]  # lambda's default
                time.sleep(0.005)
                if time.monotonic() > end:
                    break


def _noop(client: socket.socket) -> None:
    client.sendall(b"NOOP\r\n")
    _line(client, b"250")


def events(port: int, times: list[float], end: float) -> None:
    """Time webhooks."""
    with socket.create_connection(("127.0.0.1", port), _PATIENCE) as client:
        while time.monotonic() < end:
            each = request(event("fax.queued", str(uuid.uuid4()), "+13122000000"), port)
            times.append(_timed(lambda each=each: _post(client, each)))  # type: ignore[misc]  # as above
            time.sleep(0.01)


def _post(client: socket.socket, each: bytes) -> None:
    client.sendall(each)
    answer = client.recv(4096)
    if not answer.startswith(b"HTTP/1.1 200 "):
        raise SystemExit(f"a webhook was answered {answer!r}")


def _timed(work: Callable[[], None]) -> float:
    begun = time.perf_counter()
    work()
    return (time.perf_counter() - begun) * 1000


def main(seconds: float, smtp_port: int, http_port: int) -> None:
    """Time both at once."""
    with contextlib.suppress(OSError):
        os.nice(-15)
    end = time.monotonic() + seconds
    found: dict[str, list[float]] = {"noop": [], "webhook": []}
    faults: list[BaseException] = []

    def guarded(work: Callable[[int, list[float], float], None], port: int, times: list[float]) -> None:
        try:
            work(port, times, end)
        except (OSError, SystemExit) as fault:
            faults.append(fault)

    threads = [threading.Thread(target=guarded, args=(noops, smtp_port, found["noop"]))]
    if http_port:
        threads.append(threading.Thread(target=guarded, args=(events, http_port, found["webhook"])))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise SystemExit(str(faults[0]))
    print(json.dumps({name: [round(value, 3) for value in times] for name, times in found.items()}))


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
