"""Postfix as a peer: it takes a mail, writes it into its queue and delivers it to `discard`.

It is made to do as little as it can beside that: no look-ups, no checks, no TLS. `in_flow_delay` is off, or
it would hold back clients that are faster than its deliveries. Its processes live for 1,000 mails, as the
gateway's children do, and not for 100.
"""

import os
import pwd
import shutil
import subprocess
from pathlib import Path
from typing import Self

from ports import free_port
from processes import Failed, Process, shut_to_others

_MASTER = """\
127.0.0.1:{port} inet n - n - 200 smtpd
cleanup   unix  n - n - 0 cleanup
qmgr      unix  n - n 300 1 qmgr
rewrite   unix  - - n - - trivial-rewrite
bounce    unix  - - n - 0 bounce
defer     unix  - - n - 0 bounce
trace     unix  - - n - 0 bounce
discard   unix  - - n - - discard
error     unix  - - n - - error
retry     unix  - - n - - error
postlog   unix-dgram n - n - 1 postlogd
"""
_MAIN = """\
compatibility_level = 3.6
myhostname = mail.example.com
mydestination = fax.local
mynetworks = 127.0.0.0/8
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
smtpd_peername_lookup = no
queue_directory = {folder}/queue
data_directory = {folder}/data
maillog_file = {folder}/mail.log
maillog_file_prefixes = {folder}
local_transport = discard:
local_recipient_maps =
alias_maps =
smtpd_tls_security_level = none
smtpd_client_connection_count_limit = 0
smtpd_relay_restrictions = permit_mynetworks, reject
message_size_limit = 60000000
mailbox_size_limit = 0
in_flow_delay = 0
default_destination_concurrency_limit = 50
max_use = 1000
"""


_PROGRAM = shutil.which("postfix", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
# The master sheds the signal that ends the benchmark's other programs with it: the shell hands it on.
_GUARD = """\
trap 'kill "$!"' TERM
"$0" -c "$1" check || exit
"$("${0%/*}/postconf" -c "$1" -h daemon_directory)/master" -c "$1" -d &
wait
wait
"""


def missing(folder: Path) -> str | None:
    """Return why Postfix cannot be measured with its queue in this folder; None if it can."""
    if _PROGRAM is None:
        return "postfix is not installed (Debian: apt install postfix)"
    if os.geteuid():
        return "Postfix starts as root only"
    shut = shut_to_others(folder)
    return f"the user postfix cannot enter {shut}: name another folder" if shut else None


def version() -> str:
    """Return the version of the Postfix that is here."""
    command = [str(Path(str(_PROGRAM)).with_name("postconf")), "-d", "-h", "mail_version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


class Postfix:
    """One Postfix with a folder of its own, which must be open to all; a context that runs it."""

    def __init__(self, folder: Path) -> None:
        self.smtp_port = free_port()
        self._folder = folder
        self._process: Process | None = None
        self._taken = 0  # mails in the part of the log that was read
        self._read = 0
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "main.cf").write_text(_MAIN.format(folder=folder))
        (folder / "master.cf").write_text(_MASTER.format(port=self.smtp_port))
        (folder / "queue").mkdir()
        (folder / "data").mkdir()
        os.chown(folder / "data", pwd.getpwnam("postfix").pw_uid, -1)

    def __enter__(self) -> Self:
        """Start it, and return when it is ready."""
        self._process = Process(["/bin/sh", "-c", _GUARD, _PROGRAM or "", self._folder], self._log)
        try:
            self._process.wait_for("daemon started")
        except Failed:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self._stop()

    @property
    def _log(self) -> Path:
        return self._folder / "mail.log"

    @property
    def pid(self) -> int:
        """The process id of its master."""
        return int((self._folder / "queue" / "pid" / "master.pid").read_text())

    def accepted(self) -> int:
        """Return how many mails went through the queue: all its work for them is done."""
        with self._log.open("rb") as log:
            log.seek(self._read)
            while line := log.readline():
                if not line.endswith(b"\n"):
                    break
                self._read += len(line)
                self._taken += line.endswith(b": removed\n")
        return self._taken

    def _stop(self) -> None:
        if self._process is not None:
            self._process.stop()
