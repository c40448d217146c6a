"""The profile of a step: what runs, how often, and where it is shown."""

from __future__ import annotations

import dataclasses
import io
import types

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from benchmarks.case import Case, Contestant, Work
from benchmarks.contestants import common
from benchmarks.measure import harness, profiling
from benchmarks.measure.profiling import Operation
from benchmarks.show import report, results, rows, tables
from benchmarks.show.page import to_html
from benchmarks.tests import reports

LAYERS, TOKENS, WIDTH = 5, 64, 96


def stack(weights, x):
    """Return products by a scan over stacked weights, and what each layer gave."""

    def layer(x, w):
        x = jnp.tanh(x @ w)
        return x, x.sum(axis=1)

    return jax.lax.scan(layer, x, weights)


def scanned():
    args = jnp.ones((LAYERS, WIDTH, WIDTH)) / WIDTH, jnp.ones((TOKENS, WIDTH))
    program = common.compiled(lambda *args: stack(*args)[1], *args)
    return program.work(lambda: jax.block_until_ready(program.call(*args)))


def test_every_turn_of_a_loop_counts_and_the_loop_itself_does_not():
    work = scanned()
    work.step()
    found = profiling.profile(work, steps=4)
    assert [one.seconds for one in found] == sorted((one.seconds for one in found), reverse=True)
    (product,) = (one for one in found if one.kind == "product")
    assert product.count == LAYERS and product.seconds > 0
    square, rows_ = f"[{WIDTH},{WIDTH}]", f"[{TOKENS},{WIDTH}]"
    assert product.shapes.startswith(f"f32{rows_} = ") and f"f32{square}" in product.shapes
    assert not {"while", "call"} & {one.kind for one in found}
    assert any(one.kind == "written into a stack" for one in found)


def test_without_the_program_instructions_go_by_their_names():
    work = dataclasses.replace(scanned(), program=None)
    work.step()
    found = profiling.profile(work, steps=2)
    assert found and all(one.shapes == "" for one in found)
    assert not any(one.kind[-1].isdigit() or one.kind == "while" for one in found)


def plane(name, line, *events):
    runs = [
        types.SimpleNamespace(name=event, stats=stats, duration_ns=2e9) for event, stats in events
    ]
    return types.SimpleNamespace(name=name, lines=[types.SimpleNamespace(name=line, events=runs)])


def test_where_devices_ran_something_the_host_did_not():
    host = plane("/host:CPU", "python", ("launch", [("hlo_op", "dot.1")]), ("other", []))
    stream = plane("/device:GPU:0", "Stream #7", ("gemm", [("hlo_op", "dot.1")]), ("memset", []))
    core = plane("/device:TPU:0", "XLA Ops", ("%dot.1 = f32[2]{0} dot(%a, %b)", []))
    empty = plane("/device:GPU:1", "Stream #8")
    for planes, devices in (((host, empty), 1), ((host, stream), 1), ((host, core, stream), 2)):
        found = profiling.by_device(types.SimpleNamespace(planes=planes))
        assert found == [[("dot.1", 2.0)]] * devices


def test_what_jax_does_not_run_has_no_profile():
    assert profiling.profile(Work(lambda: 1.0)) == ()


@pytest.mark.parametrize("profiled", [True, False])
def test_our_own_step_is_profiled_where_that_is_asked_for(profiled):
    theirs = Contestant("theirs", lambda: Work(scanned().step))
    case = Case("c", "", (Contestant("ours", scanned), theirs), 0.0, same=True, rounds=1)
    result = harness.run(case, profiled=profiled)
    assert [timing.contestant for timing in result.timings] == ["ours", "theirs"]
    assert {one.kind for one in result.profile} >= ({"product"} if profiled else set())
    assert bool(result.profile) == profiled


MANY = tuple(
    Operation("product", f"f32[{n},8] = f32[{n},4], f32[4,8]", 30, 1.0 / n)
    for n in range(1, rows.OPERATIONS + 4)
)


def test_a_profile_goes_through_json_and_is_shown_in_every_form():
    before = reports.report()
    one = dataclasses.replace(before.results[0], profile=MANY)
    shown = report.from_json(report.to_json(dataclasses.replace(before, results=(one,))))
    assert shown.results[0].profile == MANY
    table = rows.operations(one)
    assert len(table) == rows.OPERATIONS + 1 and table[-1][:3] == ("others", "", "90")
    console = Console(file=io.StringIO(), width=200)
    console.print(tables.render(shown))
    page, markdown = to_html(shown), results.to_markdown([shown], (), (), "c")
    for text in (console.file.getvalue(), page, markdown.replace("\\", "")):
        for row in table:
            assert all(cell in text for cell in row)
    assert "in a step" not in to_html(before)
