"""The configuration: what an operator may write, what wins, and what a mistake is answered with."""

import ipaddress
import os
import re
import secrets
import tomllib
import traceback
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from gateway.config import KEYS, ConfigurationError, Fault, Settings, load, variable
from gateway.config_values import Endpoint, Relay, duration, size

WRONG = sorted((Path(__file__).parent / "data" / "config").iterdir())
EXAMPLE = Path(__file__).parents[1] / "config.example.toml"
GOOD = """
[telnyx]
api_key = "KEY0000_plantedsecret"
connection_id = "1232154810234"
from_number = "+13127367276"

[replies]
postmaster = "postmaster@example.com"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return a configuration with what is required and nothing else."""
    path = tmp_path / "config.toml"
    path.write_text(GOOD, encoding="utf-8")
    path.chmod(0o640)
    return path


def faults(path: Path, environ: dict[str, str] | None = None) -> list[str]:
    """Return the lines that an operator sees."""
    with pytest.raises(ConfigurationError) as caught:
        load(path, environ or {})
    assert str(caught.value).splitlines() == [str(fault) for fault in caught.value.faults]
    return [str(fault) for fault in caught.value.faults]


def extended(path: Path, *lines: str) -> Path:
    """Add lines to a configuration."""
    path.write_text(path.read_text(encoding="utf-8") + "\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("directory", WRONG, ids=lambda directory: directory.name)
def test_wrong_configuration(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each mistake is answered with all that is wrong, key by key, with what to do, and without secrets."""
    monkeypatch.chdir(directory)
    expected = Path("expected").read_text(encoding="utf-8").splitlines()
    assert expected
    assert faults(Path("config.toml")) == expected
    assert "plantedsecret" not in "".join(expected)


def test_there_are_enough_wrong_configurations() -> None:
    """The mistakes were found, and every section has some."""
    told = "".join((directory / "expected").read_text(encoding="utf-8") for directory in WRONG)
    assert len(WRONG) >= 20
    for section in Settings.model_fields:
        assert any(f"{key}: " in told for key in KEYS if key.startswith(f"{section}.")), section


def test_minimal_configuration_has_the_documented_defaults(file: Path) -> None:
    """Four keys are enough to begin with; everything else is set as documented."""
    settings, warnings = load(file, {})
    assert warnings == []
    assert settings.telnyx.api_key.get_secret_value() == "KEY0000_plantedsecret"
    assert settings.telnyx.from_number == "+13127367276"
    assert settings.smtp.listen == (Endpoint("127.0.0.1", 2525),)
    assert settings.smtp.max_message_size == 28_000_000
    assert settings.senders.networks == (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))
    assert settings.destinations.countries == ("US", "CA")
    assert settings.documents.max_size == 20_000_000
    assert list(settings.telnyx.doubt_checks) == [10, 30, 60, 120, 300, 600]
    assert settings.replies.relay == Relay("none", "127.0.0.1", 25)
    assert list(settings.retries.busy) == [180, 360, 720, 1200]
    assert settings.retries.give_up_after == 86_400
    assert settings.store.keep_records == 365 * 86_400


def example_values() -> dict[str, Any]:
    """Return the keys of the example with the values shown there."""
    text = re.sub(r"^# (?=[a-z0-9_]+ = )", "", EXAMPLE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {
        f"{section}.{key}": value
        for section, content in tomllib.loads(text).items()
        for key, value in content.items()
    }


def test_example_shows_every_key_in_order() -> None:
    """Whoever reads the example has seen all keys, and no key that does not exist."""
    assert list(example_values()) == list(KEYS)


def test_example_shows_the_defaults(tmp_path: Path) -> None:
    """What the example shows is what happens without it."""
    shown = example_values()
    required = {key for key, field in KEYS.items() if field.is_required()}
    assert {key for key, value in shown.items() if key in required and value == ""} == required
    path = tmp_path / "all.toml"
    path.write_text("", encoding="utf-8")
    environ = {
        "FAX_GATEWAY_TELNYX__API_KEY": "KEY",
        "FAX_GATEWAY_TELNYX__CONNECTION_ID": "1",
        "FAX_GATEWAY_TELNYX__FROM_NUMBER": "+13127367276",
        "FAX_GATEWAY_REPLIES__POSTMASTER": "a@example.com",
    }
    defaults, _ = load(path, environ)
    path.write_text(
        re.sub(r"^# (?=[a-z0-9_]+ = )", "", EXAMPLE.read_text(encoding="utf-8"), flags=re.MULTILINE),
        encoding="utf-8",
    )
    shown_settings, _ = load(path, environ)
    assert shown_settings == defaults


def test_example_explains_every_key() -> None:
    """Each key has one sentence above it."""
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    keys = [number for number, line in enumerate(lines) if re.match(r"(# )?[a-z0-9_]+ = ", line)]
    assert len(keys) == len(KEYS)
    for number in keys:
        assert re.fullmatch(r"# [A-Z].*\.", lines[number - 1]), lines[number]


def test_example_itself_asks_for_what_is_required() -> None:
    """An example that was copied but not filled in does not start."""
    assert [line.partition(":")[0] for line in faults(EXAMPLE)] == [
        "telnyx.api_key",
        "telnyx.connection_id",
        "telnyx.from_number",
        "replies.postmaster",
    ]


def test_environment_wins_over_the_file_and_credentials_over_both(file: Path, tmp_path: Path) -> None:
    """A secret from systemd is the one that counts."""
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    extended(file, 'relay_user = "fax"', 'relay_password = "of-the-file"')
    environ = {
        "CREDENTIALS_DIRECTORY": str(credentials),
        "FAX_GATEWAY_TELNYX__API_KEY": "KEY_of_the_environment",
        "FAX_GATEWAY_CONFIG": "/not/looked/at/here",
        "FAX_GATEWAYS": "another program's",
        "PATH": "/usr/bin",
    }
    settings, _ = load(file, environ)
    assert settings.telnyx.api_key == SecretStr("KEY_of_the_environment")
    assert settings.replies.relay_password == SecretStr("of-the-file")
    (credentials / "telnyx.api_key").write_text("KEY_of_systemd\n", encoding="utf-8")
    (credentials / "telnyx.public_key").write_text("A" * 42 + "E=\n", encoding="utf-8")
    (credentials / "replies.relay_password").write_text("of-systemd\n", encoding="utf-8")
    settings, _ = load(file, environ)
    assert settings.telnyx.api_key == SecretStr("KEY_of_systemd")
    assert settings.telnyx.public_key == "A" * 42 + "E="
    assert settings.replies.relay_password == SecretStr("of-systemd")
    assert settings.telnyx.connection_id == "1232154810234", "what only the file has is still there"


def test_one_section_may_come_from_everywhere(file: Path, tmp_path: Path) -> None:
    """What the file says stays, key by key, beside what variables and credentials say of the same section."""
    (tmp_path / "telnyx.public_key").write_text("A" * 42 + "E=", encoding="utf-8")
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path), "FAX_GATEWAY_TELNYX__QUALITY": "very_high"}
    telnyx = load(file, environ)[0].telnyx
    assert (telnyx.public_key, telnyx.quality) == ("A" * 42 + "E=", "very_high")
    assert (telnyx.connection_id, telnyx.channels) == ("1232154810234", 2)


def test_nothing_else_is_read(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the environment that is given counts, and no file called .env that happens to lie about."""
    monkeypatch.setenv("FAX_GATEWAY_TELNYX__CHANNELS", "7")
    monkeypatch.setenv("FAX_GATEWAY_TELNIX__CHANNELS", "7")
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("FAX_GATEWAY_TELNYX__CHANNELS=8\n", encoding="utf-8")
    assert load(file, {})[0].telnyx.channels == 2


def test_unreadable_credential_is_a_fault(file: Path, tmp_path: Path) -> None:
    """A broken credential is not passed over in favour of an older key."""
    (tmp_path / "telnyx.api_key").mkdir()
    (tmp_path / "telnyx.public_key").write_bytes(b"\xff\xfe")
    assert faults(file, {"CREDENTIALS_DIRECTORY": str(tmp_path)}) == [
        f"telnyx.api_key: the credential in {tmp_path} cannot be read",
        f"telnyx.public_key: the credential in {tmp_path} cannot be read",
    ]


@pytest.mark.parametrize(
    ("value", "domains"),
    [
        ("fax.local", ("fax.local",)),
        ("fax.local, Fax.Example.COM", ("fax.local", "fax.example.com")),
        ('["fax.local", "fax.example.com"]', ("fax.local", "fax.example.com")),
        (' ["fax.local"] ', ("fax.local",)),
    ],
)
def test_lists_in_the_environment(file: Path, value: str, domains: tuple[str, ...]) -> None:
    """A list in a variable is written with commas or as JSON."""
    settings, _ = load(file, {"FAX_GATEWAY_SMTP__DOMAINS": value})
    assert settings.smtp.domains == domains


def test_other_values_in_the_environment(file: Path) -> None:
    """Numbers, switches, times and several doors can be set by variables too; an empty list is none."""
    settings, _ = load(
        file,
        {
            "FAX_GATEWAY_TELNYX__CHANNELS": "7",
            "FAX_GATEWAY_LOG__MASK_NUMBERS": "false",
            "FAX_GATEWAY_STORE__DUPLICATE_WINDOW": "0s",
            "FAX_GATEWAY_SMTP__LISTEN": "[::1]:2525, 127.0.0.1:0",
            "FAX_GATEWAY_RETRIES__BUSY": "",
            "FAX_GATEWAY_DESTINATIONS__COUNTRIES": "[]",
            "FAX_GATEWAY_HTTP__LISTEN": "192.0.2.1:8080",
            "FAX_GATEWAY_REPLIES__RELAY": "smtps://mail.example.com",
        },
    )
    assert settings.telnyx.channels == 7
    assert settings.log.mask_numbers is False
    assert settings.store.duplicate_window == 0
    assert settings.smtp.listen == (Endpoint("::1", 2525), Endpoint("127.0.0.1", 0))
    assert settings.retries.busy == ()
    assert settings.destinations.countries == ()
    assert settings.http.listen == Endpoint("192.0.2.1", 8080)
    assert settings.replies.relay == Relay("tls", "mail.example.com", 465)


def test_wrong_variables(file: Path) -> None:
    """A misspelt variable is a fault that names the right one, and never silently without effect."""
    assert faults(
        file,
        {
            "FAX_GATEWAY_TELNIX__API_KEY": "KEY0000_plantedsecret",
            "FAX_GATEWAY_TELNYX_API_KEY": "KEY0000_plantedsecret",
            "FAX_GATEWAY_telnyx__channels": "2",
            "FAX_GATEWAY_SMTP": '{"timeout": "5m"}',
            "FAX_GATEWAY_RETRIES__LINE": '["2m"',
            "FAX_GATEWAY_TELNYX__CHANNELS": "many",
        },
    ) == [
        "FAX_GATEWAY_TELNIX__API_KEY: is not a key; did you mean FAX_GATEWAY_TELNYX__API_KEY?",
        "FAX_GATEWAY_TELNYX_API_KEY: is not a key; did you mean FAX_GATEWAY_TELNYX__API_KEY?",
        "FAX_GATEWAY_telnyx__channels: is not a key; did you mean FAX_GATEWAY_TELNYX__CHANNELS?",
        "FAX_GATEWAY_SMTP: is not a key; did you mean FAX_GATEWAY_SMTP__LISTEN?",
        "FAX_GATEWAY_RETRIES__LINE: is neither a JSON list nor values with commas between",
        "telnyx.channels: must be a whole number",
    ]


def test_missing_file_is_a_fault(tmp_path: Path) -> None:
    """Without its file the gateway does not start with defaults; variables are checked all the same."""
    path = tmp_path / "none.toml"
    assert faults(path, {"FAX_GATEWAY_LOG__LEVLE": "info"}) == [
        "FAX_GATEWAY_LOG__LEVLE: is not a key; did you mean FAX_GATEWAY_LOG__LEVEL?",
        f"there is no file {path}; create it or name another one",
    ]


def test_usual_file_may_be_missing_where_variables_are_enough(file: Path, tmp_path: Path) -> None:
    """A container needs no file; but whoever has neither is told of both."""
    path = tmp_path / "none.toml"
    environ = {
        variable(f"{section}.{key}"): value
        for section, keys in tomllib.loads(GOOD).items()
        for key, value in keys.items()
    }
    assert load(path, environ, named=False) == load(file, {})
    del environ["FAX_GATEWAY_TELNYX__FROM_NUMBER"]
    with pytest.raises(ConfigurationError) as caught:
        load(path, environ, named=False)
    assert [str(fault) for fault in caught.value.faults] == [
        'telnyx.from_number: is missing; put the fax number that you send from here, as in "+13127367276"',
        f"there is no file {path}; create it or name another one",
    ]


def test_pipe_is_not_taken_for_an_empty_file() -> None:
    """What a shell hands over by `<(…)` is not passed over in silence; the empty device is an empty file."""
    read, write = os.pipe()
    os.write(write, GOOD.encode())
    os.close(write)
    assert faults(Path(f"/dev/fd/{read}")) == [f"/dev/fd/{read} is a pipe or device; put it into a file"]
    os.close(read)
    assert len(faults(Path(os.devnull))) == 4


def test_section_as_a_value_is_a_fault_even_where_a_variable_hides_it(file: Path) -> None:
    """A file is wrong although something stronger makes up for it."""
    file.write_text("smtp = 25\n" + GOOD, encoding="utf-8")
    assert faults(file, {"FAX_GATEWAY_SMTP__TIMEOUT": "1m"}) == [
        "smtp: is a section; write [smtp] and its keys below"
    ]


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    """A directory, or a file in another encoding, is told as what it is."""
    assert faults(tmp_path) == [f"{tmp_path} cannot be read: Is a directory"]
    latin = tmp_path / "latin1.toml"
    latin.write_bytes("# Gruß".encode("latin-1"))
    assert faults(latin) == [f"{latin} is not a text in UTF-8"]


def test_secrets_are_never_shown(file: Path) -> None:
    """Settings can be printed or logged without giving a secret away."""
    settings, _ = load(extended(file, 'relay_user = "fax"', 'relay_password = "plantedsecret"'), {})
    assert "plantedsecret" not in f"{settings!r} {settings} {settings.telnyx} {settings.replies}"


def test_secrets_are_not_in_the_trace_of_an_error(file: Path) -> None:
    """A program that dies of its configuration leaves no secret in its log."""
    secret = secrets.token_hex()
    extended(file, f'relay_password = "{secret}"', f'relay = "smtp://user:{secret}@mail.example.com"')
    environ = {"FAX_GATEWAY_TELNYX__API_KEY": f"the {secret}", "FAX_GATEWAY_RETRIES__LINE": f'["{secret}'}
    with pytest.raises(ConfigurationError) as caught:
        load(file, environ)
    assert len(caught.value.faults) == 4
    assert secret not in "".join(traceback.format_exception(caught.value))


def test_settings_cannot_be_changed(file: Path) -> None:
    """What was checked at the start stays as it is."""
    settings, _ = load(file, {})
    with pytest.raises(ValueError, match="frozen"):
        settings.telnyx.channels = 3


@pytest.mark.parametrize(
    ("lines", "warning"),
    [
        (
            '[senders]\nnetworks = ["0.0.0.0/0"]',
            "senders.networks: 0.0.0.0/0 lets the whole Internet send faxes at your expense",
        ),
        (
            '[senders]\nnetworks = ["::1/128", "::/0"]',
            "senders.networks: ::/0 lets the whole Internet send faxes at your expense",
        ),
        (
            '[smtp]\nmax_message_size = "20MB"',
            "smtp.max_message_size: is too small for a mail with a document of documents.max_size",
        ),
        (
            'relay = "smtp://mail.example.com"\nrelay_user = "fax"\nrelay_password = "x"',
            "replies.relay: has no TLS; the relay's password can be read on the way",
        ),
    ],
)
def test_dangers_are_warned_of(file: Path, lines: str, warning: str) -> None:
    """What is allowed but probably not meant is told at the start."""
    _, warnings = load(extended(file, lines), {})
    assert [str(found) for found in warnings] == [warning]


def test_unencrypted_carrier_is_warned_of_unless_it_is_here(file: Path) -> None:
    """The sandbox on this machine needs no TLS; the carrier does."""
    base = "FAX_GATEWAY_TELNYX__API_BASE"
    for here in ("http://127.0.0.1:8090/v2", "http://localhost:8090/v2", "http://[::1]:8090/v2"):
        assert load(file, {base: here})[1] == []
    assert load(file, {base: "http://api.telnyx.com/v2"})[1] == [
        Fault("telnyx.api_base", "is not https; the API key and the documents can be read on the way")
    ]


def test_password_may_go_unencrypted_to_this_machine(file: Path) -> None:
    """Login at a relay on this machine is no danger."""
    assert load(extended(file, 'relay_user = "fax"', 'relay_password = "x"'), {})[1] == []


@pytest.mark.parametrize("secret", ["api_key", "relay_password"])
def test_readable_secret_is_warned_of(tmp_path: Path, secret: str) -> None:
    """A file with a secret that everybody can read is told; without a secret it is nobody's business."""
    path = tmp_path / "config.toml"
    path.write_text(GOOD.replace('api_key = "KEY0000_plantedsecret"\n', ""), encoding="utf-8")
    environ = {"FAX_GATEWAY_TELNYX__API_KEY": "KEY", "FAX_GATEWAY_REPLIES__RELAY_USER": "fax"}
    environ["FAX_GATEWAY_REPLIES__RELAY_PASSWORD"] = "of-the-environment"
    path.chmod(0o644)
    assert load(path, environ)[1] == []
    section = "telnyx" if secret == "api_key" else "replies"
    path.write_text(
        path.read_text(encoding="utf-8").replace(f"[{section}]", f'[{section}]\n{secret} = "in-the-file"'),
        encoding="utf-8",
    )
    (warning,) = load(path, environ)[1]
    assert str(warning) == f"{path} holds a secret and can be read by everybody here; chmod 0640 {path}"
    path.chmod(0o640)
    assert load(path, environ)[1] == []


@pytest.mark.parametrize(
    ("url", "relay"),
    [
        ("smtp://mail.example.com", Relay("none", "mail.example.com", 25)),
        ("smtp://127.0.0.1:1025/", Relay("none", "127.0.0.1", 1025)),
        ("smtps://mail.example.com", Relay("tls", "mail.example.com", 465)),
        ("smtp+starttls://[2001:db8::25]", Relay("starttls", "2001:db8::25", 587)),
        ("SMTP://mail.example.com:2525", Relay("none", "mail.example.com", 2525)),
    ],
)
def test_relay_urls(file: Path, url: str, relay: Relay) -> None:
    """Each way to reach a mail server has its scheme and its usual port."""
    settings, _ = load(extended(file, f'relay = "{url}"'), {})
    assert settings.replies.relay == relay


def test_relay_beside_the_gateway_is_no_loop(file: Path) -> None:
    """Another port of the same machine, or the same port of another one, is a relay like any other."""
    for listen, relay in (("0.0.0.0:2525", "smtp://127.0.0.1:25"), ("127.0.0.1:25", "smtp://192.0.2.1:25")):
        settings, _ = load(file, {"FAX_GATEWAY_SMTP__LISTEN": listen, "FAX_GATEWAY_REPLIES__RELAY": relay})
        assert settings.replies.relay.port == 25


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("200ms", 0.2),
        ("90s", 90),
        ("15m", 900),
        ("2h", 7200),
        ("5d", 432_000),
        ("0s", 0),
        ("3650d", 315_360_000),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    """Times are written with their unit."""
    assert duration(text) == seconds
    assert isinstance(duration(text), float)


@pytest.mark.parametrize(
    ("text", "count"), [("1B", 1), ("500kB", 500_000), ("20MB", 20_000_000), ("1GB", 10**9)]
)
def test_sizes(text: str, count: int) -> None:
    """Sizes are decimal, as carriers and disks count them."""
    assert size(text) == count


@given(st.sampled_from([duration, size]), st.one_of(st.text(max_size=20), st.integers(), st.none()))
def test_other_forms_are_told_and_not_guessed(read: Any, value: object) -> None:
    """Whatever is written for a time or size is one, or a fault with an example in it."""
    try:
        found = read(value)
    except ValueError as error:
        told = str(error)
    else:
        told = f'"{found:.0f}"'
    assert re.search('"[0-9]+', told)


def test_variables_are_named_after_their_keys() -> None:
    """The variable of a key is found without a table."""
    assert variable("telnyx.api_key") == "FAX_GATEWAY_TELNYX__API_KEY"
