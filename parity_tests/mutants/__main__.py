"""The mutation gate as a command, which writes its page: ``python -m parity_tests.mutants``."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

from lora_jax.parity.mutants import MUTANTS
from lora_jax.parity.mutants.common_tests import common_tests
from lora_jax.parity.mutants.gate import clean_runs, compiled_once, gate, gate_checks, to_markdown

PAGE = Path(__file__).parents[2] / "docs" / "kill-matrix.md"


def main() -> int:
    """Run the gate, write the page, and return 1 if it fails."""
    checks = gate_checks()
    begin = time.perf_counter()
    with compiled_once():
        matrix = gate(MUTANTS, checks, common=common_tests(), say=partial(print, flush=True))
    print(f"{time.perf_counter() - begin:.0f} seconds", flush=True)
    count, found = clean_runs([one for one in checks if not one.slow], range(1, 201))
    note = f"Of {count:,} runs of the checks on the code as it is, with 200 seeds, "
    note += f"{len(found) or 'none'} raised an alarm."
    PAGE.write_text(to_markdown(matrix, note))
    for line in (*matrix.alarms, *matrix.surviving, *found):
        print(f"FAILED: {line}")
    return 0 if matrix.ok and not found else 1


if __name__ == "__main__":
    sys.exit(main())
