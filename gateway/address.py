"""Who may send, and which number they mean: the questions asked at MAIL and RCPT.

In charge of reading the address on the RCPT line, of turning its local part into a number in E.164, and of
the rules on networks, senders and destinations. Pure: no clock, no files, no sockets.

Promises: a number is returned only if it can be read in one way, because a wrong number gives a document to a
stranger. The address is read as it stands on the line: parentheses are part of a number here and not comments
(RFC 5322, 3.2.2), else `+49(40)30123456` would call another city.

Fails: `Refusal`, and nothing else, for whatever is not understood or not allowed.
"""

import ipaddress
import re
import string
from dataclasses import dataclass
from fnmatch import fnmatchcase

import phonenumbers
from phonenumbers import PhoneNumber, PhoneNumberFormat, PhoneNumberType

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

LONGEST_LOCAL_PART = 64
"""Octets (RFC 5321, 4.5.3.1.1)."""

_NON_GEOGRAPHIC = "001"  # the region that phonenumbers gives to +870, +881 and the like (UN M.49: World)
_PUNCTUATION = " ().-"
_NEVER = {
    PhoneNumberType.PAGER: "a pager",
    PhoneNumberType.VOICEMAIL: "a voice mailbox",
    PhoneNumberType.UNKNOWN: "a number of an unknown kind",
}
_EXPENSIVE = {
    PhoneNumberType.PREMIUM_RATE: "a premium-rate number",
    PhoneNumberType.SHARED_COST: "a shared-cost number",
    PhoneNumberType.PERSONAL_NUMBER: "a personal number, charged by where it is forwarded to",
}
# RFC 3192 puts the words before the number and a sub-address behind it.
_FAX_ADDRESS = re.compile(r"/?fax=(?P<number>[^/]*)(?P<rest>/.*)?", re.IGNORECASE)


class Refusal(Exception):
    """The answer to an address: `code` and `status` (RFC 5321, RFC 3463) and two texts.

    `text` is for the sender, `log` for the log. Neither holds anything that the client wrote; `text` may name
    numbers that were understood.
    """

    def __init__(self, code: int, status: str, text: str, log: str) -> None:
        super().__init__(f"{code} {status} {text}")
        self.code = code
        self.status = status
        self.text = text
        self.log = log


@dataclass(frozen=True, slots=True)
class Policy:
    """What may be sent, by whom and where to; the keys of `[smtp]`, `[senders]` and `[destinations]`.

    `default_region` and `countries` are two-letter regions (ISO 3166-1), `allow` and `deny` globs over E.164,
    `sender_addresses` globs over whole addresses. No `countries` means all of them.
    """

    domains: tuple[str, ...]
    default_region: str
    countries: frozenset[str]
    allow: tuple[str, ...]
    deny: tuple[str, ...]
    premium: bool
    sender_networks: tuple[Network, ...]
    sender_addresses: tuple[str, ...]
    own_address: str  # what replies come from

    def is_postmaster(self, local: str, domain: str) -> bool:
        """Tell whether mail goes to the postmaster, which may stand without a domain (RFC 5321, 4.5.1)."""
        return local.lower() == "postmaster" and (not domain or self._is_ours(domain))

    def permit_client(self, address: str) -> None:
        """Raise `Refusal` unless the peer's IP address is in one of the networks that may send."""
        try:
            peer = ipaddress.ip_address(address)
        except ValueError:
            raise Refusal(550, "5.7.1", _CLIENT, "the peer has no IP address") from None
        if isinstance(peer, ipaddress.IPv6Address) and peer.ipv4_mapped is not None:
            peer = peer.ipv4_mapped  # ::ffff:192.0.2.1, as a socket open to both families shows it
        if not any(peer in network for network in self.sender_networks):
            raise Refusal(550, "5.7.1", _CLIENT, "the network is not in senders.networks")

    def knows_client(self, address: str) -> bool:
        """Tell whether the peer is in one of the networks that may send."""
        try:
            self.permit_client(address)
        except Refusal:
            return False
        return True

    def permit_sender(self, envelope_from: str) -> None:
        """Raise `Refusal` unless the envelope sender may send faxes; the null sender never may."""
        if envelope_from in {"", "<>"}:
            raise Refusal(550, "5.7.1", "a fax needs a sender who can be told of its fate", "null sender")
        address = envelope_from.lower()
        if self._is_ours(address.rpartition("@")[2]) or address == self.own_address.lower():
            answer = "this sender address is the fax gateway's own, where nobody reads what became of the fax"
            raise Refusal(550, "5.7.1", answer, "the sender is an address of ours")
        if not any(fnmatchcase(address, glob.lower()) for glob in self.sender_addresses):
            raise Refusal(
                550,
                "5.7.1",
                "this sender address may not send faxes here",
                "the sender is not in senders.addresses",
            )

    def parse_recipient(self, local: str, domain: str) -> str:
        """Return the number that an address means, in E.164.

        `local` is the local part as on the RCPT line. Understood are `+1312…`, `1312…` and national digits of
        the default region, each with dots, dashes, parentheses, or in quotes with blanks; and `fax=+1312…` or
        `/fax=+1312…/` (RFC 3192). Raises `Refusal`.
        """
        if not domain:
            raise self._not_a_number("no domain", status="5.1.2")
        if not self._is_ours(domain):
            raise Refusal(
                550, "5.7.1", f"relaying denied; {self._form()}", "the domain is not in smtp.domains"
            )
        written = self._written(local)
        digits = "".join(char for char in written if char not in _PUNCTUATION)
        if digits.startswith("+"):
            return self._international(written, digits)
        return self._bare(digits)

    def permit_destination(self, number: str) -> None:
        """Raise `Refusal` unless faxes may be sent to `number` (E.164).

        Asked in this order: `deny`; the number's type; `allow`; the country, by the region of the number,
        since 25 of them share +1. `premium` opens premium-rate, shared-cost and personal numbers, and those
        of no country, such as satellites'; the free ones of these are open anyway. Pagers and voice mailboxes
        stay shut, as neither takes a fax.
        """
        refusal = self._objection(number)
        if refusal is not None:
            raise refusal

    def _objection(self, number: str) -> Refusal | None:
        if any(fnmatchcase(number, glob) for glob in self.deny):
            return _closed(f"faxes to {number} are not allowed here", "destinations.deny")
        number_type, region = _described(number)
        kind = self._closed_kind(number_type, region)
        if kind is not None:
            return _closed(f"{number} is {kind}; faxes to those are not allowed here", f"it is {kind}")
        if any(fnmatchcase(number, glob) for glob in self.allow):
            return None
        if self.countries and region not in self.countries:
            return _closed(
                f"{number} is in the region {region}; faxes to there are not allowed here",
                f"{region} is not in destinations.countries",
            )
        return None

    def _closed_kind(self, kind: int, region: str) -> str | None:
        """Return words for the number's kind if it is one that is not called."""
        if kind in _NEVER or self.premium:
            return _NEVER.get(kind)
        if kind in _EXPENSIVE:
            return _EXPENSIVE[kind]
        if region == _NON_GEOGRAPHIC and kind != PhoneNumberType.TOLL_FREE:
            return "a number of no country, such as a satellite's"
        return None

    def _written(self, local: str) -> str:
        """Return the number as it was written, without what RFC 3192 and RFC 5321 allow around it."""
        if len(local) > LONGEST_LOCAL_PART:
            raise self._not_a_number("local part too long")
        written = _unquoted(local)
        match = _FAX_ADDRESS.fullmatch(written)
        if match is not None:
            if match["rest"] not in {None, "/"}:
                raise self._not_a_number("sub-address", "sub-addresses are not supported")
            written = match["number"]
        sign, rest = written[:1], written[1:]
        if any(char not in string.digits + _PUNCTUATION for char in rest) or sign not in set(
            string.digits + _PUNCTUATION + "+"
        ):
            raise self._not_a_number(
                "other characters than a number's", "letters and extensions cannot be called"
            )
        return written

    def _international(self, written: str, digits: str) -> str:
        number = _valid(digits, None)
        if number is None:
            raise self._not_a_number("not valid after +")
        # `(0)` is the digit that is dialled at home only; phonenumbers leaves it out where that is right.
        if number not in {digits, "+" + re.sub(r"\D", "", written.replace("(0)", "", 1))}:
            raise Refusal(
                550, "5.1.3", f"this number has digits too many; if it is {number}, write it so", "odd digits"
            )
        return number

    def _bare(self, digits: str) -> str:
        """Read digits without a plus as those of the default region, and as those behind a plus.

        Two readings are a refusal. One exception: a number written whole, as at home, is taken for that if
        faxes to the other reading are not allowed anyway. Else every tenth number of the United States would
        be refused (measured) for the sake of some island that nobody here may call.
        """
        home = _valid(digits, self.default_region)
        abroad = _valid("+" + digits, None)
        if abroad is not None and abroad != "+" + digits:
            abroad = None
        if home is None or abroad is None or home == abroad:
            number = home or abroad
            if number is None:
                raise self._not_a_number("not valid")
            return number
        if digits == _national_digits(home) and self._objection(home) is None and self._objection(abroad):
            return home
        raise Refusal(
            550,
            "5.1.3",
            f"this number reads two ways, as {home} and as {abroad}; write the one you mean, with its +",
            "reads two ways",
        )

    def _is_ours(self, domain: str) -> bool:
        return domain.lower().removesuffix(".") in {known.lower() for known in self.domains}

    def _form(self) -> str:
        return f"write the fax number with its country code, as in +13125550123@{self.domains[0]}"

    def _not_a_number(self, log: str, why: str = "no such fax number", *, status: str = "5.1.1") -> Refusal:
        return Refusal(550, status, f"{why}; {self._form()}", f"no such fax number: {log}")


_CLIENT = "faxes are not taken from this network"


def split_rcpt(raw: str) -> tuple[str, str]:
    """Return local part and domain, as written, of the argument of RCPT: `TO:<local@domain> parameters`.

    Nothing is taken away but what stands around the address: the angle brackets and a source route, to be
    ignored (RFC 5321, appendix C). Quotes stay on. Without an at sign the domain is empty. Raises `Refusal`.
    """
    rest = raw.strip()
    if rest[:3].upper() == "TO:":
        rest = rest[3:].lstrip()
    end = _outside_quotes(rest, ">" if rest.startswith("<") else " \t")
    if rest.startswith("<"):
        if not end:
            raise _malformed("no closing bracket")
        path = rest[1 : end[0]]
        if rest[end[0] + 1 :][:1].strip():
            raise _malformed("text behind the address")
    else:
        path = rest[: end[0]] if end else rest
    if path.startswith("@"):
        _, colon, path = path.partition(":")
        if not colon:
            raise _malformed("a source route without end")
    signs = _outside_quotes(path, "@")
    local, domain = (path[: signs[-1]], path[signs[-1] + 1 :]) if signs else (path, "")
    if not local or (signs and not domain):
        raise _malformed("a part is empty")
    return local, domain


def _outside_quotes(text: str, wanted: str) -> list[int]:
    """Return where one of the characters `wanted` stands outside a quoted string (RFC 5321, 4.1.2)."""
    found = []
    quoted = escaped = False
    for index, char in enumerate(text):
        if escaped:
            escaped = False
        elif quoted and char == "\\":
            escaped = True
        elif char == '"':
            quoted = not quoted
        elif not quoted and char in wanted:
            found.append(index)
    return found


def _unquoted(local: str) -> str:
    """Return the content of a quoted string, anything else as it is."""
    if len(local) > 1 and local[0] == local[-1] == '"':
        return re.sub(r"\\(.)", r"\1", local[1:-1])
    return local


def _valid(digits: str, region: str | None) -> str | None:
    """Return the number in E.164 if the numbering plans know it."""
    try:
        number: PhoneNumber = phonenumbers.parse(digits, region)
    except phonenumbers.NumberParseException:
        return None
    if not phonenumbers.is_valid_number(number):
        return None
    formatted = phonenumbers.format_number(number, PhoneNumberFormat.E164)
    return formatted if re.fullmatch(r"\+[1-9][0-9]{6,14}", formatted) else None


def _described(number: str) -> tuple[int, str]:
    """Return the type and the region of a number; unknown and empty if no numbering plan knows it."""
    try:
        parsed = phonenumbers.parse(number)
    except phonenumbers.NumberParseException:
        return PhoneNumberType.UNKNOWN, ""
    return phonenumbers.number_type(parsed), phonenumbers.region_code_for_number(parsed) or ""


def _national_digits(number: str) -> str:
    written = phonenumbers.format_number(phonenumbers.parse(number), PhoneNumberFormat.NATIONAL)
    return re.sub(r"\D", "", written)


def _malformed(log: str) -> Refusal:
    return Refusal(501, "5.1.3", "this address is malformed", f"malformed address: {log}")


def _closed(text: str, log: str) -> Refusal:
    return Refusal(550, "5.7.1", text, f"destination not allowed: {log}")
