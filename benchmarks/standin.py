"""The sandbox carrier in a process of its own: `standin.py PORT [WEBHOOK-URL …]`.

Calls take no time, all four webhooks are sent, to each URL in turn as a balancer would. Without a URL none
are. What it remembers for its users is dropped, or a long run would measure its memory.
"""

import asyncio
import itertools
import sys
from typing import Any

from events import KEY

from gateway.sandbox import Sandbox, SandboxOptions

_FORGET_EVERY = 1000  # requests


async def main(port: int, urls: list[str]) -> None:
    """Serve until it is ended."""
    sandbox = Sandbox(SandboxOptions(port=port, signing_key=KEY, call_time=0.0))
    turns = itertools.cycle(urls)

    async def step(name: str, _told: dict[str, Any]) -> None:
        if name == "webhook" and len(urls) > 1:
            sandbox.set_webhook_url(next(turns))
        if len(sandbox.requests) > _FORGET_EVERY:
            sandbox.requests.clear()
            sandbox.events.clear()

    sandbox.on_step = step
    sandbox.set_webhook_url(urls[0] if urls else None)
    await sandbox.start()
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2:]))
