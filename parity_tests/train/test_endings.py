"""Runs that end before their time: signals, lost terminals, full disks, and a second run."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import lora_jax
from lora_jax.cli.console import Unbreakable
from lora_jax.cli.main import main
from lora_jax.core.errors import AdapterError, OutputError
from lora_jax.core.io import journal, locks, signals
from lora_jax.core.io.atomic_files import claimed, output_directory, write_atomic
from lora_jax.core.io.journal import PREFIX, settle, working
from lora_jax.peft.files import load_config
from lora_jax.train import curves
from lora_jax.train import finetune as finetuning
from lora_jax.train.loop import Interrupted
from parity_tests.cli import test_kills
from parity_tests.cli.kills import killed_at
from parity_tests.train import quick_runs
from parity_tests.train.quick_runs import Quick

ROOT = Path(lora_jax.__file__).parent.parent
NAMES = {signal.SIGINT: "", signal.SIGTERM: " by SIGTERM", signal.SIGHUP: " by SIGHUP"}


@pytest.fixture(autouse=True)
def handlers():
    """As a shell starts a program; pytest itself may have been started with some ignored."""
    before = {number: signal.getsignal(number) for number in NAMES}
    for number in NAMES:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def left(directory):
    return sorted(path.name for path in directory.iterdir())


def lines_of(directory):
    return (directory / "metrics.jsonl").read_text().splitlines()


# Signals.


def test_what_asks_to_end_ends_as_ctrl_c_does(tmp_path):
    """The last whole step is saved, also where a second signal comes while it is."""
    for number, name in NAMES.items():
        out = tmp_path / str(number)
        run = Quick(during={3: lambda number=number: signal.raise_signal(number)})
        again = quick_runs.during_saves(lambda n=number: signal.raise_signal(n))
        with again, pytest.raises(Interrupted) as caught:
            run(out)
        stop = caught.value
        assert (stop.number, signals.exit_code(stop)) == (number, 128 + number)
        assert quick_runs.state(out) == run.after(3)
        assert json.loads((out / "run.json").read_text())["stop"] == f"interrupted{name}"
        assert left(out) == sorted([*quick_runs.FILES, "curves.png"])
        assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


def test_a_signal_that_got_lost_ends_the_run_at_the_next_event(tmp_path):
    def lost():
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)

    run = Quick()
    with pytest.raises(Interrupted) as caught:
        run(tmp_path / "out", seen=lambda step: lost() if step == 2 else None)
    assert caught.value.number == signal.SIGTERM
    assert quick_runs.state(tmp_path / "out") == run.after(2)


def test_signals_that_are_ignored_or_handled_stay_so(tmp_path):
    seen = []
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    press = {3: lambda: [signal.raise_signal(n) for n in (signal.SIGHUP, signal.SIGTERM)]}
    Quick(during=press)(tmp_path / "out")
    assert seen == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_other_threads_leave_the_handlers_alone(tmp_path):
    thread = threading.Thread(target=lambda: Quick()(tmp_path / "out"))
    thread.start()
    thread.join()
    assert quick_runs.state(tmp_path / "out") == Quick().after(4)


def test_each_signal_has_its_exit_code_and_line(tmp_path, capsys, monkeypatch):
    for number, name in NAMES.items():
        with monkeypatch.context() as patch:
            Quick(during={3: lambda n=number: signal.raise_signal(n)}).put(patch)
            code = main(["finetune", "--batch-size", "2", "--output", str(tmp_path / str(number))])
        captured = capsys.readouterr()
        assert code == 128 + number
        line = f"lora-jax: interrupted{name} after step 3; the adapter is saved in "
        assert captured.err.startswith(line) and captured.err.count("\n") == 1
    monkeypatch.setattr(finetuning, "_prepare", lambda *args: signal.raise_signal(signal.SIGTERM))
    assert main(["finetune", "--output", str(tmp_path / "early")]) == 143
    assert "by SIGTERM; nothing was trained yet" in capsys.readouterr().err


# A real process, real signals, a real pipe and a terminal that hangs up.

CHILD = """
import os, signal, sys
from parity_tests.train.quick_runs import Quick
import pytest
for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(one, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
def wait():
    os.write(2, b"third\\n")
    sys.stdin.buffer.read(1)
from lora_jax.cli.main import main
Quick(during={3: wait}).put(pytest.MonkeyPatch())
sys.exit(main(["finetune", "--batch-size", "2", "--lora-alpha", "256", "--output", sys.argv[1]]))
"""


def child(out, **streams):
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(out)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        **streams,
    )


def test_a_process_that_loses_its_reader_and_its_time(tmp_path):
    """A closed pipe stops nothing; the SIGTERM that comes then is an end with all saved."""
    process = child(tmp_path / "out", stdout=subprocess.PIPE)
    process.stdout.close()
    lines = [process.stderr.readline(), process.stderr.readline()]
    assert sorted(lines)[1] == b"third\n" and b"results go to" in sorted(lines)[0]
    process.send_signal(signal.SIGTERM)
    process.stdin.write(b"x")
    process.stdin.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 143, said
    assert said.startswith(b"lora-jax: interrupted by SIGTERM after step 3; ")
    assert said.count(b"\n") == 1
    assert quick_runs.state(tmp_path / "out") == Quick().after(3)


def test_a_stream_that_is_lost_is_said_once(capfd):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        lost = Unbreakable(stream, "nobody reads")
        for _ in range(3):
            assert lost.write("line\n") == 5
            lost.flush()
        assert not lost.isatty()
    assert capfd.readouterr().err == "lora-jax: nobody reads\n"


# What cannot be written.


def full(monkeypatch, name, after):
    """Have a full disk be met by files of this name that are written after so many others."""
    real, seen = os.fsync, []

    def fsync(handle):
        if Path(os.readlink(f"/proc/self/fd/{handle}")).name == name:
            seen.append(handle)
            if len(seen) > after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_rename_that_fails_leaves_all_as_it_was(tmp_path, monkeypatch):
    """Whichever of them it is: the others are undone, and the message is true."""
    case, at = test_kills.converting(tmp_path), 0
    done = False
    while not done:
        out, calls, real = tmp_path / f"out-{at}", [], os.replace
        case.old(out)
        before = test_kills.snapshot(out)

        def replace(source, target, calls=calls, at=at, real=real):
            calls.append(target)
            if len(calls) == at + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            try:
                case.command(out)
            except OutputError as error:
                assert "No space left" in str(error) and "nothing that was there" in str(error)
                assert test_kills.snapshot(out) == before, at
            else:
                done = True
                assert case.state(out) == case.states[-1]
        at += 1
    assert at == 6  # one that decides, two old files, two new ones; and none fails


def test_what_can_neither_be_finished_nor_undone_is_said_and_finished_later(tmp_path, monkeypatch):
    case = test_kills.converting(tmp_path)
    out = tmp_path / "out"
    case.old(out)
    with monkeypatch.context() as patch:
        real = os.replace

        def fail(source, target):
            if out / "adapter_config.json" == Path(target):
                raise OSError(errno.EIO, "Input/output error")
            return real(source, target)

        patch.setattr(os, "replace", fail)
        with pytest.raises(OutputError, match="next command on .* puts them in their places"):
            case.command(out)
        with pytest.raises(AdapterError, match="a part of an old set .* and a part of a new one"):
            load_config(out)
    assert case.state(out) == case.states[-1]
    assert left(out) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_directory_in_the_place_of_a_file_is_met_before_anything_changes(tmp_path):
    case = test_kills.converting(tmp_path)
    out = tmp_path / "out"
    (out / "adapter_config.json").mkdir(parents=True)
    (out / "adapter_model.safetensors").write_text("OLD")
    with pytest.raises(OutputError, match=r"Is a directory \(.*adapter_config.json\)"):
        case.command(out)
    assert (out / "adapter_model.safetensors").read_text() == "OLD"
    assert left(out) == ["adapter_config.json", "adapter_model.safetensors"]


def test_curves_or_a_record_that_cannot_be_written_do_not_hide_the_result(tmp_path, monkeypatch):
    # Two epochs and the end of training are saved; then the result is.
    for name, after in (("curves.png", 0), ("run.json", 3)):
        run, out = Quick(), tmp_path / name[:3]
        with monkeypatch.context() as patch:
            full(patch, name, after)
            result = run(out)
        assert result.steps == 4 and quick_runs.state(out) == run.after(4)
        [note] = run.notes
        assert "No space left on device" in note and name in note
        assert not (out / "curves.png").exists() or name != "curves.png"


def test_a_last_save_that_fails_says_what_stands(tmp_path, monkeypatch):
    out, run = tmp_path / "out", Quick()
    # The first epoch is saved; neither the second nor the end is.
    full(monkeypatch, "run.json", after=1)
    with pytest.raises(OutputError, match=r"The adapter of epoch 1 stands in .*out") as caught:
        run(out)
    assert "nothing that was there has changed" in str(caught.value)
    assert quick_runs.state(out) == run.after(2)


def test_an_earlier_run_stays_until_there_is_something_new(tmp_path):
    """Its metrics too; then all of it goes, curves that are not of the new adapter too."""
    old, out, seen = Quick(16, ("ham", "spam"), 7.0), tmp_path / "out", {}
    old(out)
    before = test_kills.snapshot(out) | {"metrics.jsonl": (out / "metrics.jsonl").read_bytes()}

    def look(step):
        seen[step] = test_kills.snapshot(out)
        seen[step] |= {"metrics.jsonl": (out / "metrics.jsonl").read_bytes()}

    Quick()(out, seen=look)
    assert seen[1] == seen[2] == before
    assert "curves.png" not in seen[3]
    lines = [json.loads(line)["event"] for line in seen[3]["metrics.jsonl"].splitlines()]
    assert lines == ["step", "step", "epoch", "step"]
    lines = [json.loads(line)["event"] for line in lines_of(out)]
    assert lines == ["step", "step", "epoch"] * 2 + ["stop"]


def test_metrics_that_could_not_be_added_are_there_at_the_end(tmp_path, monkeypatch):
    real = curves.append

    def append(path, event):
        if getattr(event, "step", 0) == 3:
            raise OutputError(f"cannot write {path}: full")
        real(path, event)

    monkeypatch.setattr(finetuning, "append", append)
    run = Quick()
    run(tmp_path / "out")
    lines = [json.loads(line)["step"] for line in lines_of(tmp_path / "out")]
    assert lines == [1, 2, 2, 3, 4, 4, 4] and len(run.notes) == 1


# A second run.


def test_two_runs_in_one_directory(tmp_path, capsys, monkeypatch):
    """The second fails at once, whatever it is; and neither a kill nor an end keeps the lock."""
    case, out = test_kills.converting(tmp_path), tmp_path / "out"
    with claimed(out) as output:
        for attempt in (case.command, Quick(), output_directory):
            with pytest.raises(OutputError, match="another run is writing to .*out. Wait"):
                attempt(out)
        output.write({"mine": b"1"})
        # Files in passing do not claim it.
        write_atomic({out / "other": b"2", out / "more": b"3"})
    assert left(out) == ["mine", "more", "other"]
    case.command(out)
    with contextlib.suppress(KeyboardInterrupt), claimed(tmp_path / "next"):
        raise KeyboardInterrupt
    Quick()(tmp_path / "next", overwrite=False)


def test_a_process_that_is_killed_leaves_no_lock_and_litter_that_the_next_removes(tmp_path):
    out = tmp_path / "out"
    code = f"""
from pathlib import Path
import os, signal
from lora_jax.core.io.atomic_files import claimed
from lora_jax.core.io.journal import working
with claimed({str(out)!r}) as output, output.filling() as draft:
    (draft / "large").write_bytes(b"x" * 100)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=False)
    assert run.returncode == -signal.SIGKILL
    [litter] = left(out)
    assert litter.startswith(PREFIX)
    with working(out) as living:
        # Empty but for what nobody owns and for what somebody does, who lives.
        with claimed(out) as output:
            output.write({"one": b"1", "two": b"2"})
        assert left(out) == [living.path.name, "one", "two"]
    assert left(out) == ["one", "two"]


def test_only_what_is_ours_is_removed(tmp_path):
    out, far = tmp_path / "out", tmp_path / "far"
    for name in (".hidden", ".fetch-new", f"{PREFIX[:-1]}"):
        (out / name).mkdir(parents=True)
    far.mkdir()
    (far / "thesis.txt").write_text("years of work")
    (out / f"{PREFIX}link").symlink_to(far)
    (out / f"{PREFIX}file").write_text("")
    before = test_kills.snapshot(out)
    with pytest.raises(OutputError, match="already holds files"):
        output_directory(out)
    output_directory(out, overwrite=True)
    assert test_kills.snapshot(out) == before and left(far) == ["thesis.txt"]


def test_links_of_a_downloaded_directory_are_not_followed(tmp_path):
    """A working directory that came with an adapter moves nothing out of other directories."""
    out, far = tmp_path / "out", tmp_path / "far"
    test_kills.write_adapter_files(out, 16, 2.0)
    far.mkdir()
    (far / "adapter_config.json").write_text("secret")
    work = out / f"{PREFIX}x"
    (work / "commit").mkdir(parents=True)
    (work / "commit" / "new").symlink_to(far)
    (work / "old").symlink_to(far)
    assert test_kills.adapter_state(out) == (16, 2.0)
    (work / "commit" / "new").unlink()
    (work / "commit" / "new").mkdir()
    (work / "commit" / "new" / "sub").symlink_to(far)
    (work / "commit" / "new" / "other.txt").write_text("x")
    (out / "other.txt").write_text("mine")
    assert test_kills.adapter_state(out) == (16, 2.0)
    assert left(far) == ["adapter_config.json"]
    assert (far / "adapter_config.json").read_text() == "secret"


def test_a_mixture_that_cannot_be_finished_is_refused_in_one_line(tmp_path, monkeypatch):
    case, out = test_kills.converting(tmp_path), tmp_path / "out"
    case.old(out)
    # Just before the first of the old files is moved away.
    last = next(n for n, line in enumerate(operations(case, out)) if "/old/" in line)
    with pytest.MonkeyPatch.context() as patch, killed_at(last, patch):
        case.command(out)
    monkeypatch.setattr(journal, "_finish", refused)
    with pytest.raises(AdapterError, match="a part of a new one.*Read-only file system") as caught:
        load_config(out)
    assert str(caught.value).count("\n") == 0


def refused(directory, path, **more):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def operations(case, out):
    """Return what the command does to the disk, without doing it to ``out``."""
    with pytest.MonkeyPatch.context() as patch, killed_at(None, patch) as killer:
        other = shutil.copytree(out, out.parent / "other")
        killer.log.clear()
        case.command(other)
    return killer.log


def test_a_living_writer_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "_PATIENCE_SECONDS", 0.05)
    with working(tmp_path) as work:
        (work.path / "commit" / "new").mkdir(parents=True)
        with pytest.raises(AdapterError, match="another run is writing to .*; try again"):
            settle(tmp_path, AdapterError)
        shutil.rmtree(work.path / "commit")
        assert settle(tmp_path) == tmp_path


def test_where_nothing_can_be_locked_that_is_said(tmp_path, monkeypatch):
    def flock(handle, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    for module in (fcntl, None):
        monkeypatch.setattr(locks, "fcntl", module)
        with pytest.warns(UserWarning, match="nothing notices a second run"):
            write_atomic({tmp_path / "one": b"1"})
        with pytest.warns(UserWarning, match="files cannot be locked"):
            output_directory(tmp_path, overwrite=True)
    (tmp_path / f"{PREFIX}perhaps-living").mkdir()
    with pytest.warns(UserWarning, match="files cannot be locked"):
        output_directory(tmp_path, overwrite=True)
    assert left(tmp_path) == [f"{PREFIX}perhaps-living", "one"]


def test_weights_of_another_layout_are_not_left_to_be_read_first(tmp_path):
    """transformers reads model.safetensors before an index, and ours the other way round."""
    case = test_kills.merging(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_bytes(b"old")
    with pytest.raises(OutputError, match="would be read in the place of model-1"):
        case.command(tmp_path / "out")
    assert left(tmp_path / "out") == ["model.safetensors"]


def test_merge_writes_beside_nothing(tmp_path):
    """Its staging copy is in OUT, which may be a mount point or below a read-only directory."""
    case, seen = test_kills.merging(tmp_path), []
    before = left(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        real = journal.Work.commit

        def commit(self, *args, **more):
            seen.append(left(tmp_path))
            real(self, *args, **more)

        patch.setattr(journal.Work, "commit", commit)
        case.command(tmp_path / "out")
    assert seen == [[*before, "out"]] and PREFIX not in "".join(left(tmp_path / "out"))


def test_old_downloads_that_were_killed_go_after_a_day(tmp_path):
    directory = tmp_path / "tiny"
    for name, age in ((".fetch-old", 2 * 86400), (".fetch-young", 60)):
        (directory / name).mkdir(parents=True)
        then = directory.stat().st_mtime - age
        os.utime(directory / name, (then, then))
    case = test_kills.fetching(tmp_path)
    case.command(tmp_path)
    assert ".fetch-old" not in left(directory) and ".fetch-young" in left(directory)
