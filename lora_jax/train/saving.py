"""What a run leaves, written as one set: the adapter, its record, the metrics and the curves."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..core.errors import OutputError
from ..core.io.atomic_files import Output
from .curves import append, to_json
from .loop import Event

METRICS_NAME, CURVES_NAME = "metrics.jsonl", "curves.png"


class Saver:
    """Replaces the files of an earlier run by those of this one, together, and adds to them.

    Until there is an adapter to go with them, the metrics are kept in memory.

    Args:
        output: the directory, claimed.
        note: called with a line about what could not be written and can wait.
        add: adds an event to a file of metrics.
    """

    def __init__(
        self,
        output: Output,
        note: Callable[[str], None],
        add: Callable[[Path, Event], None] = append,
    ) -> None:
        self.output, self.note, self.add = output, note, add
        self.saved: str | None = None
        self.events: list[Event] = []
        self.behind = True
        self.said: set[str] = set()

    def record(self, event: Event) -> None:
        """Add an event to the metrics."""
        self.events.append(event)

        def add() -> None:
            self.add(self.output.directory / METRICS_NAME, event)

        if self.saved is not None and not self.attempt(add, METRICS_NAME):
            self.behind = True

    def save(self, files: Mapping[str, bytes], what: str) -> None:
        """Write the adapter and its record, with the metrics where they are not there yet.

        Args:
            files: by name.
            what: of training they are, such as ``"epoch 2"``.

        Raises:
            OutputError: they could not be written, and what stands there instead.
        """
        metrics = {METRICS_NAME: self._metrics()} if self.behind else {}
        # The curves of an earlier run are not those of this adapter.
        gone = [CURVES_NAME] if self.saved is None else []
        try:
            self.output.write({**files, **metrics}, gone=gone)
        except OutputError as error:
            if self.saved is None:
                raise
            raise OutputError(
                f"{error} The adapter of {self.saved} stands in {self.output.directory}."
            ) from error
        self.saved, self.behind = what, False

    def draw(self, content: Callable[[], bytes]) -> None:
        """Write the curves; the adapter counts without them."""
        self.attempt(lambda: self.output.write({CURVES_NAME: content()}))

    def attempt(self, write: Callable[[], None], what: str | None = None) -> bool:
        """Write something that can wait, and tell whether it was; if not, say once why.

        Args:
            write: does it.
            what: that of which one failure is enough to know; by default each that differs.
        """
        try:
            write()
        except OutputError as error:
            if (what or str(error)) not in self.said:
                self.note(str(error))
            self.said.add(what or str(error))
            return False
        return True

    def _metrics(self) -> bytes:
        lines: list[dict[str, Any]] = [to_json(event) for event in self.events]
        return "".join(f"{json.dumps(line, allow_nan=False)}\n" for line in lines).encode()
