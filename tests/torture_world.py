"""The world of a crash run: everything that runs, made and wired, and ended again."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import short_leases
from harness import QUICK
from ports import free_port
from postgres import Server
from torture_deeds import (
    Executioner,
    Figures,
    RestlessGateway,
    Storage,
)
from torture_peers import Balancer, Carrier, Relay
from torture_verdict import Reply


class World:
    """Everything that runs."""

    def __init__(
        self,
        seed: int,
        folder: Path,
        script: dict[str, Sequence[str]],
        server: Server | None,
        gateways: int,
        pause: float,
    ) -> None:
        self.folder = folder
        self.figures = Figures()
        self.replies: list[Reply] = []
        self.answered: set[str] = set()  # numbers, by a final reply
        self.storage = Storage(folder, server)
        self.carrier = Carrier(script)
        self.gateways = [self._gateway(f"gateway-{place}") for place in range(1, gateways + 1)]
        self.executioner = Executioner(seed, self.gateways, self.storage, self.figures, pause)
        self.carrier.executioner = self.executioner
        self.relays = [Relay(seed, one.name, self.executioner, self._note) for one in self.gateways]
        self._balancer = Balancer(seed, self.gateways, self.executioner)
        self._lives: list[asyncio.Task[None]] = []

    def _gateway(self, name: str) -> RestlessGateway:
        folder = self.folder / name
        folder.mkdir()
        settings = {section: dict(keys) for section, keys in QUICK.items()}
        ports = (free_port(), free_port())
        settings["smtp"] |= {
            "listen": f"127.0.0.1:{ports[0]}", "max_connections_per_host": 100, "hostname": "fax.example.com",
        }  # fmt: skip
        settings["http"] |= {"listen": f"127.0.0.1:{ports[1]}"}
        settings["telnyx"] |= {
            "channels": 60, "poll_after": "2s",
            "doubt_checks": ["500ms", "1s", "2s", "3s", f"{short_leases.LAST_CHECK:.0f}s"],
        }  # fmt: skip
        settings["retries"] = {"busy": ["1s"] * 4, "no_answer": ["500ms"] * 3, "line": ["500ms"] * 3,
                               "provider": ["500ms"] * 3, "declined": ["500ms"]}  # fmt: skip
        settings["store"] = {"url": self.storage.url, "keep_documents": "20s"}
        settings["log"] = {"format": "json", "mask_numbers": False}
        made = RestlessGateway(name, folder, settings, self._heard)
        made.smtp_port, made.http_port = ports
        return made

    def _heard(self, gateway: str, line: dict[str, Any]) -> None:
        self.carrier.heard(gateway, line)
        if line["event"] == "alert_raised":
            self.figures.alerts[line["cause"]] += 1

    def _note(self, reply: Reply) -> None:
        self.replies.append(reply)
        self.answered.add(reply.number)

    async def open(self) -> None:
        """Start everything; return when all gateways are ready."""
        sandbox = self.carrier.sandbox
        await sandbox.start()
        sandbox.set_webhook_url(await self._balancer.open())
        for gateway, relay in zip(self.gateways, self.relays, strict=True):
            await relay.open()
            gateway.settings["replies"]["relay"] = f"smtp://127.0.0.1:{relay.port}"
            gateway.settings["telnyx"] |= {"api_base": sandbox.url, "public_key": sandbox.public_key}
            life = gateway.live(lambda: self.storage.lately_away)
            self._lives.append(asyncio.create_task(life, name=gateway.name))
        await self.all_ready()

    async def all_ready(self, patience: float = 60.0) -> None:
        """Return when all gateways are up."""
        async with asyncio.timeout(patience):
            while any(gateway.state != "ready" for gateway in self.gateways):
                for life in self._lives:
                    if life.done():
                        life.result()
                await asyncio.sleep(0.05)

    async def stop_gateways(self) -> None:
        """Stop the gateways for good."""
        await asyncio.gather(*(gateway.close() for gateway in self.gateways))
        await asyncio.gather(*self._lives)

    async def close(self) -> None:
        """End everything."""
        await self.stop_gateways()
        await self.carrier.sandbox.close()
        await self._balancer.close()
        for relay in self.relays:
            await relay.close()

    def forget(self) -> None:
        """Let the carrier forget what is over."""
        self.carrier.forget(self.answered)

    def leftovers(self) -> list[str]:
        """Return the files that gateways which have stopped left behind where mails are prepared."""
        places = [self.folder / "incoming", *self.folder.glob("*/incoming*")]
        return [str(file) for place in places if place.is_dir() for file in place.iterdir()]
