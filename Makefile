# What one does with a checkout of the gateway; `make` alone lists it. Needs Python 3.11 or newer with its venv module,
# make and git. A missing or outdated .venv is made first: by uv where that is on PATH, by venv and pip elsewhere.

# An interpreter of one's own choice: make demo PYTHON=/path/to/python3
PYTHON ?=
# Where `make install` puts things. DESTDIR stages them below another root: no account, no service is touched then.
PREFIX = /opt/email-fax-gateway
CONFDIR = /etc/email-fax-gateway
DESTDIR =

ACCOUNT = fax-gateway
SERVICE = email-fax-gateway.service
STATEDIR = /var/lib/email-fax-gateway
CREDENTIALS = /etc/credstore
UNITDIR = /usr/local/lib/systemd/system
COMMAND = /usr/local/bin/fax-gateway

UV := $(shell uv --version >/dev/null 2>&1 && command -v uv)
PIP_OPTIONS = --quiet --quiet --disable-pip-version-check --no-input
COVERAGE = 95

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.SUFFIXES:
.PHONY: help demo test torture bench lint check lock install uninstall anew \
	install-check install-program install-command install-account install-configuration install-unit

help:
	@echo 'make demo             a sample mail becomes a fax and is answered, all on this machine; then it goes on serving'
	@echo 'make demo ONCE=1      the same, and ends when the answer is there'
	@echo 'make test             all tests, and the share of gateway/ that they run through'
	@echo 'make torture          the gateway under a stream of mails, killed all the time; then what was lost or doubled'
	@echo '                      (SEED= MINUTES= FAXES= KILLS= STORE=sqlite or postgresql; HELP=1 tells more)'
	@echo 'make bench            the gateway measured beside Postfix and others, into docs/performance.md: about 40 minutes'
	@echo '                      (ONLY=door,way QUICK=1 SCRATCH=FOLDER; HELP=1 tells more)'
	@echo 'make lint             style (ruff) and types (mypy)'
	@echo 'make check            lint, then test'
	@echo 'make lock             writes the lock files anew from pyproject.toml (UPGRADE=1: with the newest versions)'
	@echo 'sudo make install     the gateway as a service, below $(PREFIX); run again to upgrade'
	@echo 'sudo make uninstall   removes it, and keeps configuration and data'

demo: .venv/ready
	@.venv/bin/python -m gateway demo $(if $(filter-out 0,$(ONCE)),--once)

# Real processes and waits fill the tests: two workers pay even on a single core.
test: .venv/ready
	@workers=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); \
	if [ "$$workers" -lt 2 ]; then workers=2; fi; \
	echo "Running the tests ($$workers at a time)"; \
	.venv/bin/python -m pytest --quiet --numprocesses="$$workers" --dist=worksteal \
		--cov --cov-branch --cov-report=term-missing:skip-covered --cov-fail-under=$(COVERAGE)

torture: .venv/ready
	@.venv/bin/python tests/torture.py $(if $(filter-out 0,$(HELP)),--help) $(if $(SEED),--seed $(SEED)) \
		$(if $(MINUTES),--minutes $(MINUTES)) $(if $(STORE),--store $(STORE)) \
		$(if $(FAXES),--faxes $(FAXES)) $(if $(KILLS),--kills $(KILLS))

# The tests' own PostgreSQL, sample documents and ports serve here, too.
bench: .venv/ready
	@PYTHONPATH=tests .venv/bin/python benchmarks/bench.py $(if $(filter-out 0,$(HELP)),--help) $(if $(ONLY),--only $(ONLY)) \
		$(if $(filter-out 0,$(QUICK)),--quick) $(if $(SCRATCH),--scratch $(SCRATCH))

lint: .venv/ready
	@echo 'Checking the style: ruff check'
	@.venv/bin/python -m ruff check
	@echo 'Checking the layout: ruff format --check'
	@.venv/bin/python -m ruff format --check
	@echo 'Checking the types: mypy'
	@.venv/bin/python -m mypy

check: lint test

# ---- The environment in .venv ----

# Sets $python to the first interpreter that fits, or says what is missing and stops.
PROBE = import sys, importlib.util as u; \
	print("old" if sys.version_info < (3, 11) else "ready" if u.find_spec("ensurepip") else "bare")
define find-python
	python=; old=; bare=; \
	for candidate in $(if $(PYTHON),"$(PYTHON)",python3.14 python3.13 python3.12 python3.11 python3); do \
		case $$("$$candidate" -c '$(PROBE)' 2>/dev/null) in \
			ready) python=$$(command -v "$$candidate"); break ;; \
			bare) bare="$$bare $$candidate" ;; \
			old) old="$$old $$candidate" ;; \
		esac; \
	done; \
	if [ -z "$$python" ] && [ -n "$$bare" ]; then \
		echo "The venv module is missing from$$bare. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; \
	elif [ -z "$$python" ]; then \
		echo "Python 3.11 or newer is needed$${old:+, too old:$$old}. Name one that is not on PATH by PYTHON=FILE." >&2; \
		exit 1; \
	fi
endef

# Scripts inside an environment name their own path, and the project in it names the checkout: a checkout that was moved
# or copied gets a new one, as does one whose interpreter is gone.
STALE := $(shell .venv/bin/python -c '' 2>/dev/null && test "$$(cat .venv/packages 2>/dev/null)" = "$$(pwd -P)" || echo anew)

.venv/packages: requirements-dev.lock $(STALE)
	@set -eu; rm -rf .venv; \
	if [ -n "$(UV)" ]; then \
		echo "Making .venv and installing what requirements-dev.lock names (uv)"; \
		"$(UV)" venv --quiet --python "$(or $(PYTHON),>=3.11)" .venv; \
		"$(UV)" pip sync --quiet --python .venv --require-hashes requirements-dev.lock; \
	else \
		$(find-python); \
		echo "Making .venv and installing what requirements-dev.lock names (pip, with $$python): about a minute"; \
		"$$python" -m venv .venv; \
		.venv/bin/python -m pip install $(PIP_OPTIONS) --require-hashes --requirement requirements-dev.lock; \
	fi; \
	pwd -P > $@

.venv/ready: .venv/packages pyproject.toml
	@echo 'Installing the gateway itself into .venv'
	@if [ -n "$(UV)" ]; then \
		"$(UV)" pip install --quiet --python .venv --no-deps --no-build-isolation --editable .; \
	else \
		.venv/bin/python -m pip install $(PIP_OPTIONS) --no-deps --no-build-isolation --editable .; \
	fi
	@touch $@

LOCK = "$(UV)" pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-emit-find-links \
	--custom-compile-command 'make lock' $(if $(filter-out 0,$(UPGRADE)),--upgrade)

lock:
	@if [ -z "$(UV)" ]; then echo 'make lock needs uv on PATH.' >&2; exit 1; fi
	@echo 'Writing requirements-dev.lock'
	@$(LOCK) --extra dev pyproject.toml --output-file requirements-dev.lock
	@echo 'Writing requirements.lock, with the same versions'
	@$(LOCK) --constraints requirements-dev.lock pyproject.toml --output-file requirements.lock

# ---- The service ----

install: install-check install-program install-command install-account install-configuration install-unit
	@echo
	@echo 'Installed. A first time: fill in $(CONFDIR)/config.toml, put the carrier key into'
	@echo '$(CREDENTIALS)/email-fax-gateway.telnyx.api_key (owner root, mode 0600), then'
	@echo '    systemctl enable --now $(SERVICE)'
	@echo 'After an upgrade:'
	@echo '    systemctl restart $(SERVICE)'

install-check:
	@case '$(PREFIX)' in /?*) ;; *) echo 'PREFIX has to be an absolute path.' >&2; exit 1 ;; esac
	@case '$(CONFDIR)' in /?*) ;; *) echo 'CONFDIR has to be an absolute path.' >&2; exit 1 ;; esac
	@case '$(DESTDIR)' in '' | /*) ;; *) echo 'DESTDIR has to be an absolute path.' >&2; exit 1 ;; esac
	@if [ -z '$(DESTDIR)' ] && [ "$$(id -u)" != 0 ]; then echo 'This needs root: sudo make install' >&2; exit 1; fi

# Each installation is an environment of its own, and `venv` a link that moves to it in one step once it is whole: a
# download that fails leaves the old one in use, and a running gateway keeps its own files until it is restarted.
# The one before the last is removed. Interpreters of a user's own are not looked for: the service cannot read them.
AT_HOME = import os, sys; sys.exit(os.path.realpath(sys.base_prefix).split("/")[1] not in ("home", "root"))
install-program: private export PATH := /usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin
install-program:
	@set -eu; umask 022; \
	$(find-python); \
	if [ -z '$(DESTDIR)' ] && "$$python" -c '$(AT_HOME)'; then \
		echo "$$python lies in a home directory, where the service cannot run it." >&2; exit 1; \
	fi; \
	name="venv-$$(date -u +%Y%m%dT%H%M%SZ)"; root='$(DESTDIR)$(PREFIX)'; venv="$$root/$$name"; \
	mkdir -p "$$root"; trap 'rm -rf "$$venv"' EXIT; \
	echo "Installing what requirements.lock names into $$venv (with $$python): about a minute"; \
	"$$python" -m venv "$$venv"; \
	"$$venv/bin/python" -m pip install $(PIP_OPTIONS) --require-hashes --requirement requirements.lock; \
	echo 'Building and installing the gateway itself'; \
	awk '$(BUILD_TOOLS)' requirements-dev.lock requirements-dev.lock > "$$venv/build.lock"; \
	"$$venv/bin/python" -m pip install $(PIP_OPTIONS) --require-hashes --requirement "$$venv/build.lock" \
		--target "$$venv/build"; \
	PYTHONPATH="$$venv/build" "$$venv/bin/python" -m pip install $(PIP_OPTIONS) --no-deps --no-build-isolation .; \
	rm -r "$$venv/build" "$$venv/build.lock"; \
	if [ -n '$(DESTDIR)' ]; then \
		grep -rlIF '$(DESTDIR)' "$$venv/bin" "$$venv/pyvenv.cfg" | xargs -d '\n' sed -i 's|$(DESTDIR)||g'; \
	fi; \
	before=$$(readlink "$$root/venv" || echo none); \
	ln -sfn "$$name" "$$root/link"; mv -Tf "$$root/link" "$$root/venv"; trap - EXIT; \
	for old in "$$root"/venv-*; do \
		case "$$old" in "$$venv" | "$$root/$$before") ;; *) rm -rf "$$old" ;; esac; \
	done

# The lines of requirements-dev.lock on hatchling and what it needs in turn (first pass: which; second pass: print).
BUILD_TOOLS = /^[a-z]/ { name = $$1 } NR == FNR { if (/(^| )hatchling(=|$$)/) wanted[name]; next } name in wanted

install-command:
	@echo 'Linking $(COMMAND)'
	@umask 022; mkdir -p '$(DESTDIR)$(dir $(COMMAND))'
	@ln -sfn '$(PREFIX)/venv/bin/fax-gateway' '$(DESTDIR)$(COMMAND)'

install-account:
	@if [ -z '$(DESTDIR)' ] && ! getent passwd $(ACCOUNT) >/dev/null; then \
		echo 'Creating the account $(ACCOUNT)'; \
		useradd --system --user-group --home-dir $(STATEDIR) --no-create-home --shell /usr/sbin/nologin $(ACCOUNT); \
	fi

# What exists is the administrator's: neither text nor owner nor mode is touched.
install-configuration:
	@set -eu; \
	if [ ! -d '$(DESTDIR)$(CREDENTIALS)' ]; then install -d -m 0700 '$(DESTDIR)$(CREDENTIALS)'; fi; \
	if [ ! -d '$(DESTDIR)$(CONFDIR)' ]; then \
		install -d -m 0750 $(if $(DESTDIR),,-o root -g $(ACCOUNT)) '$(DESTDIR)$(CONFDIR)'; \
	fi; \
	if [ ! -e '$(DESTDIR)$(CONFDIR)/config.toml' ]; then \
		echo 'Writing a first $(CONFDIR)/config.toml'; \
		install -m 0640 $(if $(DESTDIR),,-o root -g $(ACCOUNT)) config.example.toml '$(DESTDIR)$(CONFDIR)/config.toml'; \
	fi

# ConfigurationDirectory= can only mean a directory in /etc of the unit's own name.
install-unit:
	@echo 'Installing $(UNITDIR)/$(SERVICE)'
	@umask 022; mkdir -p '$(DESTDIR)$(UNITDIR)'
	@sed -e 's|/opt/email-fax-gateway|$(PREFIX)|g' -e 's|/etc/email-fax-gateway|$(CONFDIR)|g' \
		$(if $(filter-out /etc/email-fax-gateway,$(CONFDIR)),-e '/^ConfigurationDirectory/d') \
		systemd/$(SERVICE) > '$(DESTDIR)$(UNITDIR)/$(SERVICE)'
	@chmod 0644 '$(DESTDIR)$(UNITDIR)/$(SERVICE)'
	@if [ -z '$(DESTDIR)' ] && [ -d /run/systemd/system ]; then systemctl daemon-reload; fi

uninstall: install-check
	@if [ -z '$(DESTDIR)' ] && [ -d /run/systemd/system ] && [ -e '$(UNITDIR)/$(SERVICE)' ]; then \
		echo 'Stopping the service: up to three minutes, if a fax is just being handed over'; \
		systemctl disable --now $(SERVICE); \
	fi
	@echo 'Removing $(PREFIX), $(COMMAND) and the unit'
	@rm -rf '$(DESTDIR)$(PREFIX)/venv' '$(DESTDIR)$(PREFIX)'/venv-*
	@rmdir '$(DESTDIR)$(PREFIX)' 2>/dev/null || true
	@rm -f '$(DESTDIR)$(COMMAND)' '$(DESTDIR)$(UNITDIR)/$(SERVICE)'
	@if [ -z '$(DESTDIR)' ] && [ -d /run/systemd/system ]; then systemctl daemon-reload; fi
	@echo 'Kept: $(CONFDIR), $(CREDENTIALS)/email-fax-gateway.*, $(STATEDIR) (queued faxes and records)'
	@echo 'and the account $(ACCOUNT). Remove them by hand if nothing in them is needed any more.'
