"""The stream of mails of a crash run: what is mailed, to which numbers, and how a mail server would do it.

A mail that was not answered 250 is mailed again, under the same Message-ID, until it is. Which mails there
are and how the carrier treats their numbers follows from the seed alone.
"""

import asyncio
import base64
import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from harness import SENDER
from papers import heavy, paper

ANSWER_LIMIT = 6.0  # seconds for an answer of a gateway, which may be frozen
ONE_CONNECTION = 20  # mails at most
SLOWEST, FASTEST = 10.0, 40.0  # faxes a second

# Parts in a thousand; how the carrier treats the calls to a number, one after the other; how the fax ends.
# A carrier that takes back "delivered" is not among them: whoever missed the first word has to call again.
FATES: tuple[tuple[int, tuple[str, ...], str], ...] = (
    (780, (), "delivered"),
    (30, ("user_busy", "delivered"), "delivered"),
    (10, ("user_busy", "user_busy", "delivered"), "delivered"),
    (15, ("receiver_no_answer", "delivered"), "delivered"),
    (10, ("fax_signaling_error", "receiver_call_dropped", "delivered"), "delivered"),
    (5, ("service_unavailable", "delivered"), "delivered"),
    (20, ("receiver_unallocated_number",), "failed"),
    (10, ("destination_invalid",), "failed"),
    (15, ("webhooks-before-answer",), "delivered"),
    (15, ("webhooks-twice",), "delivered"),
    (15, ("webhooks-backwards",), "delivered"),
    (10, ("webhooks-lost",), "delivered"),
    (5, ("webhooks-forged",), "delivered"),
    (5, ("webhooks-stale",), "delivered"),
    (5, ("unknown-event",), "delivered"),
    (5, ("no-page-count",), "delivered"),
    (10, ("failed-then-delivered",), "delivered"),
    (8, ("answer-lost",), "delivered"),
    (4, ("answer-and-webhooks-lost",), "delivered"),
    (3, ("answer-lost-and-hidden",), "delivered"),
    (5, ("cut-before-acceptance", "delivered"), "delivered"),
    (3, ("500-before-acceptance", "delivered"), "delivered"),
    (2, ("503-html", "delivered"), "delivered"),
    (3, ("500-after-acceptance",), "delivered"),
    (2, ("202-without-id",), "delivered"),
    (1, ("202-html",), "delivered"),
    (1, ("202-huge",), "delivered"),
    (2, ("slow-answer",), "delivered"),
    (1, ("silence", "delivered"), "delivered"),
    (1, ("silence-after-acceptance",), "delivered"),
    (1, ("429-retry-after", "delivered"), "delivered"),
    (1, ("429-reset", "delivered"), "delivered"),
)


class Door(Protocol):
    """What a mail server knows of a gateway."""

    name: str
    smtp_port: int


class Reached(Protocol):
    """Told that a mail has come to a moment at a gateway; says whether the gateway was killed there."""

    async def __call__(self, moment: str, gateway: str) -> bool:
        """Return when whatever was to happen has happened."""


@dataclass(slots=True)
class Letter:
    """One mail and what its server was told: the ids out of the 250s that it heard."""

    message_id: str
    numbers: tuple[str, ...]
    pages: int
    sender: str
    data: bytes = field(repr=False)  # with the final dot; b"" once it was told 250
    tries: int = 0
    told: list[str] = field(default_factory=list)
    last_try: float = 0.0  # epoch seconds


@dataclass(frozen=True, slots=True)
class Fate:
    """How the carrier treats a number, and so how its fax ends: "delivered" or "failed"."""

    behaviours: tuple[str, ...]
    end: str


def numbers() -> Iterator[str]:
    """Yield valid numbers, none twice and none in the sandbox's table."""
    for exchange in range(556, 1000):
        if exchange % 100 != 11:
            yield from (f"+1312{exchange}{line:04}" for line in range(10000))


class Plan:
    """All mails of a run, from its seed."""

    def __init__(self, seed: int, faxes: int) -> None:
        """Decide the fate of so many numbers."""
        chance = random.Random(f"{seed} fates")  # noqa: S311 -- repeatable on purpose, as all chance here
        drawn = chance.choices(FATES, weights=[parts for parts, _, _ in FATES], k=faxes)
        self.fates = {
            number: Fate(names, end) for number, (_, names, end) in zip(numbers(), drawn, strict=False)
        }
        self._chance = random.Random(f"{seed} mails")  # noqa: S311
        self._seed = seed
        self._papers = [(pages, _encoded(paper(pages, text=f"letter {pages}"))) for pages in (1, 1, 2, 3)]
        self._large = [(1, _encoded(heavy(size))) for size in (300_000, 450_000, 600_000)]

    @property
    def script(self) -> dict[str, Sequence[str]]:
        """What the sandbox has to know; it delivers to all other numbers."""
        return {number: fate.behaviours for number, fate in self.fates.items() if fate.behaviours}

    def letters(self) -> Iterator[Letter]:
        """Yield the mails until every number has its fax."""
        free = iter(self.fates)
        for place in itertools.count(1):
            count = self._chance.choices((1, 2, 3), weights=(90, 6, 4))[0]
            chosen = tuple(itertools.islice(free, count))
            if not chosen:
                return
            pages, document = self._chance.choice(
                self._large if self._chance.random() < 0.02 else self._papers
            )
            yield self._letter(place, chosen, pages, document)

    def _letter(self, place: int, chosen: tuple[str, ...], pages: int, document: bytes) -> Letter:
        sender = f"{self._chance.randrange(8)}.{SENDER}"
        message_id = f"<{place}.{self._seed}@torture.example.com>"
        to = ", ".join(f"{number}@fax.local" for number in chosen)
        head = (
            f"From: {sender}\r\nTo: {to}\r\nSubject: Letter {place}\r\nMessage-ID: {message_id}\r\n"
            'MIME-Version: 1.0\r\nContent-Type: application/pdf; name="letter.pdf"\r\n'
            'Content-Disposition: attachment; filename="letter.pdf"\r\n'
            "Content-Transfer-Encoding: base64\r\n\r\n"
        )
        return Letter(message_id, chosen, pages, sender, head.encode() + document + b".\r\n")


def _encoded(document: bytes) -> bytes:
    return base64.encodebytes(document).replace(b"\n", b"\r\n")


class Conversation:
    """One SMTP connection to a gateway."""

    def __init__(self, gateway: Door, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.gateway = gateway
        self.mails = 0
        self._reader = reader
        self._writer = writer

    @classmethod
    async def begin(cls, gateway: Door) -> "Conversation":
        """Connect and say EHLO. Raises OSError."""
        async with asyncio.timeout(ANSWER_LIMIT):
            made = cls(gateway, *await asyncio.open_connection("127.0.0.1", gateway.smtp_port))
        try:
            await made.answer()
            await made.say("EHLO torture.example.com")
        except BaseException:
            made.close()
            raise
        return made

    async def say(self, command: str) -> str:
        """Return the answer. Raises OSError when there is none."""
        await self.send(command.encode() + b"\r\n")
        return await self.answer()

    async def send(self, data: bytes) -> None:
        """Send. Raises OSError."""
        async with asyncio.timeout(ANSWER_LIMIT):
            self._writer.write(data)
            await self._writer.drain()

    async def answer(self) -> str:
        """Return the last line of an answer. Raises OSError when there is none in time."""
        async with asyncio.timeout(ANSWER_LIMIT):
            while True:
                line = (await self._reader.readline()).decode()
                if not line.endswith("\n"):
                    raise ConnectionResetError
                if line[3:4] != "-":
                    return line.rstrip()

    def close(self) -> None:
        """Leave."""
        self._writer.close()


class MailServer:
    """Mails letters to gateways in random order, several at a time, until each was answered 250."""

    def __init__(
        self,
        seed: int,
        gateways: Sequence[Door],
        reached: Reached,
        busy: Callable[[], bool],
        at_once: int = 12,
    ) -> None:
        """`busy` says when to mail nothing new."""
        self.letters: list[Letter] = []
        self.refused: list[str] = []  # what was answered 5xx, which no mail here deserves
        self.repeats = 0
        self.faxes = 0  # told 250
        self._gateways = gateways
        self._reached = reached
        self._busy = busy
        self._at_once = at_once
        self._waiting: asyncio.Queue[Letter | None] = asyncio.Queue(maxsize=4 * at_once)
        self._seed = seed

    async def run(self, letters: Iterator[Letter], enough: Callable[[], bool]) -> None:
        """Mail until there is `enough` or no letter is left, and until every mail begun was answered 250."""
        async with asyncio.TaskGroup() as group:
            for place in range(self._at_once):
                group.create_task(self._work(random.Random(f"{self._seed} client {place}")))  # noqa: S311
            await self._feed(letters, enough)
            for _ in range(self._at_once):
                await self._waiting.put(None)

    async def _feed(self, letters: Iterator[Letter], enough: Callable[[], bool]) -> None:
        chance = random.Random(f"{self._seed} pace")  # noqa: S311
        rate = chance.uniform(SLOWEST, FASTEST)
        for place, letter in enumerate(letters):
            if place % 50 == 0:
                rate = chance.uniform(SLOWEST, FASTEST)
            while self._busy() and not enough():  # noqa: ASYNC110 -- others' figures ring no bell
                await asyncio.sleep(0.05)
            if enough():
                return
            self.letters.append(letter)
            await self._waiting.put(letter)
            await asyncio.sleep(len(letter.numbers) / rate)

    async def _work(self, chance: random.Random) -> None:
        conversation: Conversation | None = None
        while (letter := await self._waiting.get()) is not None:
            while letter.data:
                try:
                    if conversation is None:
                        conversation = await Conversation.begin(chance.choice(self._gateways))
                    again = await self._mail(conversation, letter, chance)
                except OSError:
                    again = False
                if conversation is not None and not again:
                    conversation.close()
                    conversation = None
                if letter.data:
                    await asyncio.sleep(chance.uniform(0.05, 0.3))
        if conversation is not None:
            conversation.close()

    async def _mail(self, conversation: Conversation, letter: Letter, chance: random.Random) -> bool:
        """Mail a letter once; return whether the connection can be used again. Raises OSError."""
        letter.tries += 1
        self.repeats += letter.tries > 1
        letter.last_try = time.time()
        gateway = conversation.gateway.name
        recipients = [f"RCPT TO:<{number}@fax.local>" for number in letter.numbers]
        for command in (f"MAIL FROM:<{letter.sender}>", *recipients, "DATA"):
            answer = await conversation.say(command)
            if answer[:1] not in "23":
                self._note(answer, letter)
                return False
        half = chance.randrange(1, len(letter.data))
        await conversation.send(letter.data[:half])
        if await self._reached("in the middle of DATA", gateway):
            return False
        await conversation.send(letter.data[half:])
        answered = asyncio.create_task(conversation.answer())
        try:
            await asyncio.wait({answered}, timeout=chance.uniform(0.0, 0.03))
            if not answered.done():
                await self._reached("after the final dot", gateway)
            answer = await answered
        finally:
            answered.cancel()
            await asyncio.gather(answered, return_exceptions=True)
        if await self._reached("the 250 said and not heard", gateway):
            return False  # on the way, and never heard
        self._note(answer, letter)
        conversation.mails += 1
        return answer.startswith("250") and conversation.mails < ONE_CONNECTION and chance.random() > 0.1

    def _note(self, answer: str, letter: Letter) -> None:
        if answer.startswith("250 2.0.0 queued as "):
            letter.told.append(answer.rpartition(" ")[2])
            self.faxes += len(letter.numbers)
            letter.data = b""
        elif answer.startswith("5"):
            self.refused.append(f"{letter.message_id}: {answer}")
            letter.data = b""
