"""A module run in a process of its own, which answers with a line of JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from ..case import BenchmarkError

_LINES = 5


def run(
    module: str, *arguments: str, about: str, environment: Mapping[str, str] | None = None
) -> Any:
    """Return what ``python -m module arguments`` prints in its last line, read as JSON.

    The process finds the modules that this one finds, wherever it was started.

    Args:
        module: its full name.
        arguments: what its ``sys.argv[1:]`` is to be.
        about: what an error says has failed.
        environment: variables beside this process's own.

    Raises:
        BenchmarkError: the process failed; its last lines are in the message.
    """
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=variables | dict(environment or {}),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        tail = "\n".join(done.stderr.strip().splitlines()[-_LINES:])
        raise BenchmarkError(f"{about} failed:\n{tail}")
    return json.loads(done.stdout.splitlines()[-1])
