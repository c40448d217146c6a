"""``python -m benchmarks aot``: targets, the reading of programs, and a compilation on the CPU."""

from __future__ import annotations

import collections
import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from rich.console import Console

from benchmarks import __main__ as command
from benchmarks.aot import collectives, compiling, facts, model, step, targets
from benchmarks.aot.facts import Facts, Memory, Request
from benchmarks.case import BenchmarkError
from benchmarks.cases import decoder
from benchmarks.commands import aot
from benchmarks.show.report import Report, to_json
from lora_jax import lora, plan


@pytest.mark.parametrize(
    ("name", "platform", "devices", "mesh"),
    [
        ("v5e:2x2", "tpu", 4, (1, 4)),
        ("v6e:1x1", "tpu", 1, (1, 1)),
        ("v5p:2x2x2", "tpu", 8, (1, 8)),
        ("tpu7x:2x2x1", "tpu", 8, (1, 8)),
        ("h100", "cuda", 1, (1, 1)),
        ("a100x4", "cuda", 4, (1, 4)),
        ("h100x16", "cuda", 16, (2, 8)),
        ("cpu:4", "cpu", 4, (1, 4)),
    ],
)
def test_a_target_has_its_devices_and_mesh(name, platform, devices, mesh):
    target = targets.parse(name)
    assert (target.platform, target.devices, target.mesh()) == (platform, devices, mesh)
    assert (target.memory is None) == (platform == "cpu")
    if platform == "cuda":
        assert f"device_memory_size: {target.memory}" in targets.GPUS[target.kind].config()


@pytest.mark.parametrize(
    "name",
    ["", "v5e", "v5e:2", "v5e:0x2", "v5e:2x2x2", "v5p:2x2", "v9:2x2", "h100x0", "h100x12", "cpu:0"],
)
def test_what_is_no_target_is_refused(name):
    with pytest.raises(BenchmarkError, match="target: got .* wanted a TPU and its grid"):
        targets.parse(name)


@pytest.mark.parametrize("data", [0, 3])
def test_copies_must_divide_the_devices(data):
    assert targets.parse("v5e:2x2").mesh(2) == (2, 2)
    with pytest.raises(BenchmarkError, match=f"data: got {data}, wanted a divisor of the 4"):
        targets.parse("v5e:2x2").mesh(data)


@pytest.mark.parametrize(("name", "extra"), [("v5e:2x2", "tpu-aot"), ("h100", "cuda-aot")])
def test_a_missing_compiler_is_named_with_the_command_that_installs_it(name, extra, monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(SystemExit) as stop:
        command.main(["aot", "--target", name])
    assert stop.value.code == 1
    with pytest.raises(BenchmarkError, match=rf'pip install "lora_jax\[{extra}\]"'):
        targets.require_installed(targets.parse(name))


LOOP = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%inner.body (p.1: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %p.1 = (s32[]{:T(128)}, bf16[8,64]{1,0:T(8,128)(2,1)}) parameter(0)
  %w = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p.1), index=1
  %i = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %g = bf16[32,64]{1,0:T(8,128)(2,1)} all-gather(%w), channel_id=1, dimensions={0}
  ROOT %t.1 = (s32[], bf16[8,64]{1,0:T(8,128)(2,1)}) tuple(%i, %w)
}

%inner.condition (p.2: (s32[], bf16[8,64])) -> pred[] {
  %p.2 = (s32[], bf16[8,64]{1,0}) parameter(0)
  %end = s32[]{:T(128)} constant(5), backend_config={"flag_configs":[]}
  %n = s32[] get-tuple-element(%p.2), index=0
  ROOT %less = pred[]{:T(512)} compare(%n, %end), direction=LT
}

%called (q: bf16[32,64]) -> bf16[8,64] {
  %q = bf16[32,64]{1,0} parameter(0)
  ROOT %rs = bf16[8,64]{1,0} reduce-scatter(%q), channel_id=3, dimensions={0}, to_apply=%add
}

%outer.body (p.3: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %p.3 = (s32[], bf16[8,64]{1,0}) parameter(0)
  ROOT %loop.1 = (s32[], bf16[8,64]{1,0}) while(%p.3), condition=%inner.condition, body=%inner.body
}

%outer.condition (p.4: (s32[], bf16[8,64])) -> pred[] {
  %p.4 = (s32[], bf16[8,64]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (a: bf16[8,64], b: bf16[32,64], c: f32[16]) -> bf16[8,64] {
  %a = bf16[8,64]{1,0} parameter(0)
  %b = bf16[32,64]{1,0} parameter(1)
  %c = f32[16]{0} parameter(2)
  %zero = s32[] constant(0)
  %t = (s32[], bf16[8,64]{1,0}) tuple(%zero, %a)
  %loop = (s32[], bf16[8,64]{1,0}) while(%t), condition=%outer.condition, body=%outer.body, TRIPS
  %r = f32[16]{0} all-reduce-start(%c), channel_id=2, to_apply=%add
  %r.done = f32[16]{0} all-reduce-done(%r)
  %s = ((bf16[32,64]), bf16[8,64]{1,0}) call-start(%b), to_apply=%called
  %s.done = bf16[8,64]{1,0} call-done(%s)
  %p = (f32[16]{0}, f32[64]{0}) all-gather-start(%c), channel_id=4, dimensions={0}
  %p.clone = (f32[16]{0}, f32[64]{0}) all-gather-start(%c), channel_id=4, dimensions={0}
  ROOT %out = bf16[8,64]{1,0} get-tuple-element(%loop), index=1
}
"""
TRIPS = 'backend_config={"known_trip_count":{"n":"3"},"dynamic_variables":[]}'


def test_collectives_are_counted_by_channel_and_by_the_steps_of_loops():
    found, notes = collectives.collectives(LOOP.replace("TRIPS", TRIPS))
    gathered = 15 * 32 * 64 * 2 + 64 * 4
    assert found == [
        collectives.Collective("all-gather", 15 + 1, gathered),
        collectives.Collective("all-reduce", 1, 16 * 4),
        collectives.Collective("reduce-scatter", 1, 32 * 64 * 2),
    ]
    assert not notes


def test_a_loop_that_states_no_steps_is_counted_once_and_said_so():
    found, notes = collectives.collectives(LOOP.replace("TRIPS", "metadata={}"))
    assert found[0].count == 5 + 1
    assert len(notes) == 1 and "does not state" in notes[0]


def test_a_program_without_collectives_has_none():
    program = jax.jit(lambda x: x @ x).lower(jnp.ones((4, 4))).compile().as_text()
    assert collectives.collectives(program) == ([], ())


REQUEST = Request("v5e:2x2", "tiny", 64, 32, 4, False, None, "O0")
FACTS = Facts(REQUEST, "TPU v5 lite", (1, 4), {"jax": "1"}, 10, 100, 10**9, 16.0 * 2**30)
REFUSALS = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
    "Used 18.62G of 15.75G hbm. Exceeded hbm capacity by 2.87G.",
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(18.62G) exceeds available HBM (15.75G).",
)


def shown(found):
    out = io.StringIO()
    Console(width=180, file=out).print(facts.render(found))
    return out.getvalue()


@pytest.mark.parametrize(("peak", "fits"), [(15 * 2**30, True), (17 * 2**30, False)])
def test_a_step_fits_if_its_peak_does(peak, fits):
    found = dataclasses.replace(FACTS, memory=Memory(1, 2, 2, 3, peak))
    assert found.fits == fits
    said = f"needs {peak // 2**30}.00 GiB, has 16.00 GiB"
    assert ("fits: " if fits else "does not fit: ") + said in shown(found)
    assert facts.LABEL in shown(found)


@pytest.mark.parametrize("message", REFUSALS, ids=("used", "required"))
def test_what_the_compiler_refuses_does_not_fit(message):
    needed, available = facts.refused(message)
    found = dataclasses.replace(FACTS, needed=needed, available=available)
    assert not found.fits and "does not fit: needs 18.62 GiB, has 15.75 GiB" in shown(found)
    assert facts.refused(message.replace("RESOURCE_EXHAUSTED", "INTERNAL")) is None
    assert facts.refused("RESOURCE_EXHAUSTED: of something else") is None


def test_facts_go_through_json():
    found = dataclasses.replace(
        FACTS,
        memory=Memory(1, 2, 2, 3, 5),
        collectives=(collectives.Collective("all-gather", 2, 8),),
    )
    fields = json.loads(json.dumps(facts.to_json(found)))
    assert fields["label"] == facts.LABEL and fields["fits"] is True
    assert facts.from_json(fields) == found
    for missing in ("memory", "request"):
        with pytest.raises(BenchmarkError, match=f"no facts of a compilation: .*{missing}"):
            facts.from_json({name: value for name, value in fields.items() if name != missing})


def test_results_tell_what_was_compiled_and_by_which_command(tmp_path, capsys):
    found = dataclasses.replace(
        FACTS,
        memory=Memory(1, 2, 2, 3, 5 * 2**30),
        collectives=(collectives.Collective("all-gather", 7, 2**30),),
        notes=("one of them",),
    )
    file, run, out = (tmp_path / name for name in ("o.json", "run.json", "RESULTS.md"))
    file.write_text(json.dumps(facts.to_json(found)))
    run.write_bytes(to_json(Report({}, ())))
    command.main(["results", str(run), "--aot", str(file), "--out", str(out)])
    said = out.read_text("utf-8")
    assert "`python -m benchmarks results run.json --aot o.json`" in said
    options = "--target v5e:2x2 --model tiny --tokens 64 --length 32 --rank 4"
    assert f"    python -m benchmarks aot {options}\n" in said and facts.LABEL in said
    for part in ("peak: 5.00 GiB", "all-gather: 7 of 1.00 GiB", "fits: needs", "jax 1", "one of"):
        assert part in said
    file.write_text("{}")
    with pytest.raises(SystemExit):
        command.main(["results", str(run), "--aot", str(file), "--out", str(out)])
    assert "o.json: these are no facts" in capsys.readouterr().err
    assert out.read_text("utf-8") == said


@pytest.mark.parametrize("fits", [True, False])
def test_the_status_says_whether_it_fits(fits, monkeypatch, tmp_path, capsys):
    peak = 2**30 if fits else 2**40
    found = dataclasses.replace(FACTS, memory=Memory(1, 2, 2, 3, peak))
    monkeypatch.setattr(aot, "compile_apart", lambda request: found)
    options = aot.AotOptions("v5e:2x2", "tiny", json=tmp_path / "o.json")
    assert aot.main(options) == (0 if fits else 1)
    assert json.loads((tmp_path / "o.json").read_text())["fits"] == fits
    assert facts.LABEL in capsys.readouterr().out


def test_every_bad_option_is_listed(tmp_path):
    options = aot.AotOptions("v5e", tokens=7, rank=0, json=tmp_path / "missing" / "o.json")
    with pytest.raises(BenchmarkError) as error:
        aot.main(options)
    assert [problem.split(":")[0] for problem in error.value.problems] == [
        "target",
        "rank",
        "tokens",
        "json",
    ]


def test_the_model_has_the_published_sizes():
    def values(name):
        return sum(x.size for x in jax.tree.leaves(model.shapes(model.MODELS[name])))

    assert values("smollm2") == 134_515_008
    assert values("llama-8b") == 8_030_261_248


@pytest.mark.slow
def test_steps_lower_the_loss():
    sizes = dataclasses.replace(model.MODELS["tiny"], layers=2, vocabulary=32)
    ready = step.build(sizes, rank=2, rows=2, length=8, full=False)
    rng = np.random.default_rng(0)

    def draw(leaf):
        scale = 0.02 if len(leaf.shape) > 1 else 1.0
        return jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype)

    trained, state, frozen, ids = ready.arguments
    trained, frozen = jax.tree.map(draw, (trained, frozen))
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)
    ids = jnp.asarray(rng.integers(0, 32, ids.shape), ids.dtype)
    fn, losses = jax.jit(ready.fn), []
    # optax raises float decays to integer powers.
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(8):
            trained, state, loss = fn(trained, state, frozen, ids)
            losses.append(float(loss))
    assert losses[-1] < losses[0] and np.isfinite(losses).all()
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(trained))


@pytest.mark.parametrize("full", [False, True])
def test_what_is_trained_lies_in_parts_over_all_axes(full):
    mesh = jax.sharding.AbstractMesh((2, 4), (step.DATA, step.FSDP))
    ready = step.build(model.MODELS["tiny"], rank=4, rows=8, length=8, full=full, mesh=mesh)
    trained, state, frozen, _ = ready.arguments
    for leaf in jax.tree.leaves((trained, state)):
        if leaf.ndim:
            assert np.prod(leaf.sharding.shard_shape(leaf.shape)) == leaf.size / 8, leaf
    for leaf in jax.tree.leaves(frozen):
        assert np.prod(leaf.sharding.shard_shape(leaf.shape)) == leaf.size / 4, leaf


@pytest.mark.parametrize("full", [False, True])
def test_products_are_of_bfloat16_and_what_is_trained_is_not(full):
    """Every product reads bfloat16; gradients of what was summed in float32 come in that."""
    ready = step.build(model.MODELS["tiny"], rank=4, rows=2, length=8, full=full)
    with jax.numpy_dtype_promotion("standard"):  # optax raises float decays to integer powers
        closed = jax.make_jaxpr(ready.fn)(*ready.arguments)

    def operands(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                yield tuple(v.aval.dtype.name for v in eqn.invars)
            for inner in core.jaxprs_in_params(eqn.params):
                yield from operands(inner)

    found = collections.Counter(operands(closed.jaxpr))
    assert set(found) == {("bfloat16", "bfloat16"), ("float32", "bfloat16")}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(ready.arguments[0])} == {"float32"}


@pytest.mark.slow
def test_a_step_compiles_for_virtual_devices_end_to_end(tmp_path):
    target = tmp_path / "out.json"
    options = ["--target", "cpu:4", "--model", "tiny", "--tokens", "16", "--length", "8"]
    command.main(["aot", *options, "--rank", "4", "--json", str(target)])
    found = json.loads(target.read_text())
    assert found["mesh"] == [1, 4] and found["fits"]
    moved = {one["kind"]: one for one in found["collectives"]}
    layers = model.MODELS["tiny"].layers
    # Nine weights a layer are gathered, in the forward pass and in its repetition.
    assert moved["all-gather"]["count"] >= 2 * 9 * layers
    params = model.shapes(model.MODELS["tiny"])["layers"]
    whole = 2 * sum(leaf.size for leaf in jax.tree.leaves(params))
    assert moved["all-gather"]["bytes"] >= 2 * whole
    per_device = (2 * found["base"] + 12 * found["trained"]) / 4
    assert found["memory"]["arguments"] == pytest.approx(per_device, rel=0.05)
    assert found["flops"] > 4 * 16 * found["base"]


@pytest.mark.slow
def test_the_process_that_compiles_says_why_it_failed(monkeypatch):
    monkeypatch.setattr(targets, "environment", lambda *_: {"JAX_PLATFORMS": "nothing"})
    with pytest.raises(BenchmarkError, match="the process that compiles failed:\n"):
        compiling.compile_apart(dataclasses.replace(REQUEST, target="cpu:4"))


def test_lora_meets_every_linear_of_the_model():
    sizes = model.MODELS["tiny"]
    params = model.shapes(sizes)
    ids = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    config = step.LoraConfig(r=2, target_modules=decoder.TARGETS)
    adapters = plan(model.loss(sizes), params, config, ids).abstract()
    assert {path.rpartition(".")[2] for path in adapters} == set(decoder.TARGETS)
    assert jax.eval_shape(lora(model.loss(sizes)), params, adapters, ids).shape == ()


def test_every_weight_and_what_every_layer_gives_is_laid_out():
    sizes, weights, rows = model.MODELS["tiny"], [], []
    params = model.shapes(sizes)

    def seen(places):
        return lambda value: places.append(value.shape) or value

    layout = decoder.Layout(seen(weights), seen(rows))
    ids = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    jax.eval_shape(model.loss(sizes, layout), params, ids)
    layers = [leaf.shape[1:] for leaf in params["layers"].values()]
    assert sorted(weights) == sorted([params["embedding"].shape, *layers])
    assert rows == [(2, 8, sizes.width)] * 2
