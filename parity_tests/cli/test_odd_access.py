"""What may not be read or written: every command, in a process that modes bind.

They mean nothing to root, as whom tests may run, so that the process gives that up first.
"""

from __future__ import annotations

import os
import shutil

import pytest

from parity_tests.cli import measured
from parity_tests.cli.test_odd_input import PLACES, TARGETS, is_clean_output, made

__all__ = ["made"]


@pytest.fixture
def here(made, tmp_path):
    yield (here := shutil.copytree(made, tmp_path / "here"))
    for path in here.iterdir():  # or nobody could remove them
        path.chmod(0o777)


def closed_directory(here):
    """Return a folder that may not be entered, one that may not be listed, and a closed file."""
    (here / "closed").mkdir()
    shutil.copytree(here / "adapter", here / "closed/inside")
    shutil.copy(here / "table.csv", here / "closed.csv")
    shutil.copytree(here / "run", here / "unread")
    for path in (here / "unread").iterdir():
        path.chmod(0)
    (here / "closed").chmod(0)
    (here / "closed.csv").chmod(0)
    return ("closed", "closed/inside", "closed.csv", "unread")


def walked(here, places, paths, every):
    """Run the commands with each ``every``-th of the paths, another one for each place."""
    commands = {
        f"{name}: {path}": [path if arg == "X" else arg for arg in argv]
        for n, (name, argv) in enumerate(places.items())
        for path in paths[n % every :: every]
    }
    found = measured.run(commands, here, bound=True)
    for name, one in found.items():
        is_clean_output(name, one.code, one.out, one.err)
        assert one.seconds < 10 and one.peak < 1 << 30, (name, one)
    return found


EVERY = [4, pytest.param(1, marks=pytest.mark.slow)]


@pytest.mark.parametrize("every", EVERY)
def test_every_command_refuses_what_it_may_not_read(every, here):
    found = walked(here, PLACES, closed_directory(here), every)
    # Where the path itself is what is opened, the reason is told.
    for name in ("predict --data", "convert SOURCE", "inspect", "diff ONE", "merge ADAPTER"):
        place = f"{name}: {'closed.csv' if '--data' in name else 'unread'}"
        if place in found or every == 1:
            assert "ermission denied" in found[place].err, (name, found[place].err)


@pytest.mark.parametrize("every", EVERY)
def test_every_command_refuses_to_write_where_it_may_not(every, here):
    for name, mode in (("closed", 0), ("listed", 0o555)):
        (here / name).mkdir()
        (here / name).chmod(mode)
    paths = ("closed", "closed/new", "listed", "listed/new/deeper")
    before = sorted(here.rglob("*"))
    found = walked(here, TARGETS, paths, every)
    for name, one in found.items():
        assert "ermission denied" in one.err, (name, one.err)
    assert sorted(here.rglob("*")) == before


def test_modes_bind_the_walk(here):
    """Were it not, everything above would be read."""
    path = here / "table.csv"
    path.chmod(0)
    argv = ["finetune", "--model", "nowhere", "--data", "table.csv", "--output", "out"]
    assert "Permission denied" in measured.run({"it": argv}, here, bound=True)["it"].err
    if os.geteuid() == 0:
        assert "model: got 'nowhere'" in measured.run({"it": argv}, here)["it"].err
