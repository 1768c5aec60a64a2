"""The metrics: what a monitoring system scrapes."""

from prometheus_client.parser import text_string_to_metric_families

from gateway.metrics import CONTENT_TYPE, Metrics, Queue


def scraped(metrics: Metrics) -> dict[str, float]:
    """Read the metrics as Prometheus does; `name{label=value,...}` gives the number."""
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def test_everything_is_there_from_the_start() -> None:
    """An alarm on a counter works before the first event, because it is scraped as 0."""
    found = scraped(Metrics())
    assert all(name.startswith("fax_gateway_") for name in found)
    for name in (
        "fax_gateway_mails_total{answer=failed}",
        "fax_gateway_webhooks_total{result=forged}",
        "fax_gateway_replies_total{kind=delayed,result=given_up}",
        "fax_gateway_faxes_waiting{state=in_doubt}",
        "fax_gateway_faxes_overdue{}",
        "fax_gateway_carrier_request_seconds_count{verb=submit}",
    ):
        assert found[name] == 0
    assert CONTENT_TYPE.startswith("text/plain; version=0.0.4")


def test_each_event_is_counted_under_its_own_label() -> None:
    """What happened once is counted once, in the right place and nowhere else."""
    metrics = Metrics()
    metrics.mail("accepted", 0.02)
    metrics.call("in_doubt")
    metrics.webhook("parked")
    metrics.fax("cancelled")
    metrics.reply("failed", "deferred")
    metrics.alert("account_held")
    metrics.carrier("list", 0.3)
    counted = {
        name: value
        for name, value in scraped(metrics).items()
        if value and "_created" not in name and "_bucket" not in name
    }
    assert counted == {
        "fax_gateway_mails_total{answer=accepted}": 1,
        "fax_gateway_accept_seconds_count{}": 1,
        "fax_gateway_accept_seconds_sum{}": 0.02,
        "fax_gateway_calls_total{result=in_doubt}": 1,
        "fax_gateway_webhooks_total{result=parked}": 1,
        "fax_gateway_faxes_total{outcome=cancelled}": 1,
        "fax_gateway_replies_total{kind=failed,result=deferred}": 1,
        "fax_gateway_alerts_total{cause=account_held}": 1,
        "fax_gateway_carrier_request_seconds_count{verb=list}": 1,
        "fax_gateway_carrier_request_seconds_sum{verb=list}": 0.3,
    }


def test_new_cause_of_an_alert_does_not_make_a_new_series() -> None:
    """However many causes there are, the number of series stays the same."""
    metrics = Metrics()
    before = set(scraped(metrics))
    metrics.alert("HTTP 418 for +13127367276")
    found = scraped(metrics)
    assert set(found) == before
    assert found["fax_gateway_alerts_total{cause=other}"] == 1


def test_queue_shows_the_last_look() -> None:
    """Gauges follow the store: a state that no fax is in any more goes back to 0."""
    metrics = Metrics()
    metrics.show(
        Queue({"queued": 4, "held": 1}, overdue=2, oldest_waiting=77.5, on_hold=True, outbox=3, parked=5)
    )
    found = scraped(metrics)
    assert found["fax_gateway_faxes_waiting{state=queued}"] == 4
    assert found["fax_gateway_faxes_waiting{state=held}"] == 1
    assert found["fax_gateway_faxes_waiting{state=sending}"] == 0
    assert found["fax_gateway_faxes_overdue{}"] == 2
    assert found["fax_gateway_oldest_waiting_seconds{}"] == 77.5
    assert found["fax_gateway_on_hold{}"] == 1
    assert found["fax_gateway_outbox_waiting{}"] == 3
    assert found["fax_gateway_events_parked{}"] == 5
    metrics.show(Queue({}, overdue=0, oldest_waiting=0, on_hold=False, outbox=0, parked=0))
    found = scraped(metrics)
    assert found["fax_gateway_faxes_waiting{state=queued}"] == 0
    assert found["fax_gateway_on_hold{}"] == 0


def test_two_gateways_in_one_process_count_apart() -> None:
    """A second gateway, as in the tests, does not disturb the first."""
    first, second = Metrics(), Metrics()
    first.call("taken")
    assert scraped(second)["fax_gateway_calls_total{result=taken}"] == 0
