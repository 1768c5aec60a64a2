"""A child process: takes its limits, then does one job after the other until nobody asks any more.

In charge of the child's end of the pipe, whose other end is `children.Pool`; a job and its answer are one
line of JSON each. It imports little, for each child has a copy of it.

Promises: no job begins before memory, files and time are limited; a job that raises costs its own answer
only.

Fails: by ending, which the pool sees.
"""

import json
import math
import resource
from collections.abc import Callable
from typing import Any, BinaryIO

MAX_LINE = 1024 * 1024
"""Octets of one job or one answer."""
_MAX_FILES = 64

Json = dict[str, Any]


def serve(
    handle: Callable[[Json], Json],
    jobs: BinaryIO,
    answers: BinaryIO,
    set_limit: Callable[[int, tuple[int, int]], None] = resource.setrlimit,
) -> None:
    """Be a child: take limits, say ready, then answer each line of `jobs` until it ends.

    A job that raises is answered with the exception's class and nothing more; after a MemoryError the child
    ends, because its heap is no place for the next job.
    """
    first = jobs.readline(MAX_LINE)
    if not first:
        return
    limits = json.loads(first)
    for kind, wanted in (
        (resource.RLIMIT_AS, limits["memory"]),
        (resource.RLIMIT_FSIZE, limits["memory"]),
        (resource.RLIMIT_NOFILE, _MAX_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        value = _at_most_hard(kind, wanted)
        set_limit(kind, (value, value))
    _say(answers, {"ready": True})
    while line := jobs.readline(MAX_LINE):
        # The limit counts the whole life of the process (setrlimit(2)), so each job moves it up.
        usage = resource.getrusage(resource.RUSAGE_SELF)
        used = math.ceil(usage.ru_utime + usage.ru_stime)
        seconds = _at_most_hard(resource.RLIMIT_CPU, used + limits["seconds"])
        set_limit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        try:
            answer = handle(json.loads(line))
        except MemoryError:
            return
        except Exception as fault:  # noqa: BLE001  # the outermost loop of the process
            answer = {"failed": type(fault).__name__}
        _say(answers, answer)


def _at_most_hard(kind: int, wanted: int) -> int:
    """Return the wanted limit, or the lower one that an administrator set: asking for more is an error."""
    hard = resource.getrlimit(kind)[1]
    return wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)


def _say(answers: BinaryIO, answer: Json) -> None:
    answers.write(json.dumps(answer).encode() + b"\n")
    answers.flush()
