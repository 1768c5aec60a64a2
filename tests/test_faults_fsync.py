"""A disk that no longer confirms what is written."""

import os
import smtplib
from pathlib import Path

import pytest
from harness import World, letter, numbers, until, world
from shims import shim

FREE = numbers()
FAILING_FSYNC = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

static int confirm(const char *name, int fd) {
    if (access(getenv("FSYNC_FAILS"), F_OK) == 0) { errno = EIO; return -1; }
    return ((int (*)(int)) dlsym(RTLD_NEXT, name))(fd);
}
int fsync(int fd) { return confirm("fsync", fd); }
int fdatasync(int fd) { return confirm("fdatasync", fd); }
"""


async def test_a_disk_that_fails_to_confirm_ends_the_daemon_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No 250 is said, the daemon ends with 74 and a sentence, and a new start delivers each fax once."""
    library, failing = shim(tmp_path, FAILING_FSYNC), tmp_path / "failing"
    async with world(tmp_path) as w:
        await w.gateway.stop()
        usual = w.gateway._environment()
        faulty = usual | {"LD_PRELOAD": str(library), "FSYNC_FAILS": str(failing)}
        monkeypatch.setattr(w.gateway, "_environment", lambda: faulty)
        await w.restart()
        await w.replies(next(FREE))
        failing.touch()
        number = next(FREE)
        lost = letter(number)
        # Refused where a write of the daemon's own met the disk first: it has ended before the mail came.
        told = (smtplib.SMTPResponseException, smtplib.SMTPServerDisconnected, ConnectionRefusedError)
        with pytest.raises(told) as answer:
            await w.mail(number, message=lost)
        if isinstance(answer.value, smtplib.SMTPResponseException):
            assert answer.value.smtp_code == 451
        assert await ended(w) == os.EX_IOERR
        assert "the store can keep nothing more" in w.gateway.stderr
        w.gateway.stderr = ""
        failing.unlink()
        await w.restart()
        await w.replies(number, message=lost)
        await w.everyone_told()
        assert len(w.taken(number)) == 1


async def ended(w: World) -> int:
    """Return the daemon's exit code once it has ended by itself."""
    process = w.gateway._process
    assert process is not None
    await until(w.gateway._ended, "the daemon to end")
    return await process.wait()
