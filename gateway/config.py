"""The settings: every key with its type, default and limits, and where the values come from.

In charge of what pydantic-settings reads from the TOML file, the environment (`FAX_GATEWAY_SECTION__KEY`) and
systemd's credentials, of which the later win over the earlier, and of telling an operator what is wrong.

Promises: `load` returns settings that every part of the gateway can rely on. No text of it, and no `repr`,
shows a secret. It reads the given file and environment and the credentials, and nothing else.

Fails: `ConfigurationError` with every fault that can be found at once, each under its key with what to do.
"""

import difflib
import ipaddress
import json
import re
import stat
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_origin
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from gateway import config_values as values
from gateway.config_values import Endpoint, Relay, duration, size

PREFIX = "FAX_GATEWAY_"
LOCATION = "FAX_GATEWAY_CONFIG"
"""The variable that names the file: the only one with the prefix that is not a key."""
CREDENTIALS = ("telnyx.api_key", "telnyx.public_key", "replies.relay_password", "store.url")
"""Keys that may be files in `$CREDENTIALS_DIRECTORY` (systemd.exec(5), "Credentials")."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Something wrong, or probably not meant, with `section.key` or a variable; empty for the whole file."""

    key: str
    text: str

    def __str__(self) -> str:
        """Return one line for an operator."""
        return f"{self.key}: {self.text}" if self.key else self.text


class ConfigurationError(Exception):
    """The configuration cannot be used; `faults` holds all that was found."""

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__("\n".join(map(str, faults)))
        self.faults = faults


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class Smtp(_Section):
    """`[smtp]`: the door for mail."""

    listen: values.Endpoints = (Endpoint("127.0.0.1", 2525),)
    hostname: values.Hostname = ""
    domains: values.Domains = ("fax.local",)
    max_message_size: values.Size = size("28MB")
    max_recipients: values.Count = 50
    max_connections: values.Count = 200
    max_connections_per_host: values.Count = 20
    timeout: values.Wait = duration("5m")


class Senders(_Section):
    """`[senders]`: who may send without login."""

    networks: tuple[values.NetworkText, ...] = (
        ipaddress.ip_network("127.0.0.0/8"),
        ipaddress.ip_network("::1/128"),
    )
    addresses: tuple[values.SenderGlob, ...] = ("*",)


class Destinations(_Section):
    """`[destinations]`: where faxes may go."""

    default_region: values.Region = "US"
    countries: tuple[values.Region, ...] = ("US", "CA")
    allow: tuple[values.NumberGlob, ...] = ()
    deny: tuple[values.NumberGlob, ...] = ()
    premium: bool = False


class Documents(_Section):
    """`[documents]`: what may be faxed; the carrier takes no more than the defaults."""

    max_pages: Annotated[values.Count, Field(le=350)] = 350
    max_size: values.DocumentSize = size("20MB")


class Telnyx(_Section):
    """`[telnyx]`: the carrier."""

    api_key: values.Secret
    connection_id: values.ConnectionId
    from_number: values.Number
    public_key: values.PublicKey = ""
    api_base: values.ApiBase = "https://api.telnyx.com/v2"
    quality: Literal["normal", "high", "very_high", "ultra_light", "ultra_dark"] = "high"
    t38_enabled: bool = True
    monochrome: bool = False
    channels: values.Count = 2
    poll_after: values.Wait = duration("2m")
    doubt_checks: values.AscendingWaits = tuple(map(duration, ("10s", "30s", "1m", "2m", "5m", "10m")))


class Http(_Section):
    """`[http]`: the door for the carrier's events and for monitoring."""

    listen: values.EndpointText = Endpoint("127.0.0.1", 8080)
    webhook_path: values.WebhookPath = "/webhooks/telnyx"


class Replies(_Section):
    """`[replies]`: mail out."""

    relay: values.RelayUrl = Relay("none", "127.0.0.1", 25)
    relay_user: values.UserName = ""
    relay_password: values.Secret = SecretStr("")
    sender: values.Mailbox = "Fax gateway <fax@fax.local>"
    postmaster: values.MailAddress
    format: Literal["mail", "report"] = "mail"
    attach_first_page: bool = True
    delayed_after: values.Wait = duration("4h")
    give_up_after: values.Wait = duration("5d")


class Retries(_Section):
    """`[retries]`: the waits before each new call, by kind of failure."""

    busy: values.Waits = tuple(map(duration, ("3m", "6m", "12m", "20m")))
    no_answer: values.Waits = tuple(map(duration, ("15m", "30m", "60m")))
    line: values.Waits = tuple(map(duration, ("2m", "10m", "30m")))
    provider: values.Waits = tuple(map(duration, ("5m", "15m", "60m")))
    declined: values.Waits = (duration("60m"),)
    max_calls: values.Count = 5
    give_up_after: values.Wait = duration("24h")


class Store(_Section):
    """`[store]`: the database."""

    url: values.StoreUrl = SecretStr("sqlite:////var/lib/email-fax-gateway/gateway.db")
    keep_documents: values.Duration = duration("1d")
    keep_records: values.Wait = duration("365d")
    duplicate_window: values.Duration = duration("24h")


class Log(_Section):
    """`[log]`: what is told, and how."""

    format: Literal["auto", "console", "json"] = "auto"
    level: Literal["debug", "info", "warning", "error"] = "info"
    mask_numbers: bool = True


class Settings(BaseSettings):
    """Everything that can be set."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True, hide_input_in_errors=True
    )

    smtp: Smtp
    senders: Senders
    destinations: Destinations
    documents: Documents
    telnyx: Telnyx
    http: Http
    replies: Replies
    retries: Retries
    store: Store
    log: Log

    def __init__(self, sources: tuple[PydanticBaseSettingsSource, ...]) -> None:
        super().__init__(sources=sources)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the sources that `load` made, the strongest first; the usual ones read `os.environ`."""
        del settings_cls, env_settings, dotenv_settings, file_secret_settings
        return tuple(init_settings()["sources"])


KEYS: Mapping[str, FieldInfo] = {
    f"{section}.{key}": field
    for section, model in Settings.model_fields.items()
    for key, field in cast("type[_Section]", model.annotation).model_fields.items()
}
"""Every key, in order."""

SAFE_LAST_CHECK = 270.0
"""Seconds after which no request can be on its way: a claim's lease, and the longest POST."""

_REQUIRED = {
    "telnyx.api_key": "create an API key (V2) in the Telnyx portal and put it here or into a credential",
    "telnyx.connection_id": "put the id of your Fax Application of the Telnyx portal here",
    "telnyx.from_number": 'put the fax number that you send from here, as in "+13127367276"',
    "replies.postmaster": "put the address of a person who reads alerts here",
}


def load(
    path: Path, environ: Mapping[str, str], *, named: bool = True, secrets: bool = True
) -> tuple[Settings, list[Fault]]:
    """Return the settings, and warnings about what is allowed but dangerous or without effect.

    `environ` is the process's environment. A file that somebody `named` must exist; at the usual place none
    needs to, if the environment and the credentials hold what is required. Without `secrets` it is no fault
    that the credentials are not there: an operator's command runs outside the unit that has them. Raises
    `ConfigurationError`.
    """
    faults: list[Fault] = []
    credentials, environment = _credentials(environ, faults), _environment(environ, faults)
    file, absent = InitSettingsSource(Settings, {}), []
    try:
        file = _file(path, faults)
    except FileNotFoundError:
        absent = [Fault("", f"there is no file {path}; create it or name another one")]
        if named:
            raise ConfigurationError(faults + absent) from None
    unneeded = InitSettingsSource(Settings, {} if secrets else {"telnyx": {"api_key": "(unused)"}})
    settings = Settings((credentials, environment, file, unneeded, _Check(faults, absent, secrets=secrets)))
    return settings, list(_warnings(settings, path, file.init_kwargs))


def variable(key: str) -> str:
    """Return the environment's name of a key: `FAX_GATEWAY_TELNYX__API_KEY`."""
    return PREFIX + key.replace(".", "__").upper()


def _file(path: Path, faults: list[Fault]) -> TomlConfigSettingsSource:
    """Return the file. One that cannot be read ends it: what it would have held is not worth guessing."""
    try:
        # What is no plain file the source passes over in silence. That is right for an empty one: /dev/null.
        ignored = not path.is_file() and path.read_bytes()
        source = TomlConfigSettingsSource(Settings, path)
    except FileNotFoundError:
        raise
    except OSError as error:
        text = f"{path} cannot be read: {error.strerror}"
    except UnicodeDecodeError:
        text = f"{path} is not a text in UTF-8"
    except tomllib.TOMLDecodeError as error:
        text = f"{path} is not TOML: {error}"
    else:
        if not ignored:
            faults += _unknown_keys(source.toml_data)
            return source
        text = f"{path} is a pipe or device; put it into a file"
    raise ConfigurationError([*faults, Fault("", text)])


def _unknown_keys(content: Mapping[str, Any]) -> Iterable[Fault]:
    """Yield what is no key, or no section, in a file."""
    for section, keys in content.items():
        if not isinstance(keys, dict):
            is_section = section in Settings.model_fields
            text = f"is a section; write [{section}] and its keys below" if is_section else _unknown(section)
            yield Fault(section, text)
        elif section not in Settings.model_fields:
            near = difflib.get_close_matches(section, Settings.model_fields, n=1, cutoff=0.5)
            there = f"did you mean [{near[0]}]?" if near else f"there are {', '.join(Settings.model_fields)}"
            yield Fault(section, f"is not a section; {there}")
        else:
            unknown = (key for key in (f"{section}.{name}" for name in keys) if key not in KEYS)
            yield from (Fault(key, _unknown(key)) for key in unknown)


def _environment(environ: Mapping[str, str], faults: list[Fault]) -> EnvSettingsSource:
    """Return the variables that are keys; what else has the prefix would be passed over in silence."""
    variables = {variable(key): key for key in KEYS}
    found: dict[str, str] = {}
    for name, value in environ.items():
        if not name.startswith(PREFIX) or name == LOCATION:
            continue
        if name not in variables:
            near = difflib.get_close_matches(name.upper(), variables, n=1, cutoff=0)
            faults.append(Fault(name, f"is not a key; did you mean {near[0]}?"))
            continue
        is_list = get_origin(KEYS[variables[name]].annotation) is tuple
        try:
            found[name.lower()] = _json_list(value) if is_list else value
        except ValueError:
            faults.append(Fault(name, "is neither a JSON list nor values with commas between"))
    source = EnvSettingsSource(Settings)
    source.env_vars = found  # instead of those of os.environ
    return source


def _json_list(value: str) -> str:
    """Return a list as JSON, the only form that the source takes. Raises ValueError."""
    if re.match(r'\s*\[\s*["\]]', value):  # and not an endpoint of IPv6
        json.loads(value)
        return value
    return json.dumps([item.strip() for item in value.split(",") if item.strip()])


def _credentials(environ: Mapping[str, str], faults: list[Fault]) -> InitSettingsSource:
    """Return the credentials. The source of pydantic-settings would pass over one that is broken."""
    directory = environ.get("CREDENTIALS_DIRECTORY")
    found: dict[str, dict[str, str]] = {}
    for key in CREDENTIALS if directory else ():
        section, _, name = key.partition(".")
        try:
            found.setdefault(section, {})[name] = Path(directory or "", key).read_text("utf-8").strip()
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError):
            faults.append(Fault(key, f"the credential in {directory} cannot be read"))
    return InitSettingsSource(Settings, found)


class _Check(InitSettingsSource):
    """The weakest source: an empty section for each, once all that the others found proved good."""

    def __init__(self, faults: list[Fault], absent: list[Fault], *, secrets: bool) -> None:
        super().__init__(Settings, {section: {} for section in Settings.model_fields})
        self.faults, self.absent, self.secrets = faults, absent, secrets

    def __call__(self) -> dict[str, Any]:
        """Return the empty sections, or raise `ConfigurationError` with every fault."""
        found = _validated(self.current_state, self.faults)
        self.faults += [fault for fault in _conflicts(found) if self.secrets or fault.key not in CREDENTIALS]
        if self.faults:
            raise ConfigurationError(self.faults + self.absent)
        return super().__call__()


def _unknown(key: str) -> str:
    """Return words for a key that does not exist, naming the one that was probably meant."""
    section, _, name = key.rpartition(".")
    same_name = [known for known in KEYS if known.endswith(f".{name}")]
    near = same_name or difflib.get_close_matches(key, KEYS, n=1, cutoff=0.7)
    if near:
        return f"is not a key; did you mean {near[0]}?"
    others = [known.partition(".")[2] for known in KEYS if known.startswith(f"{section}.")]
    return f"is not a key; [{section}] has {', '.join(others)}" if others else "is not a section"


def _validated(raw: Mapping[str, Any], faults: list[Fault]) -> dict[str, Any]:
    """Return the good values by key, defaults included."""
    found = {}
    for key, field in KEYS.items():
        section, _, name = key.partition(".")
        keys = raw.get(section)
        value = keys.get(name) if isinstance(keys, dict) else None
        if value is None or (value == "" and key in _REQUIRED):
            if field.is_required():
                faults.append(Fault(key, f"is missing; {_REQUIRED[key]}"))
            else:
                found[key] = field.default
            continue
        adapter: TypeAdapter[Any] = TypeAdapter(field.rebuild_annotation())
        try:
            found[key] = adapter.validate_python(value)
        except ValidationError as error:
            faults += [Fault(key, _in_words(value, detail)) for detail in error.errors()]
    return found


def _in_words(value: object, detail: ErrorDetails) -> str:
    """Return what is wrong with a value. Never shows it: it may be a secret in the wrong place."""
    context = detail.get("ctx", {})
    match detail["type"].partition("_")[0]:
        case "value":
            words = str(context["error"])
        case "literal":
            words = f"must be one of {context['expected']}".replace("'", '"')
        case "bool":
            words = "must be true or false"
        case "int":
            words = "must be a whole number"
        case "greater":
            words = f"must be at least {context['ge']}"
        case "less":
            words = f"must be at most {context['le']}"
        case _:
            words = 'must be a list, as in ["one", "two"]'
    several = isinstance(value, list) and len(value) > 1 and detail["loc"]
    return f"entry {int(detail['loc'][0]) + 1} {words}" if several else words


def _conflicts(found: Mapping[str, Any]) -> Iterable[Fault]:
    """Yield what is wrong between keys, where all keys of a pair are good by themselves."""
    relay, endpoints = found.get("replies.relay"), found.get("smtp.listen", ())
    if relay and any(_is_same(relay, endpoint, found.get("smtp.hostname")) for endpoint in endpoints):
        yield Fault("replies.relay", "is the gateway's own door (smtp.listen); name your mail server")
    if found.get("replies.postmaster", "").rpartition("@")[2].lower() in found.get("smtp.domains", ()):
        yield Fault(
            "replies.postmaster", "is at one of smtp.domains: its mail would come back in here for ever"
        )
    user, password = found.get("replies.relay_user"), found.get("replies.relay_password")
    if user and password == SecretStr(""):
        yield Fault("replies.relay_password", "is missing; replies.relay_user needs it")
    if user == "" and password:
        yield Fault("replies.relay_user", "is missing; replies.relay_password needs it")
    keep = found.get("store.keep_records")
    for key in ("store.keep_documents", "store.duplicate_window"):
        if keep is not None and found.get(key, 0) > keep:
            yield Fault(key, "must not be longer than store.keep_records")


def _is_same(relay: Relay, endpoint: Endpoint, hostname: str | None) -> bool:
    """Tell whether mail to the relay would come back in at the endpoint."""
    if relay.port != endpoint.port:
        return False
    return _place(relay.host) == _place(endpoint.host) or (
        _place(endpoint.host) == "any"
        and (_place(relay.host) == "loopback" or relay.host.lower() == hostname)
    )


def _place(host: str) -> str:
    if host.lower() == "localhost":
        return "loopback"
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower()
    if address.is_loopback:
        return "loopback"
    return "any" if address.is_unspecified else str(address)


def _warnings(settings: Settings, path: Path, content: Mapping[str, Any]) -> Iterable[Fault]:
    secrets = (
        content.get("telnyx", {}).get("api_key"),
        content.get("replies", {}).get("relay_password"),
        urlsplit(content.get("store", {}).get("url", "")).password,
    )
    if any(secrets) and path.stat().st_mode & stat.S_IROTH:
        yield Fault("", f"{path} holds a secret and can be read by everybody here; chmod 0640 {path}")
    for network in settings.senders.networks:
        if network.prefixlen == 0:
            yield Fault("senders.networks", f"{network} lets the whole Internet send faxes at your expense")
    # Base64 is a third longer than the document, and has line ends (RFC 2045, 6.8).
    if settings.smtp.max_message_size < settings.documents.max_size * 4 / 3 * 78 / 76:
        yield Fault("smtp.max_message_size", "is too small for a mail with a document of documents.max_size")
    if settings.telnyx.doubt_checks[-1] < SAFE_LAST_CHECK:
        text = f"ends before {SAFE_LAST_CHECK:.0f} s: a request may still be on its way at the last check"
        yield Fault("telnyx.doubt_checks", text)
    api = urlsplit(settings.telnyx.api_base)
    if api.scheme == "http" and _place(api.hostname or "") != "loopback":
        yield Fault("telnyx.api_base", "is not https; the API key and the documents can be read on the way")
    relay = settings.replies.relay
    if settings.replies.relay_user and relay.security == "none" and _place(relay.host) != "loopback":
        yield Fault("replies.relay", "has no TLS; the relay's password can be read on the way")
