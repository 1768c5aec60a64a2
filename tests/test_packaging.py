"""What surrounds the program: Makefile, service, image, licence, and what must stand in no file."""

import os
import re
import shutil
import stat
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from gateway.config import CREDENTIALS

ROOT = Path(__file__).parent.parent
UNIT = ROOT / "systemd" / "email-fax-gateway.service"

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed here"
)


def run(program: str, *arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a program, without what a make that runs these tests would tell another make."""
    environ = {
        name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}
    }
    path = shutil.which(program)
    assert path, f"{program} is missing"
    return subprocess.run(
        [path, *arguments], cwd=cwd, env=environ, capture_output=True, text=True, check=False
    )


def make(*arguments: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run make with targets and options, and with variables as they are given on its command line."""
    return run("make", *arguments, *(f"{name}={value}" for name, value in variables.items()), cwd=cwd)


def empty_checkout(directory: Path) -> None:
    """Lay out what make looks at before it installs anything."""
    shutil.copy(ROOT / "Makefile", directory)
    for name in ("requirements-dev.lock", "pyproject.toml"):
        (directory / name).touch()


def unit_settings() -> dict[str, list[str]]:
    """Return each directive of the unit with its values in order."""
    settings: dict[str, list[str]] = {}
    for line in UNIT.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            name, value = line.split("=", 1)
            settings.setdefault(name, []).append(value)
    return settings


def dockerfile() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions in order, each as its name and the rest."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


def repository_files() -> list[Path]:
    """Return what is in the repository, or would be after `git add`."""
    listing = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if listing.returncode:
        pytest.skip(f"no git checkout: {listing.stderr.strip()}")
    return [path for name in listing.stdout.split("\0") if name and (path := ROOT / name).is_file()]


# ---- The Makefile ----


def test_every_make_command_in_the_readme_exists() -> None:
    """What the README tells people to type is something that make knows."""
    readme = (ROOT / "README.md").read_text()
    prose, blocks = readme.split("\n```")[::2], readme.split("\n```")[1::2]
    commands = [line for block in blocks for line in block.splitlines()]
    commands += [quoted for text in prose for quoted in re.findall(r"`([^`]+)`", text)]
    named = {hit[1] for line in commands if (hit := re.match(r"[\s$]*(?:sudo )?make ([a-z-]+)", line))}
    assert {"demo", "test"} <= named
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert named <= targets


def test_make_alone_lists_the_commands() -> None:
    """Whoever types `make` sees what there is, and nothing is done."""
    told = make()
    assert told.returncode == 0, told.stderr
    for target in ("demo", "test", "lint", "check", "lock", "install", "uninstall"):
        assert re.search(rf"^(sudo )?make {target}\b", told.stdout, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("old", "Python 3.11 or newer is needed, too old: "),
        ("bare", "apt install python3-venv"),
        ("", "Python 3.11 or newer is needed. "),
    ],
)
def test_a_python_that_does_not_fit_is_named_plainly(tmp_path: Path, answer: str, says: str) -> None:
    """Set-up with a too old Python, or one without venv, or none, ends with one line that says so."""
    empty_checkout(tmp_path)
    python = tmp_path / "some python"
    python.write_text(f"#!/bin/sh\necho {answer}\n")
    python.chmod(0o755)
    ended = make("test", cwd=tmp_path, UV="", PYTHON=str(python))
    assert ended.returncode != 0
    assert says in ended.stderr.splitlines()[0]
    assert (str(python) in ended.stderr) == bool(answer)
    assert not (tmp_path / ".venv").exists()


def test_the_interpreter_of_these_tests_fits(tmp_path: Path) -> None:
    """A Python of 3.11 or newer with venv is taken: the set-up goes on to make the environment."""
    empty_checkout(tmp_path)
    (tmp_path / "requirements-dev.lock").write_text("no such requirement\n")
    ended = make("test", cwd=tmp_path, UV="", PYTHON=sys.executable)
    assert "Making .venv" in ended.stdout
    assert (tmp_path / ".venv" / "bin" / "python").exists()
    assert not (tmp_path / ".venv" / "packages").exists(), "a half-made environment counts as none"


def test_the_environment_is_made_anew_only_when_it_has_to_be(tmp_path: Path) -> None:
    """Set-up is done once, and again after a new lock, a move of the checkout or a lost interpreter."""
    empty_checkout(tmp_path)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    packages = tmp_path / ".venv/packages"

    def is_current() -> bool:
        packages.write_text(f"{tmp_path.resolve()}\n")
        (tmp_path / ".venv/ready").touch()
        return make("--question", ".venv/ready", cwd=tmp_path).returncode == 0

    assert is_current()
    later = time.time() + 60
    os.utime(tmp_path / "requirements-dev.lock", (later, later))
    assert not is_current()
    os.utime(tmp_path / "requirements-dev.lock", (0, 0))
    assert is_current()
    packages.write_text("elsewhere\n")
    assert make("--question", ".venv/ready", cwd=tmp_path).returncode == 1
    python.unlink()
    python.symlink_to(tmp_path / "gone")
    assert not is_current()


def test_install_refuses_to_run_without_root_or_with_odd_directories() -> None:
    """Nothing is begun, let alone removed, below a directory that cannot be meant."""
    assert "PREFIX has to be an absolute path" in make("install-check", PREFIX="").stderr
    assert "CONFDIR has to be an absolute path" in make("install-check", CONFDIR="etc").stderr
    assert "DESTDIR has to be an absolute path" in make("install-check", DESTDIR="stage").stderr
    if os.getuid() != 0:
        assert "sudo make install" in make("install-check").stderr


@pytest.mark.timeout(400)
def test_install_upgrade_and_uninstall_below_another_root(tmp_path: Path) -> None:
    """Installing gives a program that runs, a unit, and a configuration that is then left alone."""
    stage = tmp_path / "stage"
    done = make("install", DESTDIR=str(stage), CONFDIR="/etc/fax")
    assert done.returncode == 0, done.stderr

    prefix = stage / "opt" / "email-fax-gateway"
    first = prefix / (prefix / "venv").readlink()
    command = first / "bin" / "fax-gateway"
    link = (stage / "usr/local/bin/fax-gateway").readlink()
    assert str(link) == "/opt/email-fax-gateway/venv/bin/fax-gateway"
    launcher = "".join(command.read_text().splitlines()[:2])  # two lines where the path is a long one
    assert f"/opt/email-fax-gateway/{first.name}/bin/python" in launcher
    assert str(stage) not in launcher
    assert not (first / "build").exists()
    shown = run(str(first / "bin/python"), "-I", "-m", "gateway", "--help", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    unit = (stage / "usr/local/lib/systemd/system/email-fax-gateway.service").read_text()
    assert "--config /etc/fax/config.toml\n" in unit
    assert "/etc/email-fax-gateway" not in unit

    config = stage / "etc/fax/config.toml"
    assert config.read_text() == (ROOT / "config.example.toml").read_text()
    assert stat.S_IMODE(config.stat().st_mode) == 0o640
    assert stat.S_IMODE(config.parent.stat().st_mode) == 0o750
    config.write_text("mine\n")

    for target in ("install-configuration", "uninstall"):
        done = make(target, DESTDIR=str(stage), CONFDIR="/etc/fax")
        assert done.returncode == 0, done.stderr
        assert config.read_text() == "mine\n"
    assert "Kept: /etc/fax" in done.stdout
    assert not prefix.exists()
    assert [path for path in stage.rglob("*") if path.is_file() or path.is_symlink()] == [config]


# ---- The service ----


def test_the_unit_gives_the_daemon_what_it_counts_on() -> None:
    """The service manager knows when the daemon is ready, watches it, and gives it time to stop."""
    unit = unit_settings()
    assert unit["Type"] == ["notify"]
    assert unit["NotifyAccess"] == ["main"]
    assert unit["WatchdogSec"] == ["60"]
    assert unit["User"] == ["fax-gateway"]
    assert unit["StateDirectory"] == ["email-fax-gateway"]
    assert unit["StateDirectoryMode"] == ["0700"]
    assert unit["KillMode"] == ["mixed"]
    assert int(unit["TimeoutStopSec"][0]) > 150
    assert "78" in unit["RestartPreventExitStatus"][0].split()
    assert not any("@resources" in value for value in unit["SystemCallFilter"])
    # Restarts must never reach the limit on their own: a gateway given up as failed takes no mail.
    assert int(unit["RestartSec"][0]) * int(unit["StartLimitBurst"][0]) > int(
        unit["StartLimitIntervalSec"][0]
    )


def test_a_secret_that_is_kept_elsewhere_does_not_stop_the_service() -> None:
    """Credentials go by name: systemd.exec(5) passes over a missing name, but not a missing path."""
    credentials = dict(value.split(":", 1) for value in unit_settings()["LoadCredential"])
    assert credentials == {key: f"email-fax-gateway.{key}" for key in CREDENTIALS}


@needs_systemd
def test_systemd_finds_no_fault_in_the_unit(tmp_path: Path) -> None:
    """The unit, as `make install` writes it, has no directive that systemd does not know."""
    program = tmp_path / "opt/venv/bin/fax-gateway"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    done = make("install-unit", DESTDIR=str(tmp_path / "stage"), PREFIX=str(tmp_path / "opt"))
    assert done.returncode == 0, done.stderr
    unit = tmp_path / "stage/usr/local/lib/systemd/system/email-fax-gateway.service"
    verdict = run("systemd-analyze", "verify", unit)
    said = [line for line in verdict.stderr.splitlines() if unit.name in line]
    assert (verdict.returncode, said) == (0, []), verdict.stderr


@needs_systemd
def test_the_service_is_well_shut_in() -> None:
    """The measure that systemd has of what a broken-into service could reach stays at 2.0 of 10 or below."""
    verdict = run("systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=20", UNIT)
    if "unrecognized option" in verdict.stderr:
        pytest.skip(f"this systemd-analyze is too old: {verdict.stderr.strip()}")
    assert verdict.returncode == 0, verdict.stdout[-400:] + verdict.stderr


# ---- The image ----


def test_the_image_copies_only_what_exists_and_what_may_be_sent_to_the_builder() -> None:
    """An image build finds every source that it names, in spite of .dockerignore."""
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [rest.split()[:-1] for name, rest in dockerfile() if name == "COPY" and "--from=" not in rest]
    sources = {source for group in copied for source in group}
    assert sources == allowed
    assert all((ROOT / source).exists() for source in sources)


def test_the_image_runs_without_privileges_and_stops_and_reports_by_itself() -> None:
    """The container runs as nobody in particular, keeps its data in a volume, and tells how it is."""
    last = dockerfile()[max(index for index, (name, _) in enumerate(dockerfile()) if name == "FROM") :]
    image = dict(last)
    assert all(int(number) > 10_000 for number in image["USER"].split(":"))
    assert image["VOLUME"] == "/var/lib/email-fax-gateway"
    assert image["EXPOSE"].split() == ["2525", "8080"]
    assert image["STOPSIGNAL"] == "SIGTERM"
    assert image["ENTRYPOINT"] == '["fax-gateway"]'
    assert image["CMD"] == '["serve"]'
    assert image["HEALTHCHECK"].endswith('CMD ["fax-gateway", "health"]')
    # The base image's own name, no host before it: whoever builds decides where it comes from.
    assert all("/" not in rest.split()[0] for name, rest in dockerfile() if name == "FROM")


def test_every_package_is_installed_by_its_hash() -> None:
    """Nothing that comes over the network is installed on trust, be it by make or into the image."""
    steps = [rest for name, rest in dockerfile() if name == "RUN"]
    steps += re.sub(r"\\\n", " ", (ROOT / "Makefile").read_text()).splitlines()
    installs = [
        part
        for step in steps
        for part in re.split(r"&&|;", step)
        if re.search(r"\bpip (install|sync|wheel)\b", part)
    ]
    assert len(installs) >= 8
    for part in installs:
        assert "--require-hashes" in part or "--no-deps" in part, part
    for name in ("requirements.lock", "requirements-dev.lock"):
        pinned = re.findall(r"^[a-z0-9-]+==.*((?:\n .*)*)", (ROOT / name).read_text(), flags=re.MULTILINE)
        assert pinned
        assert all("--hash=sha256:" in rest for rest in pinned)


def test_the_build_tools_are_all_taken_from_the_lock() -> None:
    """The package is built by pinned tools: hatchling and all that it needs, out of the development lock."""
    lines = [rest for name, rest in dockerfile() if name == "RUN" and "awk" in rest]
    program = re.findall(r"awk '([^']+)'", lines[0])[0]
    kept = re.findall(r"^BUILD_TOOLS = (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[0]
    assert kept.replace("$$", "$") == program
    lock = ROOT / "requirements-dev.lock"
    picked = run("awk", program, lock, lock)
    assert picked.returncode == 0, picked.stderr
    names = set(re.findall(r"^([a-z0-9-]+)==", picked.stdout, flags=re.MULTILINE))
    assert {"hatchling", "packaging", "pathspec", "pluggy", "trove-classifiers"} <= names
    assert "mypy" not in names


# ---- All files ----


def test_the_licence_is_the_one_that_is_declared() -> None:
    """The full text of the Apache License 2.0 comes with the program."""
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"] == "Apache-2.0"


def test_the_changelog_names_the_version() -> None:
    """Whoever upgrades finds an entry for the version that the program says it has."""
    version = re.findall(
        r'^__version__ = "(.+)"', (ROOT / "gateway/__init__.py").read_text(), flags=re.MULTILINE
    )[0]
    assert f"\n## [{version}] - " in (ROOT / "CHANGELOG.md").read_text()


def test_ci_runs_what_the_readme_names() -> None:
    """CI is the same two commands that a developer types, and can be started as it is."""
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    assert "set -euo pipefail" in lines
    assert {"make lint", "make test"} <= set(lines)


def test_no_file_depends_on_where_it_was_written() -> None:
    """The repository builds anywhere: no path of one machine, no host of one package index."""
    # Put together here, or this file would be found.
    forbidden = re.compile(
        "|".join(
            ["/wo" + "rk/", "/ro" + "ot/", r"\bpy" + r"pi\.", "files.python" + "hosted", r"\.\./sha" + "red"]
        )
    )
    found = []
    for path in repository_files():
        text = path.read_bytes().decode(errors="replace")
        found += [
            f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, hit.start()) + 1}: {hit.group()}"
            for hit in forbidden.finditer(text)
        ]
    assert found == []
