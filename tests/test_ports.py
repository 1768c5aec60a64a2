"""The ports of the tests: what one process is given, no other is given."""

import subprocess
import sys
from pathlib import Path

from ports import LANE, free_port

DRAW = f"from ports import free_port; print(*(free_port() for _ in range({LANE - 1})), flush=True); input()"


def test_two_processes_that_draw_ports_at_the_same_time_share_none() -> None:
    """Two processes that each draw all ports they can have are given no port in common."""
    processes = [
        subprocess.Popen([sys.executable, "-c", DRAW], cwd=Path(__file__).parent, text=True,
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(2)
    ]  # fmt: skip
    drawn = []
    for process in processes:
        assert process.stdout is not None
        drawn.append({int(port) for port in process.stdout.readline().split()})
    for process in processes:
        process.communicate("\n", timeout=30)
    assert all(len(ports) > LANE / 2 for ports in drawn)
    assert drawn[0].isdisjoint(drawn[1])


def test_a_port_is_not_given_again_until_all_others_were() -> None:
    """A server that has not bound its port yet does not lose it to the next one."""
    ports = [free_port() for _ in range(LANE // 4)]
    assert len(set(ports)) == len(ports)
