"""The forms of single values in the configuration: durations, sizes, addresses, numbers, URLs.

In charge of turning what a file or a variable holds into what the gateway works with.

Promises: each type here takes any object and gives the value or fails.

Fails: with a text for an operator that says which form is expected; a secret, or a URL that somebody may have
put a password into, is never repeated in it.
"""

import base64
import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from email.policy import default as modern
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import phonenumbers
from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, SecretStr
from pydantic_settings import NoDecode

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Security = Literal["none", "tls", "starttls"]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where to listen; port 0 is any free one."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Relay:
    """The mail server that replies are handed to."""

    security: Security
    host: str
    port: int


_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86_400}
_LONGEST = 3650 * 86_400
_BYTES = {"B": 1, "kB": 1000, "MB": 1_000_000, "GB": 1_000_000_000}
_RELAYS: dict[str, tuple[Security, int]] = {
    "smtp": ("none", 25),
    "smtps": ("tls", 465),
    "smtp+starttls": ("starttls", 587),
}


def _match(pattern: str, value: object, says: str) -> re.Match[str]:
    found = re.fullmatch(pattern, value) if isinstance(value, str) else None
    if found is None:
        raise ValueError(says)
    return found


def duration(value: object) -> float:
    """Return the seconds of `200ms`, `90s`, `15m`, `2h` or `5d`, ten years at most. Raises ValueError."""
    says = 'must be a number with its unit in quotes, as in "200ms", "90s", "15m", "2h" or "5d"'
    found = _match(r"([0-9]{1,9})(ms|s|m|h|d)", value, says)
    seconds = float(int(found[1]) * _SECONDS[found[2]])
    if seconds > _LONGEST:
        raise ValueError('must be at most "3650d"')
    return seconds


def _wait(value: object) -> float:
    seconds = duration(value)
    if not seconds:
        raise ValueError('must be longer than "0s"')
    return seconds


def size(value: object) -> int:
    """Return the bytes of `500kB` or `20MB` (decimal units). Raises ValueError."""
    says = 'must be a number with its unit in quotes, as in "500kB" or "20MB"'
    found = _match(r"([1-9][0-9]{0,8})(B|kB|MB|GB)", value, says)
    return int(found[1]) * _BYTES[found[2]]


def _host(value: object) -> str:
    if isinstance(value, str) and ":" in value:
        return str(ipaddress.IPv6Address(value.strip("[]")))
    return _match(r"(?i)[a-z0-9_][a-z0-9_.-]{0,252}", value, "has no host")[0]


def _endpoint(value: object) -> Endpoint:
    says = 'must be an address and a port in quotes, as in "127.0.0.1:2525" or "[::1]:2525"'
    found = _match(r"(\[[0-9a-fA-F:.]+\]|[^\s:\[\]]+):(?=[0-9]{1,5}$)(.+)", value, says)
    try:
        endpoint = Endpoint(_host(found[1]), int(found[2]))
    except ValueError:
        raise ValueError(says) from None
    if endpoint.port >= 1 << 16:
        raise ValueError(says)
    return endpoint


def _relay(value: object) -> Relay:
    says = 'must be "smtp://host:port", "smtps://host:port" or "smtp+starttls://host:port"'
    try:
        url = urlsplit(_match(r"[!-~]+", value, says)[0])
        security, usual_port = _RELAYS[url.scheme]
        relay = Relay(security, _host(url.hostname), url.port or usual_port)
    except (ValueError, KeyError):
        raise ValueError(says) from None
    if "@" in url.netloc:
        raise ValueError(
            "takes no user and password; they have keys of their own, relay_user and relay_password"
        )
    if url.path.strip("/") or url.query or url.fragment:
        raise ValueError(says)
    return relay


def _network(value: object) -> Network:
    says = 'must be a network in quotes, as in "192.0.2.0/24"'
    try:
        network = ipaddress.ip_network(_match(r"\S+", value, says)[0])
    except ValueError as error:
        raise ValueError(str(error) if says in str(error) else f"{says}: {error}") from None
    if isinstance(network, ipaddress.IPv6Network) and network.network_address.ipv4_mapped is not None:
        raise ValueError(f"{value} is a network of IPv4 written as one of IPv6; write it as IPv4")
    return network


def _domain(value: object) -> str:
    label = "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
    says = 'must be a domain in quotes, as in "fax.example.com"'
    return _match(rf"(?i)(?=.{{1,253}}$){label}(\.{label})*", value, says)[0].lower()


def _hostname(value: object) -> str:
    return "" if value == "" else _domain(value)


def _mail_address(value: object) -> str:
    says = 'must be a mail address, as in "postmaster@example.com"'
    found = _match(r"[0-9A-Za-z.!#$%&'*+/=?^_`{|}~-]{1,64}@(.+)", value, says)
    try:
        _domain(found[1])
    except ValueError:
        raise ValueError(says) from None
    return found[0]


def _mailbox(value: object) -> str:
    says = 'must be one mailbox, as in "Fax gateway <fax@example.com>"'
    text = _match(r"[^\x00-\x1f\x7f]+", value, says)[0]
    header: Any = modern.header_factory("Reply-To", text)
    try:
        (mailbox,) = header.addresses
        _mail_address(mailbox.addr_spec)
    except ValueError:
        raise ValueError(says) from None
    if header.defects:
        raise ValueError(says)
    return text


def _region(value: object) -> str:
    says = 'must be a country in two capital letters, as in "US" (ISO 3166-1)'
    region = _match(r"[A-Z]{2}", value, says)[0]
    if region not in phonenumbers.SUPPORTED_REGIONS:
        raise ValueError(f"{says}; there is no {region}")
    return region


def _number(value: object) -> str:
    says = 'must be a valid telephone number with its country code, as in "+13127367276"'
    number = _match(r"\+[1-9][0-9]{6,14}", value, says)[0]
    try:
        known = phonenumbers.is_valid_number(phonenumbers.parse(number))
    except phonenumbers.NumberParseException:
        known = False
    if not known:
        raise ValueError(says)
    return number


def _secret(value: object) -> SecretStr:
    says = "must be a text in quotes, plain ASCII without blanks and line ends"
    return SecretStr(_match(r"[!-~]*", value, says)[0])


def _public_key(value: object) -> str:
    says = "must be the account's public key as the portal shows it: Base64 of 32 bytes, not all zero"
    text = _match(r"[!-~]*", value, says)[0]
    try:
        key = base64.b64decode(text, validate=True)
    except ValueError:
        raise ValueError(says) from None
    if text and (len(key) != 32 or not any(key)):  # noqa: PLR2004  (RFC 8032, 5.1.5)
        raise ValueError(says)
    return text


def _webhook_path(value: object) -> str:
    says = 'must be a path that nothing else has, as in "/webhooks/telnyx"'
    path = _match(r"(/[A-Za-z0-9._~-]+)+", value, says)[0]
    if path in {"/healthz", "/readyz", "/metrics"}:
        raise ValueError(says)
    return path


def _ascending(waits: tuple[float, ...]) -> tuple[float, ...]:
    if not waits or list(waits) != sorted(set(waits)):
        raise ValueError("must be at least one time, each later than the one before")
    return waits


def _document_size(value: object) -> int:
    found = size(value)
    if found > 20_000_000:  # noqa: PLR2004  (the carrier's limit for a document inside the request)
        raise ValueError('must be at most "20MB", more is not taken by the carrier')
    return found


def _not_empty(entries: tuple[Any, ...]) -> tuple[Any, ...]:
    if not entries:
        raise ValueError("must have at least one entry")
    return entries


def _not_boolean(value: object) -> object:
    return "true or false" if isinstance(value, bool) else value  # pydantic would count True as 1


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _text(pattern: str, says: str) -> Callable[[object], str]:
    """Return a check of a text that is taken as it is."""
    return lambda value: _match(pattern, value, says)[0]


Duration = Annotated[float, PlainValidator(duration)]
Wait = Annotated[float, PlainValidator(_wait)]
Waits = tuple[Wait, ...]
AscendingWaits = Annotated[Waits, AfterValidator(_ascending)]
Size = Annotated[int, PlainValidator(size)]
DocumentSize = Annotated[int, PlainValidator(_document_size)]
Count = Annotated[int, BeforeValidator(_not_boolean), Field(ge=1)]
EndpointText = Annotated[Endpoint, NoDecode, PlainValidator(_endpoint)]  # in a variable, too, it is no JSON
Endpoints = Annotated[tuple[EndpointText, ...], BeforeValidator(_listed), AfterValidator(_not_empty)]
RelayUrl = Annotated[Relay, NoDecode, PlainValidator(_relay)]
NetworkText = Annotated[Network, PlainValidator(_network)]
Domains = Annotated[tuple[Annotated[str, PlainValidator(_domain)], ...], AfterValidator(_not_empty)]
Hostname = Annotated[str, PlainValidator(_hostname)]
MailAddress = Annotated[str, PlainValidator(_mail_address)]
Mailbox = Annotated[str, PlainValidator(_mailbox)]
Region = Annotated[str, PlainValidator(_region)]
Number = Annotated[str, PlainValidator(_number)]
Secret = Annotated[SecretStr, PlainValidator(_secret)]
PublicKey = Annotated[str, PlainValidator(_public_key)]
WebhookPath = Annotated[str, PlainValidator(_webhook_path)]
UserName = Annotated[str, PlainValidator(_text(r"[!-~]*", "must be a text in quotes, without blanks"))]
SenderGlob = Annotated[
    str,
    PlainValidator(
        _text(r"[!-~]*[@*][!-~]*", 'must be an address or a pattern of such in quotes, as in "*@example.com"')
    ),
]
NumberGlob = Annotated[
    str,
    PlainValidator(
        _text(
            r"[+*?\[][0-9*?\[\]!-]*",
            'must be a number with its +, or a pattern of such, in quotes, as in "+1312*"',
        )
    ),
]
ConnectionId = Annotated[
    str,
    PlainValidator(_text(r"[0-9]{1,40}", "must be the id of your Fax Application: digits, in quotes")),
]
ApiBase = Annotated[
    str,
    PlainValidator(
        _text(
            r"https?://[^\s/?#@]+(/[^\s/?#]+)*",
            'must be a URL without query and final slash, as in "https://api.telnyx.com/v2"',
        )
    ),
]


def _store_url(value: object) -> SecretStr:
    says = (
        'must be "sqlite:///" and an absolute path, as in "sqlite:////var/lib/email-fax-gateway/gateway.db", '
        'or "postgresql://user:password@host/database"'
    )
    text = value.get_secret_value() if isinstance(value, SecretStr) else value
    if isinstance(text, str) and text.startswith("postgresql://"):
        # What SQLAlchemy reads otherwise than libpq shall not wait for the start of the daemon.
        user = r"([^/?#\s@]*@)?"
        if re.match(rf"postgresql://{user}[^/?#\s@]*,[^/?#\s@]*/", text):
            raise ValueError(
                "takes several hosts as parameters, as in "
                '"postgresql://user:password@/database?host=db1:5432&host=db2:5432"'
            )
        host = r"(\[[0-9a-fA-F:.]+\]|[^/?#\s@:\[\]]*)(:[0-9]{1,5})?"
        says = (
            'must be "postgresql://user:password@host:port/database"; in a password, '
            "@ is written as %40, : as %3A, / as %2F, % as %25"
        )
        return SecretStr(_match(rf"postgresql://{user}{host}/[^/?#\s]+(\?[^#\s]+)?", text, says)[0])
    return SecretStr(_match(r"sqlite:////[^?#\s]*[^/?#\s]", text, says)[0])


StoreUrl = Annotated[SecretStr, PlainValidator(_store_url)]
"""A secret, since it may hold the password of PostgreSQL."""
