"""Addresses: which number a mail means, and who may send to it."""

import dataclasses
import ipaddress
import re

import phonenumbers
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.address import Policy, Refusal, split_rcpt

E164 = re.compile(r"\+[1-9][0-9]{6,14}")

POLICY = Policy(
    domains=("fax.local", "Fax.Example.COM"),
    default_region="US",
    countries=frozenset({"US", "CA"}),
    allow=(),
    deny=(),
    premium=False,
    sender_networks=(ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128")),
    sender_addresses=("*",),
    own_address="notices@fax-office.example",
)
WORLD = dataclasses.replace(POLICY, countries=frozenset())
GERMANY = dataclasses.replace(POLICY, default_region="DE", countries=frozenset({"DE"}))


def answer(refused: pytest.ExceptionInfo[Refusal]) -> str:
    """Return a refusal as the client reads it."""
    return f"{refused.value.code} {refused.value.status} {refused.value.text}"


@pytest.mark.parametrize(
    ("local", "number"),
    [
        ("+13127367276", "+13127367276"),
        ("13127367276", "+13127367276"),
        ("3127367276", "+13127367276"),
        ("+1-312-736-7276", "+13127367276"),
        ("+1.312.736.7276", "+13127367276"),
        ("+1(312)736-7276", "+13127367276"),
        ("(312)736-7276", "+13127367276"),
        ("1-312-736-7276", "+13127367276"),
        ('"+1 312 736 7276"', "+13127367276"),
        ('"(312) 736-7276"', "+13127367276"),
        ('"+1\\ 312 7367276"', "+13127367276"),
        ("fax=+13127367276", "+13127367276"),
        ("FAX=+1-312-736-7276", "+13127367276"),
        ("fax=3127367276", "+13127367276"),
        ("/fax=+13127367276/", "+13127367276"),
        ("/FAX=+13127367276/", "+13127367276"),
        ("/fax=+13127367276", "+13127367276"),
        ('"/fax=+1 312 736 7276/"', "+13127367276"),
        ("011-49-40-30123456", "+494030123456"),
        ("442079460000", "+442079460000"),
        ("+49(40)30123456", "+494030123456"),
        ("+49(0)4030123456", "+494030123456"),
        ("+49.40.30123456", "+494030123456"),
        ("+390612345678", "+390612345678"),
        ("+39(0)612345678", "+390612345678"),
        ("+13125550123", "+13125550123"),
        ("+881612345678", "+881612345678"),
    ],
)
def test_every_way_to_write_a_number(local: str, number: str) -> None:
    """A number is understood in each form that people and programs write it in."""
    assert POLICY.parse_recipient(local, "fax.local") == number


@pytest.mark.parametrize(
    ("local", "number"),
    [
        ("040-30123456", "+494030123456"),
        ("00442079460000", "+442079460000"),
        ("+13127367276", "+13127367276"),
    ],
)
def test_national_numbers_follow_the_default_region(local: str, number: str) -> None:
    """Where `default_region` is DE, numbers are dialled as in Germany."""
    assert GERMANY.parse_recipient(local, "fax.local") == number


@pytest.mark.parametrize("domain", ["fax.local", "FAX.LOCAL", "fax.local.", "fax.example.com"])
def test_domains_are_compared_without_case(domain: str) -> None:
    """A domain is ours however it is capitalised."""
    assert POLICY.parse_recipient("+13127367276", domain) == "+13127367276"


@pytest.mark.parametrize(
    "domain", ["example.com", "evil.fax.local", "fax.local.evil", "[127.0.0.1]", "fax..local"]
)
def test_other_domains_are_not_relayed(domain: str) -> None:
    """The gateway cannot be used to send mail elsewhere."""
    with pytest.raises(Refusal) as refused:
        POLICY.parse_recipient("+13127367276", domain)
    assert answer(refused).startswith("550 5.7.1 relaying denied")


def test_number_without_domain_is_refused() -> None:
    """A bare local part is not guessed at."""
    with pytest.raises(Refusal) as refused:
        POLICY.parse_recipient("+13127367276", "")
    assert answer(refused).startswith("550 5.1.2 ")


@pytest.mark.parametrize(
    "local",
    [
        "",
        '""',
        "+",
        "++13127367276",
        "john.doe",
        "postmaster",
        "911",
        "112",
        "+1911",
        "+49112",
        "7276",
        "0",
        "0049403012345678901234567890",
        "+0049403012345",
        "+1312736727",
        "+131273672766",
        "+999123456789",
        "1-800-FLOWERS",
        "+1800FLOWERS",
        "+13127367276x5",
        "+13127367276;ext=5",
        "3127367276#5",
        '"+1 312 736 7276 ext 5"',
        "+1312+7367276",
        "+1312736727%31",
        "\uff0b\uff11\uff13127367276",
        "\u0661\u0663\u0661\u06627367276",
        "+13127367276\x00",
        "+1312736\r\n7276",
        "+1312736\u200b7276",
        "voice=+13127367276",
        "fax=",
        "fax=fax=+13127367276",
        "+13127367276/",
        '"+13127367276',
        "\udcff+13127367276",
        "+1312736" + "-" * 60 + "7276",
    ],
)
def test_what_is_no_number_is_refused_with_the_expected_form(local: str) -> None:
    """A sender who mistyped is told at once how to write the number."""
    with pytest.raises(Refusal) as refused:
        POLICY.parse_recipient(local, "fax.local")
    assert answer(refused).startswith("550 5.1.1 ")
    assert "+13125550123@fax.local" in refused.value.text


@pytest.mark.parametrize("local", ["fax=+13127367276/T33S=6377", "/fax=+13127367276/T33S=6377/"])
def test_sub_address_is_refused_and_not_dropped(local: str) -> None:
    """A fax for one desk does not go to the whole house."""
    with pytest.raises(Refusal) as refused:
        POLICY.parse_recipient(local, "fax.local")
    assert answer(refused).startswith("550 5.1.1 sub-addresses are not supported")


@pytest.mark.parametrize(
    ("local", "likely"),
    [("+1-1-312-736-7276", "+13127367276"), ("+49040-30123456", "+494030123456")],
)
def test_digits_too_many_are_not_dropped_in_silence(local: str, likely: str) -> None:
    """The gateway suggests what may have been meant, but does not call it."""
    with pytest.raises(Refusal) as refused:
        POLICY.parse_recipient(local, "fax.local")
    assert answer(refused).startswith("550 5.1.3 ")
    assert likely in refused.value.text


@pytest.mark.parametrize(
    ("policy", "local", "readings"),
    [
        (WORLD, "4232345678", ("+14232345678", "+4232345678")),
        (WORLD, "(239)222-1234", ("+12392221234", "+2392221234")),
        (dataclasses.replace(POLICY, allow=("+423*",)), "4232345678", ("+14232345678", "+4232345678")),
        (
            dataclasses.replace(WORLD, default_region="DE"),
            "441212345678",
            ("+49441212345678", "+441212345678"),
        ),
        # At home it would be written with a 0 in front, so it may well be meant as British.
        (GERMANY, "441212345678", ("+49441212345678", "+441212345678")),
        # Neither reading may be called: the answer is still that it is not clear.
        (dataclasses.replace(POLICY, deny=("+1423*",)), "4232345678", ("+14232345678", "+4232345678")),
    ],
)
def test_number_that_reads_two_ways_is_refused(policy: Policy, local: str, readings: tuple[str, str]) -> None:
    """No document goes to a stranger because digits could be read in two ways; both are shown."""
    with pytest.raises(Refusal) as refused:
        policy.parse_recipient(local, "fax.local")
    assert answer(refused).startswith("550 5.1.3 this number reads two ways")
    for reading in readings:
        assert reading in refused.value.text
    assert policy.parse_recipient(readings[0], "fax.local") == readings[0]


def test_number_written_as_at_home_is_that_if_nothing_else_may_be_called() -> None:
    """With only US and CA open, ten digits are never mistaken for a number in Liechtenstein."""
    assert POLICY.parse_recipient("4232345678", "fax.local") == "+14232345678"


@pytest.mark.parametrize(
    ("number", "policy", "why"),
    [
        ("+13127367276", POLICY, None),
        ("+14165550123", POLICY, None),
        ("+18005551234", POLICY, None),
        ("+494030123456", POLICY, "the region DE"),
        ("+18095551234", POLICY, "the region DO"),
        ("+18765551234", POLICY, "the region JM"),
        ("+494030123456", WORLD, None),
        ("+18095551234", WORLD, None),
        ("+19005551234", WORLD, "a premium-rate number"),
        ("+449098790000", WORLD, "a premium-rate number"),
        ("+447012345678", WORLD, "a personal number"),
        ("+80812345678", WORLD, "a shared-cost number"),
        ("+881612345678", WORLD, "no country, such as a satellite"),
        ("+883510012345", WORLD, "no country, such as a satellite"),
        ("+447640123456", WORLD, "a pager"),
        ("+80012345678", WORLD, None),
        ("+80012345678", POLICY, "the region 001"),
        ("+99912345678", WORLD, "a number of an unknown kind"),
        ("+13120000000", WORLD, "a number of an unknown kind"),
        ("+19005551234", dataclasses.replace(POLICY, premium=True), None),
        ("+447012345678", dataclasses.replace(POLICY, premium=True), "the region GB"),
        ("+881612345678", dataclasses.replace(WORLD, premium=True), None),
        ("+881612345678", dataclasses.replace(POLICY, premium=True), "the region 001"),
        ("+447640123456", dataclasses.replace(WORLD, premium=True), "a pager"),
        ("+494030123456", dataclasses.replace(POLICY, allow=("+4940*",)), None),
        ("+498930123456", dataclasses.replace(POLICY, allow=("+4940*",)), "the region DE"),
        ("+19005551234", dataclasses.replace(POLICY, allow=("+1900*",)), "a premium-rate number"),
        ("+13127367276", dataclasses.replace(POLICY, deny=("+1312*",)), "faxes to +13127367276"),
        ("+13137367276", dataclasses.replace(POLICY, deny=("+1312*",)), None),
        ("+13127367276", dataclasses.replace(POLICY, deny=("*7276",), allow=("+1312*",)), "faxes to"),
        ("+13127367276", dataclasses.replace(POLICY, deny=("1312*", "312*")), None),
        ("+13127367276", dataclasses.replace(POLICY, deny=("+1312736727?",)), "faxes to"),
    ],
)
def test_destinations(number: str, policy: Policy, why: str | None) -> None:
    """Money is spent only on the destinations that were opened: deny, kind, allow, country, in this order."""
    if why is None:
        policy.permit_destination(number)
        return
    with pytest.raises(Refusal) as refused:
        policy.permit_destination(number)
    assert answer(refused).startswith("550 5.7.1 ")
    assert why in refused.value.text
    assert number in refused.value.text
    assert not re.search(r"[0-9]{4}", refused.value.log), "the log gets no whole number"


@pytest.mark.parametrize(
    ("peer", "allowed"),
    [
        ("127.0.0.1", True),
        ("127.255.255.254", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("192.0.2.1", False),
        ("::ffff:192.0.2.1", False),
        ("::2", False),
        ("fe80::1%eth0", False),
        ("", False),
        ("localhost", False),
    ],
)
def test_networks(peer: str, allowed: bool) -> None:  # noqa: FBT001  (a table)
    """Only listed networks may send; an IPv4 client of an IPv6 socket is the IPv4 client it is."""
    if allowed:
        POLICY.permit_client(peer)
        return
    with pytest.raises(Refusal) as refused:
        POLICY.permit_client(peer)
    assert answer(refused) == "550 5.7.1 faxes are not taken from this network"


def test_without_networks_nobody_may_send() -> None:
    """An empty list opens nothing."""
    with pytest.raises(Refusal):
        dataclasses.replace(POLICY, sender_networks=()).permit_client("127.0.0.1")


@pytest.mark.parametrize(
    ("sender", "globs", "allowed"),
    [
        ("ann@example.com", ("*",), True),
        ("ann@example.com", ("*@example.com",), True),
        ("Ann@Example.COM", ("*@example.com",), True),
        ("ann@example.com", ("ANN@EXAMPLE.COM",), True),
        ("ann@example.com", ("bob@example.com", "ann@*"), True),
        ("ann@example.com.evil.test", ("*@example.com",), False),
        ("ann@evilexample.com", ("*@example.com",), False),
        ("joann@example.com", ("ann@example.com",), False),
        ("ann@example.com\nbob@x", ("*@example.com",), False),
        ("ann@example.com", (), False),
        ("", ("*",), False),
        ("<>", ("*",), False),
        ("anybody@fax.local", ("*",), False),
        ("+13127367276@FAX.example.com", ("*",), False),
        ("Notices@fax-office.example", ("*",), False),
        ("ann@fax-office.example", ("*",), True),
    ],
)
def test_senders(sender: str, globs: tuple[str, ...], allowed: bool) -> None:  # noqa: FBT001  (a table)
    """Only listed senders may send, and only who can be answered: nobody reads what comes to the gateway."""
    policy = dataclasses.replace(POLICY, sender_addresses=globs)
    if allowed:
        policy.permit_sender(sender)
        return
    with pytest.raises(Refusal) as refused:
        policy.permit_sender(sender)
    assert answer(refused).startswith("550 5.7.1 ")


@pytest.mark.parametrize(
    ("local", "domain", "expected"),
    [
        ("postmaster", "", True),
        ("Postmaster", "", True),
        ("POSTMASTER", "FAX.local", True),
        ("postmaster", "example.com", False),
        ("postmaster2", "fax.local", False),
        ("+13127367276", "fax.local", False),
    ],
)
def test_postmaster(local: str, domain: str, expected: bool) -> None:  # noqa: FBT001  (a table)
    """The postmaster can be reached without a domain or at each of ours, in any case."""
    assert POLICY.is_postmaster(local, domain) is expected


@pytest.mark.parametrize(
    ("raw", "local", "domain"),
    [
        ("TO:<+13127367276@fax.local>", "+13127367276", "fax.local"),
        ("to:<+13127367276@fax.local>", "+13127367276", "fax.local"),
        ("TO: <+13127367276@fax.local> ", "+13127367276", "fax.local"),
        ("<+13127367276@fax.local>", "+13127367276", "fax.local"),
        ("TO:+13127367276@fax.local", "+13127367276", "fax.local"),
        ("TO:+13127367276@fax.local NOTIFY=NEVER", "+13127367276", "fax.local"),
        (
            "TO:<+13127367276@fax.local> NOTIFY=SUCCESS,FAILURE ORCPT=rfc822;a@b",
            "+13127367276",
            "fax.local",
        ),
        ("TO:<+49(40)30123456@fax.local>", "+49(40)30123456", "fax.local"),
        ("TO:<(312)736-7276@fax.local>", "(312)736-7276", "fax.local"),
        ('TO:<"+1 312 736 7276"@fax.local>', '"+1 312 736 7276"', "fax.local"),
        ('TO:<"a>b@c \\" d"@fax.local>', '"a>b@c \\" d"', "fax.local"),
        ("TO:<@one.example,@two.example:+1312@fax.local>", "+1312", "fax.local"),
        ("TO:<Postmaster>", "Postmaster", ""),
        ("TO:<a@b@fax.local>", "a@b", "fax.local"),
        ("TO:<+1312@[127.0.0.1]>", "+1312", "[127.0.0.1]"),
        ("TO:<to:@fax.local>", "to:", "fax.local"),
    ],
)
def test_rcpt_line_is_split_as_it_stands(raw: str, local: str, domain: str) -> None:
    """Parentheses stay in the number: the client's digits are the digits that are read."""
    assert split_rcpt(raw) == (local, domain)


@pytest.mark.parametrize(
    "raw",
    [
        "",
        "TO:",
        "TO:<>",
        "TO:<+1312@fax.local",
        "TO:<@fax.local>",
        "TO:<+1312@>",
        "TO:<@one.example>",
        'TO:<"+1312@fax.local>',
        "TO:<+1312@fax.local>NOTIFY=NEVER",
        "TO:<@one.example:>",
    ],
)
def test_malformed_rcpt_line(raw: str) -> None:
    """What is not an address is refused as such."""
    with pytest.raises(Refusal) as refused:
        split_rcpt(raw)
    assert answer(refused) == "501 5.1.3 this address is malformed"


def test_parentheses_are_not_a_comment() -> None:
    """A fax for Hamburg does not go to Berlin."""
    local, domain = split_rcpt("TO:<+49(40)30123456@fax.local>")
    assert POLICY.parse_recipient(local, domain) == "+494030123456"


POLICIES = st.sampled_from([POLICY, WORLD, GERMANY])
NUMBERISH = st.text('+0123456789()-. "/faxFAX=#;,*\\@<>', max_size=70)


@given(POLICIES, st.one_of(NUMBERISH, st.text(st.characters(exclude_categories=[]), max_size=70)))
def test_whatever_is_written_is_a_number_or_a_refusal(policy: Policy, local: str) -> None:
    """No address brings the door down, and what comes out can be dialled as it is."""
    try:
        number = policy.parse_recipient(local, "fax.local")
    except Refusal as refusal:
        check(refusal)
        return
    assert E164.fullmatch(number)
    assert policy.parse_recipient(number, "fax.local") == number
    try:
        policy.permit_destination(number)
    except Refusal as refusal:
        check(refusal)


@given(st.one_of(NUMBERISH, st.text(st.characters(exclude_categories=[]), max_size=70)))
def test_any_rcpt_line_is_an_address_or_a_refusal(raw: str) -> None:
    """No line brings the door down."""
    try:
        local, domain = split_rcpt(raw)
    except Refusal as refusal:
        check(refusal)
        return
    assert local in raw
    assert domain in raw


@given(
    st.sampled_from(sorted(phonenumbers.SUPPORTED_REGIONS)),
    st.sampled_from([0, 1]),
    st.lists(st.sampled_from(["", "-", ".", "(", ")", " "]), min_size=20, max_size=20),
)
def test_punctuation_never_changes_the_number(region: str, kind: int, between: list[str]) -> None:
    """Whatever stands between the digits, the digits are called."""
    example = phonenumbers.example_number_for_type(region, kind)
    if example is None:
        return
    number = phonenumbers.format_number(example, phonenumbers.PhoneNumberFormat.E164)
    written = '"' + "".join(char + mark for char, mark in zip(number, between, strict=False)) + '"'
    if "(0)" in written:
        return
    assert POLICY.parse_recipient(written, "fax.local") == number


def check(refusal: Refusal) -> None:
    """Assert that a refusal fits into one reply line and gives nothing back that the client wrote."""
    line = str(refusal)
    assert line.isprintable()
    assert line.isascii()
    assert len(line) < 512
    assert re.match(r"5[0-9]{2} 5\.[17]\.[0-9] \S", line)
    assert refusal.log.isprintable()
