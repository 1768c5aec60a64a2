"""What is counted, for Prometheus to scrape.

In charge of the names, labels and buckets of all metrics, in a registry of its own, so that two gateways in
one process count apart. Names begin with `fax_gateway_`.

Promises: values of labels come from the closed sets written here, never from outside, so no peer can make the
list grow; each is there from the start, as 0.

Counters and histograms are advanced by whoever sees the thing happen. What describes the queue is asked of
the store just before each scrape and handed over whole.

Fails: never; nothing here touches a file or a socket.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
"""The media type of what `Metrics.render` returns."""

MailAnswer = Literal["accepted", "duplicate", "refused", "failed"]
CallResult = Literal["taken", "refused", "unavailable", "in_doubt"]
WebhookResult = Literal["applied", "parked", "duplicate", "forged", "malformed", "ignored", "failed"]
Outcome = Literal["delivered", "failed", "cancelled"]
ReplyKind = Literal["delivered", "failed", "cancelled", "delayed", "alert", "postmaster"]
ReplyResult = Literal["sent", "deferred", "given_up"]
AlertCause = Literal[
    "fax_held", "call_stuck", "call_refused", "contradiction", "account_held", "reply_given_up", "other"
]
Verb = Literal["submit", "ask", "list"]
Waiting = Literal["queued", "submitting", "sending", "in_doubt", "held"]

_ACCEPT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_CARRIER_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


@dataclass(frozen=True, slots=True)
class Queue:
    """The queue at the moment of a scrape, as the store counts it.

    `waiting` holds the faxes without a final state; a state that is missing has none. `overdue` counts those
    past their deadline and has the target 0. `oldest_waiting` is the age of the oldest of them in seconds.
    `on_hold` tells of an account hold. `outbox` counts mails not yet sent or given up, `parked` the carrier's
    events whose fax is not known yet.
    """

    waiting: Mapping[Waiting, int]
    overdue: int
    oldest_waiting: float
    on_hold: bool
    outbox: int
    parked: int


class Metrics:
    """The counters of one gateway; safe to use from any thread."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self._mails = _counter(registry, "mails", "Mails, by what they were answered.", answer=MailAnswer)
        self._calls = _counter(
            registry, "calls", "Calls asked for, by the carrier's answer.", result=CallResult
        )
        self._webhooks = _counter(
            registry, "webhooks", "The carrier's events, by what became of them.", result=WebhookResult
        )
        self._faxes = _counter(registry, "faxes", "Faxes that have ended.", outcome=Outcome)
        self._replies = _counter(
            registry, "replies", "Mails handed to the relay, or tried.", kind=ReplyKind, result=ReplyResult
        )
        self._alerts = _counter(registry, "alerts", "Alerts to the postmaster, by cause.", cause=AlertCause)
        self._accept = Histogram(
            "fax_gateway_accept_seconds",
            "From the final dot of a mail to the answer.",
            buckets=_ACCEPT_BUCKETS,
            registry=registry,
        )
        self._carrier = Histogram(
            "fax_gateway_carrier_request_seconds",
            "How long the carrier took to answer, or not to.",
            ["verb"],
            buckets=_CARRIER_BUCKETS,
            registry=registry,
        )
        for verb in get_args(Verb):
            self._carrier.labels(verb)
        self._waiting = Gauge(
            "fax_gateway_faxes_waiting", "Faxes without a final state.", ["state"], registry=registry
        )
        self._overdue = _gauge(registry, "faxes_overdue", "Faxes past their deadline without a final state.")
        self._oldest = _gauge(
            registry, "oldest_waiting_seconds", "Age of the oldest fax without a final state."
        )
        self._on_hold = _gauge(
            registry, "on_hold", "1 while the account, or the number sent from, is on hold."
        )
        self._outbox = _gauge(registry, "outbox_waiting", "Mails neither sent nor given up.")
        self._parked = _gauge(registry, "events_parked", "Events of the carrier whose fax is not known yet.")
        self.show(Queue({}, overdue=0, oldest_waiting=0, on_hold=False, outbox=0, parked=0))

    def mail(self, answer: MailAnswer, seconds: float | None = None) -> None:
        """Count a mail answered `seconds` after its final dot, or before it came so far."""
        self._mails.labels(answer).inc()
        if seconds is not None:
            self._accept.observe(seconds)

    def call(self, result: CallResult) -> None:
        """Count a call asked for."""
        self._calls.labels(result).inc()

    def webhook(self, result: WebhookResult) -> None:
        """Count a request to the webhook door."""
        self._webhooks.labels(result).inc()

    def fax(self, outcome: Outcome) -> None:
        """Count a fax that has ended."""
        self._faxes.labels(outcome).inc()

    def reply(self, kind: ReplyKind, result: ReplyResult) -> None:
        """Count an attempt to hand a mail to the relay."""
        self._replies.labels(kind, result).inc()

    def alert(self, cause: str) -> None:
        """Count a mail to the postmaster; a cause not in `AlertCause` counts as `other`."""
        self._alerts.labels(cause if cause in get_args(AlertCause) else "other").inc()

    def carrier(self, verb: Verb, seconds: float) -> None:
        """Count a request to the carrier, answered or not."""
        self._carrier.labels(verb).observe(seconds)

    def show(self, queue: Queue) -> None:
        """Set what describes the queue."""
        for state in get_args(Waiting):
            self._waiting.labels(state).set(queue.waiting.get(state, 0))
        self._overdue.set(queue.overdue)
        self._oldest.set(queue.oldest_waiting)
        self._on_hold.set(queue.on_hold)
        self._outbox.set(queue.outbox)
        self._parked.set(queue.parked)

    def render(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self._registry)


def _gauge(registry: CollectorRegistry, name: str, says: str) -> Gauge:
    return Gauge(f"fax_gateway_{name}", says, registry=registry)


def _counter(registry: CollectorRegistry, name: str, says: str, **labels: object) -> Counter:
    """Return a counter on which every combination of the labels' closed sets is there from the start."""
    counter = Counter(f"fax_gateway_{name}", says, list(labels), registry=registry)
    combinations: list[tuple[str, ...]] = [()]
    for values in labels.values():
        combinations = [(*begun, value) for begun in combinations for value in get_args(values)]
    for combination in combinations:
        counter.labels(*combination)
    return counter
