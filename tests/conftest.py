"""Every test runs on the event loop that the daemon runs on."""

import asyncio
from collections.abc import Callable, Mapping

import uvloop


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Give pytest-asyncio the daemon's loop."""
    return {"uvloop": uvloop.new_event_loop}
