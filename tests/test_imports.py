"""The house: imports run downwards only, and the reading map names every room."""

import ast
import sys
from pathlib import Path

import gateway

FOLDER = Path(gateway.__file__).parent
FLOORS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli_queue", "cli"),
    ("demo",),
    ("daemon",),
    ("wiring",),
    ("sandbox", "sandbox_control", "sandbox_exchange", "sandbox_webhooks", "sandbox_calls",
     "sandbox_requests", "sandbox_script", "sandbox_behaviours"),
    ("smtp", "dispatch", "web", "notify"),
    ("smtp_session", "relay"),
    ("telnyx", "telnyx_answers", "telnyx_events", "smtp_data", "prepare", "prepare_child", "address",
     "compose", "compose_text", "store", "store_work", "store_intake", "store_outbox", "store_desk",
     "store_restore", "store_events", "store_brakes", "store_apply", "store_unit"),
    ("document", "message", "message_bodies", "children"),
    ("child",),
    ("carrier",),
    ("sqlite", "postgresql"),
    ("sqlite_statements",),
    ("database",),
    ("migrations",),
    ("schema",),
    ("fax", "fax_wishes", "fax_steps"),
    ("doubt", "schedule"),
    ("records",),
    ("reasons",),
    ("clocks", "config", "config_values", "log", "metrics", "bell", "systemd"),
)  # fmt: skip
"""From the roof to the ground; a module may import what stands on floors below its own."""

FAMILIES = ("sandbox", "store", "telnyx", "compose", "config", "fax", "message")
"""Modules that were split along the way of the fax: the parts of one may import each other on their floor."""
NEIGHBOURS = {
    ("cli_queue", "cli"),  # the queue's commands share the exit codes
    ("cli", "cli_queue"),  # and are registered by the program
    ("document", "message"),  # one refusal for both
}


def _name(path: Path) -> str:
    return path.relative_to(FOLDER).parts[0].removesuffix(".py")


def _modules() -> dict[str, set[str]]:
    """Return each module's imports from the gateway, lazy ones too."""
    found: dict[str, set[str]] = {}
    for path in FOLDER.rglob("*.py"):
        if path == FOLDER / "__init__.py":
            continue
        imports = found.setdefault(_name(path), set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "gateway":
                imports.update(alias.name for alias in node.names if alias.name != "__version__")
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gateway."):
                imports.add((node.module or "").split(".")[1])
    return found


def test_every_module_has_its_floor_and_its_line_in_the_reading_map() -> None:
    """Whoever adds a room says where it lies, here and in the map."""
    modules = set(_modules())
    assert modules == {name for floor in FLOORS for name in floor}
    words = set((gateway.__doc__ or "").replace(",", " ").replace(":", " ").replace(";", " ").split())
    listed = {name for name in modules if name in words or any(name.startswith(f"{f}_") for f in FAMILIES)}
    assert modules - listed <= {
        "__main__",
        "schema",
        "migrations",
        *(n for n in modules if n.startswith("sandbox")),
    }


def test_imports_run_downwards_only() -> None:
    """No module imports one of its own floor or above, but for the parts of one family."""
    floor = {name: height for height, names in enumerate(FLOORS) for name in names}
    wrong = [
        f"{name} imports {other}"
        for name, imports in _modules().items()
        for other in imports - {name}
        if floor[other] <= floor[name]
        and name.split("_")[0] != other.split("_")[0]
        and (name, other) not in NEIGHBOURS
    ]
    assert wrong == []


def _imports_of(top: str) -> set[str]:
    """Return the modules that import the package `top`, or a part of it."""
    found = set()
    for path in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == top for name in names):
                found.add(_name(path))
    return found


def test_sql_is_said_in_the_store_only() -> None:
    """SQLAlchemy is known to the store's modules, the schema and the databases."""
    others = {name for name in _imports_of("sqlalchemy") if not name.startswith("store")}
    assert others <= {"schema", "database", "sqlite", "sqlite_statements", "postgresql", "migrations"}


def test_the_sandbox_shares_nothing_with_the_client_of_the_carrier() -> None:
    """The stand-in carrier imports none of our code, or one misreading would pass every test."""
    for name, imports in _modules().items():
        if name.startswith("sandbox"):
            assert all(other.startswith("sandbox") for other in imports), name


def test_the_state_machine_needs_the_standard_library_only() -> None:
    """What decides about a fax can be read, and run, without any package."""
    for name in ("fax", "fax_wishes", "fax_steps", "records", "schedule", "doubt", "reasons"):
        for node in ast.walk(ast.parse((FOLDER / f"{name}.py").read_text())):
            if isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] in sys.stdlib_module_names for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                top = (node.module or "").split(".")[0]
                assert top == "gateway" or top in sys.stdlib_module_names


def test_settings_are_read_where_the_parts_are_wired() -> None:
    """Everyone below the daemon gets values, never the settings."""
    readers = {name for name, imports in _modules().items() if "config" in imports}
    assert readers <= {"cli", "cli_queue", "daemon", "wiring"}


def test_no_file_outgrows_a_reader() -> None:
    """A file above 500 lines is to be split along the way of the fax."""
    long = {
        path.name: lines
        for path in FOLDER.rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > 500
    }
    assert long == {}
