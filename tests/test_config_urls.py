"""The database's URL: read as its driver reads it, or refused before the daemon starts."""

import os
from pathlib import Path

import pytest
from sqlalchemy import make_url

from gateway.config import ConfigurationError, Settings, load

NEEDED = {
    "FAX_GATEWAY_TELNYX__API_KEY": "KEY0000",
    "FAX_GATEWAY_TELNYX__CONNECTION_ID": "1232154810234",
    "FAX_GATEWAY_TELNYX__FROM_NUMBER": "+13127367276",
    "FAX_GATEWAY_REPLIES__POSTMASTER": "postmaster@example.com",
}


def settings_with(url: str) -> Settings:
    """Return the settings with that URL of the database; raises ConfigurationError."""
    return load(Path(os.devnull), NEEDED | {"FAX_GATEWAY_STORE__URL": url})[0]


@pytest.mark.parametrize(
    ("url", "driver_is_told"),
    [
        (
            "postgresql://fax:secret@db.example.com/fax?sslmode=verify-full",
            {"user": "fax", "password": "secret", "host": "db.example.com", "sslmode": "verify-full"},
        ),
        (
            "postgresql://fax:a%40b%3Ac%2Fd,e@[2001:db8::1]:5432/fax",
            {"user": "fax", "password": "a@b:c/d,e", "host": "2001:db8::1", "port": 5432},
        ),
        (
            "postgresql://fax:secret@/fax?host=db1:5432&host=db2:5432&target_session_attrs=read-write",
            {
                "user": "fax",
                "password": "secret",
                "host": "db1,db2",
                "port": "5432,5432",
                "target_session_attrs": "read-write",
            },
        ),
        ("postgresql:///fax?host=/run/postgresql", {"host": "/run/postgresql"}),
    ],
)
def test_database_urls(url: str, driver_is_told: dict[str, object]) -> None:
    """A PostgreSQL server is named by its URL, several by parameters, a password with its signs escaped."""
    read = make_url(settings_with(url).store.url.get_secret_value())
    assert read.get_dialect()().create_connect_args(read)[1] == driver_is_told | {"dbname": "fax"}


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("postgresql://fax:plantedsecret@db1:5432,db2:5432/fax", "takes several hosts as parameters"),
        ("postgresql://fax:plantedsecret@db1,db2/fax", "takes several hosts as parameters"),
        ("postgresql://db1:5432,db2:5432/fax", "takes several hosts as parameters"),
        ("postgresql://fax:planted@secret@db/fax", "@ is written as %40"),
        ("postgresql://fax:planted/secret@db/fax", "/ as %2F"),
        ("postgresql://fax:plantedsecret@db:port/fax", "host:port"),
        ("postgresql://fax:plantedsecret@db:/fax", "host:port"),
        ("postgresql://fax:plantedsecret@db", "host:port"),
    ],
)
def test_database_urls_that_mean_something_else(url: str, says: str) -> None:
    """What the driver would read otherwise, or not at all, is told by `check`, and the password is not."""
    with pytest.raises(ConfigurationError) as caught:
        settings_with(url)
    (fault,) = caught.value.faults
    assert fault.key == "store.url"
    assert says in fault.text
    assert "planted" not in fault.text
