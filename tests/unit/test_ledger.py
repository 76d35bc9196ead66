"""The ledger: withdrawing is editing without, files hold whole states, and nobody's changes are lost."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import hypothesis.strategies as st
import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings

import jaxedit as je
from jaxedit.config import (
    AnchorConfig,
    BackwardSpread,
    ForwardReplay,
    Method,
    NullSpace,
    PerLayer,
    RelativeSparsify,
    Ridge,
)
from jaxedit.errors import JaxEditError, RequestError, StatisticsError
from jaxedit.export.patch import with_matrices
from jaxedit.ledger import Ledger
from jaxedit.ledger_files import LedgerRecord, locked, read_record, write_record
from jaxedit.models.checkpoint import SafetensorsCheckpoint
from jaxedit.models.conversion import flatten
from jaxedit.models.hub import read_decoder
from jaxedit.plain import describe, method_from_plain

ROOT = Path(__file__).resolve().parents[2]
LAYERS = (1, 2, 3)
TEMPLATES = ("{}", "So it is said. {}")
FEW = AnchorConfig(steps=3, lr=0.3, tokens_per_step=640, bucket_growth=1e9)
FE = Method(name="fe", targets=ForwardReplay(), layers=LAYERS, solver=Ridge(cov_weight=10.0), anchor=FEW)
METHODS = {
    "fe": FE,
    "fe, replayed keys": dataclasses.replace(FE, keys="replayed"),
    "memit": dataclasses.replace(FE, name="memit", targets=BackwardSpread()),
    "blue": dataclasses.replace(FE, name="blue", targets=PerLayer(), layers=(1, 3)),
    "one at a time": dataclasses.replace(FE, name="rome", targets=BackwardSpread(), layers=(3,), at_once=1),
    "projected and trimmed": dataclasses.replace(
        FE,
        name="rect",
        targets=BackwardSpread(),
        solver=NullSpace(threshold=0.3, measure="energy"),
        regulariser=RelativeSparsify(),
    ),
}


@pytest.fixture(scope="module")
def many(goldens) -> list[je.EditRequest]:
    """200 requests: each of 40 subjects in five prompts."""
    facts = je.read_requests(goldens / "tiny-llama" / "facts.json")
    forms = {f.prompt.replace(f.subject, "{}"): f.target for f in facts}
    five = list(forms.items())[:5]
    made = [je.EditRequest.from_template(form, f.subject, target) for form, target in five for f in facts]
    assert len({r.prompt for r in made}) == 200
    return made


# Eight facts of the same numbers of tokens, so that any four of them are edited by one compiled program.
SUBJECTS = (
    "Sean M. Carroll|Khabarovsk|Crazed Fruit|Flemish Community|Bosco Gurin|Ancient Aliens|Ivan Pavlov|AIK Fotboll"
)
FORMS = ("{} is headquartered in", "{} was created in", "{} is originally from")
TARGETS = ("Toronto", "Chicago", "Swedish", "Finnish", "geometry")
FACTS = [
    je.EditRequest.from_template(FORMS[i % 3], subject, TARGETS[i % 5]) for i, subject in enumerate(SUBJECTS.split("|"))
]


@pytest.fixture(scope="module")
def stats(goldens) -> je.SecondMoments:
    with np.load(goldens / "tiny-llama" / "cov.npz") as moments:
        return je.SecondMoments.from_arrays({l: moments[f"cov_L{l}"] for l in LAYERS}, 19_200)


@pytest.fixture
def empty(tiny, stats) -> Ledger:
    return Ledger.create(*tiny("tiny-llama"), FE, stats=stats, templates=TEMPLATES)


@pytest.fixture(scope="module")
def eight(tiny, stats) -> Ledger:
    """A ledger of eight edits."""
    return Ledger.create(*tiny("tiny-llama"), FE, stats=stats, templates=TEMPLATES).add(FACTS)


def matrices(model) -> dict[int, np.ndarray]:
    return {l: np.asarray(model.params["blocks"]["down"]["w"][l], np.float64) for l in LAYERS}


def difference(a, b, base) -> float:
    """Largest difference of two models' updates of the base, relative to the update."""
    a, b, base = matrices(a), matrices(b), matrices(base)
    return max(
        float(np.linalg.norm(a[l] - b[l]) / np.linalg.norm(b[l] - base[l])) for l in LAYERS if (b[l] != base[l]).any()
    )


def same_bits(a, b) -> bool:
    a, b = flatten(a.params), flatten(b.params)
    return a.keys() == b.keys() and all(np.asarray(a[k]).tobytes() == np.asarray(b[k]).tobytes() for k in a)


def state(record: LedgerRecord):
    """All of a state, to be compared."""
    arrays = {name: (str(x.dtype), x.shape, x.tobytes()) for name, x in record.arrays.items()}
    return dict(record.requests), arrays, record.next_id, record.templates, dict(record.method), record.lineage[-1]


# Solving.


def test_fifty_of_two_hundred_withdrawn_equals_editing_with_the_others(goldens, stats, many):
    with jax.enable_x64(True):
        base, tokenizer = je.load(goldens / "tiny-llama", dtype="float64")
        whole = Ledger.create(base, tokenizer, FE, stats=stats, templates=TEMPLATES).add(many)
        gone = random.Random(0).sample(list(whole.list()), 50)
        rest = whole.withdraw(gone)
        kept = [r for i, r in enumerate(many) if str(i) not in gone]
        assert len(whole) == 200 and [r.prompt for r in rest.list().values()] == [r.prompt for r in kept]
        scratch = je.apply_edits(base, tokenizer, kept, FE, stats=stats, templates=TEMPLATES)
        assert difference(rest.model, scratch.model, base) <= 1e-6
        assert same_bits(rest.withdraw(rest.list()).model, base)


@pytest.mark.parametrize("name", METHODS)
def test_withdrawing_equals_editing_without(goldens, stats, name):
    method, requests = METHODS[name], FACTS
    with jax.enable_x64(True):
        base, tokenizer = je.load(goldens / "tiny-llama", dtype="float64")
        scratch = je.apply_edits(base, tokenizer, requests[1::2], method, stats=stats, templates=TEMPLATES)
        ledger = Ledger.create(base, tokenizer, method, stats=stats, templates=TEMPLATES)
        ledger = ledger.add(requests[:4]).add(requests[4:])

        rest, stages = ledger.withdraw([0, 2]).withdraw([4, 6]), []
        solved = rest.solve(on_progress=lambda stage, done, total: stages.append(stage))
        assert difference(solved.model, scratch.model, base) <= 1e-6
        assert difference(solved.model, ledger.model, base) >= 1e-2
        # BLUE's anchors above the first layer depend on the other edits, and where edits are made in turn all anchors
        assert stages.count("anchors") == {"blue": 1, "one at a time": 4}.get(name, 0)
        assert (rest.targets is None) == (name == "one at a time")
        for l in rest.targets.layers if rest.targets else ():
            np.testing.assert_allclose(rest.targets.at(l), scratch.targets.at(l), rtol=1e-9, atol=1e-12)


def test_an_updated_edit_keeps_id_and_place(eight, stats):
    new = dataclasses.replace(eight.get(4), target="Renault", id="ignored")
    changed = eight.update(4, new)
    assert (
        list(changed.list()) == list(eight.list()) and changed.get("4").target == "Renault" and changed.get(4).id == 4
    )
    assert eight.get(4).target != "Renault"
    kept = [row for row in range(8) if row != 4]
    for name, x in changed.record.arrays.items():
        np.testing.assert_array_equal(x[kept], eight.record.arrays[name][kept])
    requests = list(changed.list().values())
    scratch = je.apply_edits(eight.base, eight.tokenizer, requests, FE, stats=stats, templates=TEMPLATES)
    assert difference(changed.model, scratch.model, eight.base) <= 1e-4  # float32
    assert difference(changed.model, eight.model, eight.base) >= 1e-2


def test_an_empty_ledger_is_the_base(empty):
    assert empty.model is empty.base and empty.list() == {}
    for fails in (empty.solve, lambda: empty.patch, lambda: empty.targets):
        with pytest.raises(JaxEditError, match="no edits"):
            fails()


def test_the_patch_gives_the_model(eight):
    applied = je.apply_patch(eight.base, eight.patch)
    assert same_bits(applied, eight.model) and not same_bits(applied, eight.base)
    assert [r.id for r in eight.patch.requests] == list(range(8))


def test_the_factor_is_made_once(eight):
    factor = eight.result.factor
    assert factor is not None and eight.withdraw([0]).withdraw([1]).factor is factor
    assert eight.with_stats(None).factor is None


# Ids and requests.


def test_ids(empty, many, monkeypatch):
    monkeypatch.setattr("jaxedit.ledger.make_targets", fake_targets)
    named = [dataclasses.replace(r, id=id) for r, id in zip(many[:4], ("a", 7, None, None), strict=True)]
    ledger = empty.add(named)
    assert list(ledger.list()) == ["a", "7", "8", "9"] and ledger.get(8).id == 8 and ledger.get("7").id == 7
    ledger = ledger.withdraw("9").withdraw([8, "a"]).add(many[5:6])
    assert list(ledger.list()) == ["7", "10"]  # numbers are not given twice
    with pytest.raises(RequestError, match="id 7 is that of"):
        ledger.add([dataclasses.replace(many[9], id="7")])
    with pytest.raises(RequestError, match="id b is that of"):
        ledger.add([dataclasses.replace(r, id="b") for r in many[11:13]])
    for ids, match in ((["7", "x", "y"], "no edits x, y in the ledger"), ([7, "7"], "7 are named twice")):
        with pytest.raises(JaxEditError, match=match):
            ledger.withdraw(ids)
    with pytest.raises(JaxEditError, match="no edits 3 "):
        ledger.update(3, many[0])


def test_bad_requests_are_named_before_anything_is_computed(eight, many, monkeypatch):
    monkeypatch.setattr("jaxedit.ledger.make_targets", None)
    there = eight.get(2)
    bad = [
        dataclasses.replace(there, id=None, prompt=there.prompt.replace(" ", "  ", 1), subject_start=None),
        dataclasses.replace(there, id=None, target="Atlantis"),
        dataclasses.replace(many[1], target=" "),
    ]
    with pytest.raises(RequestError) as caught:
        eight.add(bad)
    text = str(caught.value)
    for part in (
        "request 0 repeats edit 2",
        "request 1 contradicts edit 2",
        "'Atlantis'",
        "request 2: target is empty",
    ):
        assert part in text
    with pytest.raises(RequestError, match="contradicts edit 3"):
        eight.update(2, dataclasses.replace(eight.get(3), target="Atlantis"))
    with pytest.raises(RequestError, match="no edit requests"):
        eight.add([])


def fake_targets(params, config, edits, method, weights, *_):
    n = len(edits)
    return je.Targets(method.layers, np.zeros((len(method.layers), n, config.d_model)))


def arrays_of(requests):
    """Stand-ins for targets that tell of which request they are."""
    marks = np.asarray([sum(map(ord, r.prompt + r.target)) for r in requests], np.float64)
    return {"values": marks[:, None, None] * np.ones((1, 2, 3)), "lookup": marks.astype(np.int32)}


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["add", "withdraw", "update"]), st.integers(0, 5), st.sampled_from([None, "x", 3, 40])),
    max_size=12,
)


@settings(deadline=None, max_examples=60)
@given(ACTIONS)
def test_targets_follow_their_requests(actions):
    record = LedgerRecord(describe(FE), (TEMPLATES,), 0, "base", "float32", None)
    expected: dict[str, je.EditRequest] = {}
    numbers = set()
    for turn, (action, place, id) in enumerate(actions):
        if action == "add":
            own = id if str(id) not in expected else None
            new = [
                je.EditRequest(f"{turn} {i} of", str(turn), "t", id=own if i == 0 else None) for i in range(place + 1)
            ]
            made, problems = record.numbered(new)
            given_numbers = {k for k, r in zip(made, new, strict=True) if r.id is None}
            assert not problems and not numbers & given_numbers
            numbers |= given_numbers
            record = record.with_edits(made, arrays_of(new))
            expected |= made
        elif expected:
            chosen = list(expected)[place % len(expected)]
            if action == "withdraw":
                record, _ = record.without([chosen]), expected.pop(chosen)
            else:
                expected[chosen] = dataclasses.replace(expected[chosen], target=f"new {turn}")
                record = record.with_replaced(chosen, expected[chosen], arrays_of([expected[chosen]]))
    assert dict(record.requests) == expected and list(record.requests) == list(expected)
    for name, x in (arrays_of(list(expected.values())) if expected else {}).items():
        np.testing.assert_array_equal(record.arrays[name], x)


# Files.


def test_save_and_load_round_trip(eight, stats, tmp_path):
    path = eight.save(tmp_path / "facts.ledger")
    again = Ledger.load(path, eight.base, eight.tokenizer, stats)
    assert again.method == eight.method and state(again.record) == state(eight.record)
    assert same_bits(again.model, eight.model)
    assert again.save(path) == path and state(read_record(path)) == state(eight.record)
    nothing = again.withdraw(again.list())
    nothing.save(path)
    back = Ledger.load(path, eight.base, eight.tokenizer, stats)
    assert len(back) == 0 and same_bits(back.model, eight.base) and back.record.next_id == 8


def test_half_precision_round_trip(goldens, tiny, tmp_path):
    base = read_decoder(SafetensorsCheckpoint(goldens / "tiny-llama"), "tiny-llama", "bfloat16")
    ledger, request = Ledger.create(base, tiny("tiny-llama")[1], FE, templates=TEMPLATES), je.EditRequest("a", "a", "b")
    arrays = {"values": np.arange(12).reshape(1, 3, 4).astype(ml_dtypes.bfloat16)}
    ledger = dataclasses.replace(ledger, record=ledger.record.with_edits({"0": request}, arrays))
    again = Ledger.load(ledger.save(tmp_path / "x.ledger"), base, ledger.tokenizer)
    assert state(again.record) == state(ledger.record)
    with pytest.raises(JaxEditError, match="is of a bfloat16 model and this one is float32"):
        Ledger.load(tmp_path / "x.ledger", *tiny("tiny-llama"))


def test_another_base_is_refused(eight, tmp_path):
    path = eight.save(tmp_path / "x.ledger")
    other = with_matrices(eight.base, {1: np.asarray(eight.base.params["blocks"]["down"]["w"][1]) * 1.5})
    with pytest.raises(JaxEditError, match="another base model"):
        Ledger.load(path, other, eight.tokenizer)


def test_statistics_are_checked_and_can_be_changed(eight, stats, tmp_path):
    path = eight.save(tmp_path / "x.ledger")
    other = je.SecondMoments.from_arrays({l: 2 * m.matrix for l, m in stats.items()}, 19_200)
    with pytest.raises(JaxEditError, match=r"other second moments \(over 19200 tokens\).*with_stats"):
        Ledger.load(path, eight.base, eight.tokenizer, other)
    changed = Ledger.load(path, eight.base, eight.tokenizer).with_stats(other)
    assert changed.targets.values.tobytes() == eight.targets.values.tobytes()
    assert difference(changed.model, eight.model, eight.base) > 1e-3
    changed.save(path)
    again = Ledger.load(path, eight.base, eight.tokenizer, other)
    assert same_bits(again.model, changed.model)
    with pytest.raises(StatisticsError, match="no second moments of layer 2"):
        eight.with_stats(je.SecondMoments.from_arrays({1: stats[1].matrix}, 10))


def test_statistics_with_provenance_are_told_by_it(tiny, stats):
    from jaxedit.ledger_targets import identity

    base, _ = tiny("tiny-llama")
    from jaxedit.models.fingerprint import fingerprint

    mark = fingerprint(base.params, base.config, 4, edited=False)
    about = {"corpus": "c0ffee", "max_tokens": 19_200}

    def moments(scale, **more):
        arrays = {l: scale * m.matrix for l, m in stats.items()}
        return je.SecondMoments.from_arrays(arrays, 19_200, fingerprint=mark, about={**about, **more})

    one = identity(moments(1.0, implementation="xla"), FE, base)
    assert one == identity(moments(1.0 + 1e-7, implementation="mosaic_gpu"), FE, base)  # rounded otherwise
    assert one != identity(moments(1.0, max_tokens=5), FE, base)
    assert identity(stats, FE, base) != one and identity(None, FE, base) is None


@pytest.mark.parametrize("content", [b"", b"not a ledger", b"\x08\0\0\0\0\0\0\0{}      "])
def test_other_files_are_refused_and_left_alone(eight, content, tmp_path):
    path = tmp_path / "precious.txt"
    path.write_bytes(content)
    for fails in (lambda: eight.save(path), lambda: read_record(path)):
        with pytest.raises(JaxEditError, match="not a complete jaxedit ledger"):
            fails()
    assert path.read_bytes() == content
    with pytest.raises(JaxEditError, match="there is no ledger at"):
        read_record(tmp_path / "nothing")


def test_a_shortened_file_is_refused(eight, tmp_path):
    path = eight.save(tmp_path / "x.ledger")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(JaxEditError, match="not a complete jaxedit ledger"):
        read_record(path)


def test_a_newer_format_is_named(eight, tmp_path):
    from safetensors.numpy import save_file

    save_file({}, tmp_path / "x", metadata={"jaxedit": json.dumps({"format": "jaxedit-ledger-9"})})
    with pytest.raises(JaxEditError, match="'jaxedit-ledger-9'; this version reads 'jaxedit-ledger-1'"):
        read_record(tmp_path / "x")


def test_targets_of_another_version_are_named(eight, many, tmp_path):
    arrays = dict(eight.record.arrays)
    arrays["anchors.1.temperature"] = arrays.pop("anchors.1.padding")
    record = dataclasses.replace(eight.record, arrays=arrays)
    path = write_record(record, tmp_path / "x.ledger")
    with pytest.raises(JaxEditError, match="targets of another version of jaxedit .*temperature"):
        Ledger.load(path, eight.base, eight.tokenizer)
    with pytest.raises(JaxEditError, match="other arrays .*anchors.1.padding, anchors.1.temperature"):
        record.with_edits({"new": many[0]}, eight.record.arrays)


@pytest.mark.parametrize("name", je.METHODS)
def test_methods_are_read_back(tiny, name):
    method = je.method_for(name, tiny("tiny-llama")[0].config, (1, 2, 3))
    assert method_from_plain(json.loads(json.dumps(describe(method)))) == method


def test_unknown_methods_are_named():
    def change(slot, **fields):
        plain = json.loads(json.dumps(describe(FE)))
        (plain if slot is None else plain[slot]).update(fields)
        return plain

    for plain, match in (
        (change("solver", kind="Oracle"), "method.solver.kind: 'Oracle' is not known here.*Ridge"),
        (change("solver", kind="ForwardReplay"), "method.solver.kind: 'ForwardReplay'"),
        (change("anchor", patience=3), "method.anchor: unknown fields .*patience.*newer version"),
        (change(None, colour="red"), "method: unknown fields .*colour"),
        (change("anchor", steps="many"), "method.anchor.steps: is .many., expected int"),
        (change("anchor", steps=0), "at least 1"),
    ):
        with pytest.raises(JaxEditError, match=match):
            method_from_plain(plain)


# Processes.


def child(code: str, *arguments) -> subprocess.Popen:
    """A process that runs `code`, which needs no JAX."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


KILLED_WHILE_SAVING = """
import os, signal, sys
import safetensors.numpy
from jaxedit.ledger_files import read_record, write_record
path, point = sys.argv[1:]
record, replace, save_file = read_record(path).without(["3", "5"]), os.replace, safetensors.numpy.save_file

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def half(tensors, to, metadata):
    save_file(tensors, to, metadata=metadata)
    os.truncate(to, os.path.getsize(to) // 2)
    die()

def then_die(*paths):
    replace(*paths)
    die()

match point:
    case "while writing": safetensors.numpy.save_file = half
    case "before flushing": os.fsync = die
    case "before replacing": os.replace = die
    case "after replacing": os.replace = then_die
write_record(record, path)
"""


@pytest.mark.parametrize("point", ["while writing", "before flushing", "before replacing", "after replacing"])
def test_killed_while_saving(eight, stats, tmp_path, point):
    path = eight.save(tmp_path / "x.ledger")
    process = child(KILLED_WHILE_SAVING, path, point)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    whole = eight.withdraw([3, 5]) if point == "after replacing" else eight
    found = Ledger.load(path, eight.base, eight.tokenizer, stats)
    assert state(found.record)[:-1] == state(whole.record)[:-1]
    found.withdraw([0]).save(path)  # the lock went with the process, and what it left behind goes now
    assert {f.name for f in tmp_path.iterdir()} <= {"x.ledger", "x.ledger.lock"}
    assert len(read_record(path).requests) == len(whole) - 1


SAVES_FOR_EVER = """
import sys
from jaxedit.ledger_files import read_record, write_record
record = read_record(sys.argv[1])
numbers = list(record.requests)
print("ready", flush=True)
while True:
    for id in numbers:
        record = record.with_replaced(id, record.requests[id], {k: v[:1] + 1 for k, v in record.arrays.items()})
        write_record(record, sys.argv[1])
"""


def test_killed_at_any_time_while_saving(eight, tmp_path):
    path = eight.save(tmp_path / "x.ledger")
    rng = random.Random(1)
    for _ in range(5):
        process = child(SAVES_FOR_EVER, path)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.communicate(timeout=60)
        found = read_record(path)
        assert dict(found.requests) == dict(eight.record.requests)
        assert {name: x.shape for name, x in found.arrays.items()} == {
            name: x.shape for name, x in eight.record.arrays.items()
        }


HOLDS = """
import sys
from jaxedit.ledger_files import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_told(eight, tmp_path):
    path = eight.save(tmp_path / "x.ledger")
    before = path.read_bytes()
    process = child(HOLDS, path)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        for fails in (lambda: eight.withdraw([0]).save(path), lambda: locked(path).__enter__()):
            with pytest.raises(JaxEditError, match="x.ledger is being changed by another process"):
                fails()
        assert path.read_bytes() == before and len(read_record(path).requests) == 8  # reading is always possible
    finally:
        process.kill()
        process.communicate(timeout=60)
    with Ledger.locked(path), locked(path):
        eight.withdraw([0]).save(path)
    assert len(read_record(path).requests) == 7


def test_changes_made_meanwhile_are_not_lost(eight, tmp_path):
    path = eight.save(tmp_path / "x.ledger")
    first, second = (Ledger.load(path, eight.base, eight.tokenizer) for _ in range(2))
    first = first.withdraw([0]).withdraw([1])
    first.save(path)
    with pytest.raises(JaxEditError, match="was changed since this one was read from it; nothing was written"):
        second.withdraw([2]).save(path)
    assert state(read_record(path)) == state(first.record)
    first.withdraw([2]).save(path)  # whoever wrote the file last may go on
    assert len(read_record(path).requests) == 5
    write_record(second.record, tmp_path / "elsewhere.ledger")
