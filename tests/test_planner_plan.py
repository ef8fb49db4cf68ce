"""`nexus_jax.plan` on the local compiler: it fits, it says what it did, and bad input is refused."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import pytest
from checks import assert_close, unfused
from hypothesis import given, settings
from hypothesis import strategies as st

import nexus_jax as nj
from nexus_jax.planner import loop, make
from nexus_jax.planner.budget import budget_of
from nexus_jax.planner.make import plan
from nexus_jax.planner.plan import Infeasible, Plan
from nexus_jax.targets.compiler import find_target

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11),
    reason="XLA's CPU compiler of jax 0.10 frees nothing under remat: no plan fits there",
)


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("NEXUS_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "planner"))


def loss(ws, x):
    for w in ws:
        x = jnp.sin(x @ w)
    return jnp.mean(x)


SHAPES = [jax.ShapeDtypeStruct((64, 64), jnp.float32)] * 8, jax.ShapeDtypeStruct((4096, 64), jnp.float32)
MIB = 2**20


def test_a_plan_fits_its_budget_and_keeps_the_gradients():
    found = plan(loss, *SHAPES, memory_budget=12 * MIB)
    assert found.device_bytes <= 12 * MIB < found.unplanned_bytes
    measured = nj.measure(found.apply(loss), *SHAPES)
    assert measured.device_bytes == found.device_bytes
    assert measured.flops - nj.measure(loss, *SHAPES).flops == found.extra_flops > 0
    ws = [jax.random.normal(jax.random.key(i), (64, 64)) / 8 for i in range(8)]
    x = jax.random.normal(jax.random.key(9), (4096, 64))
    plain = unfused(jax.value_and_grad(loss), ws, x)
    assert_close(plain, unfused(jax.value_and_grad(found.apply(loss)), ws, x), 1e-5)


def test_a_budget_that_suffices_changes_nothing():
    before = nj.measure(loss, *SHAPES)
    found = plan(loss, *SHAPES, memory_budget=before.device_bytes)
    assert found.does_nothing
    assert found.extra_flops == 0
    assert found.device_bytes == before.device_bytes
    assert "nothing to do" in str(found)
    text = lambda f: str(jax.make_jaxpr(jax.grad(f))(*SHAPES))
    assert text(found.apply(loss)) == text(loss)


def test_the_smallest_budget_that_an_error_names_works():
    with pytest.raises(Infeasible, match=r"too small on local.*at least; write memory_budget=\d+ or more") as error:
        plan(loss, *SHAPES, memory_budget=2 * MIB)
    found = plan(loss, *SHAPES, memory_budget=error.value.smallest)
    assert found.device_bytes <= error.value.smallest


def test_more_budget_is_never_slower_and_equal_questions_have_equal_answers():
    budgets = [int(m * MIB) for m in (9.5, 11, 12, 14)]
    found = [plan(loss, *SHAPES, memory_budget=b) for b in budgets]
    assert [p.extra_flops for p in found] == sorted((p.extra_flops for p in found), reverse=True)
    assert all(p.device_bytes <= b for p, b in zip(found, budgets, strict=True))
    assert all(len(p.trials) <= loop.COMPILES - 1 for p in found)
    assert plan(loss, *SHAPES, memory_budget=budgets[0]) == found[0]


def test_the_table_says_what_becomes_of_each_value_and_why():
    text = str(plan(loss, *SHAPES, memory_budget=12 * MIB))
    for part in (
        "plan for 12.00 MiB on local",
        "compiled",
        "without a plan",
        "more FLOPs",
        "gap",
        "recompute",
        "would take",
    ):
        assert part in " ".join(text.split())


def test_a_plan_survives_its_file(tmp_path):
    found = plan(loss, *SHAPES, memory_budget=12 * MIB)
    found.save(tmp_path / "plan.toml")
    again = Plan.load(tmp_path / "plan.toml")
    assert again == found
    assert str(again) == str(found)
    assert hash(again.segments) == hash(found.segments)
    sizes = [nj.residuals(p.apply(loss), *SHAPES).nbytes for p in (found, again)]
    assert sizes[0] == sizes[1] < nj.residuals(loss, *SHAPES).nbytes


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("nexus_jax_plan = 1", "nexus_jax_plan = 9", "no plan of this version"),
        ("nexus_jax_plan = 1", "nexus_jax_plan = [", "not valid TOML"),
        ("start = 0", "start = 1", "segment 1 should start at equation 0"),
        ("start = 0", "begin = 0", "unknown key begin"),
        ("boundary = true", 'boundary = "yes"', "write a value of type bool"),
        ("budget = 12582912", "budget = -8", "budget = -8: write 0 or more"),
        ("budget = 12582912", 'budget = "8"', "write a value of type int"),
        ("budget = 12582912", "bugdet = 12582912", "unknown key bugdet"),
        ('target = "local"\n', "", "target is missing"),
        ("[subject]", "[topic]", "inputs = None: write a list"),
    ],
)
def test_a_file_edited_into_nonsense_is_refused(tmp_path, old, new, message):
    found = plan(loss, *SHAPES, memory_budget=12 * MIB)
    path = tmp_path / "plan.toml"
    found.save(path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=message) as error:
        Plan.load(path)
    assert "plan.toml" in str(error.value)


def test_a_file_that_names_values_that_are_not_there_is_refused_where_it_is_applied(tmp_path):
    found = plan(loss, *SHAPES, memory_budget=12 * MIB)
    first = next(n for n, s in enumerate(found.segments) if s.boundary)
    segments = list(found.segments)
    segments[first] = dataclasses.replace(segments[first], save=(999,))
    dataclasses.replace(found, segments=tuple(segments)).save(tmp_path / "plan.toml")
    with pytest.raises(ValueError, match="keeps value 999, which is not there"):
        jax.eval_shape(Plan.load(tmp_path / "plan.toml").apply(loss), *SHAPES)


def test_a_time_limit_gives_the_best_so_far_with_its_gap():
    found = plan(loss, *SHAPES, memory_budget=12 * MIB, time_limit=1e-9)
    assert found.device_bytes <= 12 * MIB
    assert found.gap > 0
    assert plan(loss, *SHAPES, memory_budget=12 * MIB).gap < found.gap


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (0, ValueError, "write more than 0 bytes"),
        (-5, ValueError, "write more than 0 bytes"),
        ("-5GB", ValueError, "is no size"),
        ("lots", ValueError, "is no size"),
        ("5 parsecs", ValueError, "is no size"),
        ("0%", ValueError, "more than 0 %"),
        ("101%", ValueError, 'at most "100%"'),
        ("17GiB", ValueError, 'a program may take 15.75 GiB on v5e: write "100%" or less'),
        (1.5, TypeError, "write bytes as a whole number"),
        (True, TypeError, "write bytes as a whole number"),
        (None, TypeError, "write bytes as a whole number"),
    ],
)
def test_budgets_that_are_none(given, error, message):
    with pytest.raises(error, match=message):
        budget_of(given, find_target("v5e"), int(15.75 * 2**30))


def test_budgets_that_are_some():
    of = lambda given: budget_of(given, find_target("v5e"), 2**34)
    assert [of("1GB"), of("1GiB"), of("50%"), of("1.5 kib"), of(77), of("77")] == [10**9, 2**30, 2**33, 1536, 77, 77]
    with pytest.raises(ValueError, match="the memory of local is not known"):
        budget_of("90%", find_target(None), None)


@pytest.mark.parametrize(
    ("given", "target", "error", "match"),
    [
        ("many", "v5e", ValueError, 'is no size: write bytes as a whole number, "64GiB"'),
        ("50%", "v5e", ValueError, "is no size"),
        (-1, "v5e", ValueError, "write 0 bytes or more"),
        (True, "v5e", TypeError, "write bytes as a whole number"),
        (2.5, "v5e", TypeError, "write bytes as a whole number"),
        ("1GiB", None, ValueError, "how fast local reaches its host is not known"),
    ],
)
def test_host_budgets_that_are_none(given, target, error, match):
    with pytest.raises(error, match=match):
        plan(loss, *SHAPES, memory_budget=MIB, target=target, host_budget=given)


def test_other_bad_input():
    with pytest.raises(TypeError, match="must return a scalar loss"):
        plan(lambda ws, x: x @ ws[0], *SHAPES, memory_budget=MIB)
    with pytest.raises(ValueError, match='objective=\'speed\': write "seconds" or "flops"'):
        plan(loss, *SHAPES, memory_budget=MIB, objective="speed")
    with pytest.raises(ValueError, match="time_limit=-1: write seconds"):
        plan(loss, *SHAPES, memory_budget=MIB, time_limit=-1)


# --- the search ------------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=60, unique=True).map(sorted),
    st.integers(-100, 100),
    st.floats(0.8, 1.2),
    st.integers(1, 1200),
)
def test_the_search_finds_a_plan_where_one_fits(predicted, off, slope, budget):
    true = [int(slope * p) + off for p in predicted]
    asked = []

    def compiled(at):
        asked.append(at)
        return true[at]

    found = loop.search(len(true), budget, lambda at: predicted[at], compiled)
    assert len(asked) == len(set(asked)) <= loop.COMPILES - 1
    if true[0] > budget:
        assert found.best is None
        assert 0 in asked  # so that the smallest budget can be named
    else:
        assert found.best is not None
        assert found.best.compiled <= budget
        assert found.best.at == max(at for at in asked if true[at] <= budget)


def test_the_search_is_exact_where_predictions_are_off_by_a_constant():
    for budget in range(20, 320, 7):
        found = loop.search(100, budget, lambda at: 3 * at, lambda at: 3 * at + 20)
        assert found.best.at == min((budget - 20) // 3, 99) or found.best.compiled >= loop.NEAR * budget


def test_the_search_settles_where_predictions_get_worse_as_it_backs_off():
    budget = 737
    overlooked = lambda spare: 80 if spare < 80 else 96 if spare < 96 else 98 if spare < 98 else 99
    true = [at + overlooked(budget - at) for at in range(budget)]
    found = loop.search(budget, budget, lambda at: at, lambda at: true[at])
    assert 0.97 * budget < found.best.compiled <= budget


def test_the_search_nears_a_place_from_which_on_predictions_are_off():
    found = loop.search(700, 510, lambda at: at, lambda at: at + (2 if at < 500 else 40))
    assert 0.96 * 510 < found.best.compiled <= 510  # 472 if what was off for one plan were so for all


def test_where_more_is_not_predicted_to_take_more_what_is_beyond_is_asked():
    true = lambda at: 90 if at == 42 else 120 if at > 40 else 60  # of 41 to 99, one takes little
    assert loop.search(100, 100, true, true).best.at == 42
    assert loop.search(100, 100, lambda at: 120, true).trials[0].at == 0  # nothing is predicted to fit


def test_no_compile_goes_to_what_is_hardly_faster():
    predict = lambda at: at + 8 if at <= 45 else 200
    trials = lambda **how: [t.at for t in loop.search(100, 50, predict, lambda at: at, **how).trials]
    assert trials() == [42, 45]
    assert trials(as_fast=lambda at: max(at, 45)) == [42]


def test_plans_that_are_the_same_step_count_once():
    same = lambda at: min(at, 500)  # from there on all are one step, which is just too large
    found = loop.search(1000, 510, same, lambda at: 512 if at >= 500 else at, key=same)
    assert len({same(t.at) for t in found.trials}) <= loop.COMPILES - 1
    assert found.best.at == 499  # 498 if they were counted one by one


def test_only_plans_that_are_faster_are_compiled():
    asked = []
    found = loop.search(100, 50, lambda at: at, lambda at: asked.append(at) or at, above=50)
    assert (found.best, asked) == (None, [])
    assert loop.search(100, 50, lambda at: at, lambda at: at, above=48).best.at == 50


def fixed_policies(monkeypatch, found, budget, best=None, compiles=9, learned=None):
    """Which of (ticks, peak, predicted, compiled) are compiled beside the planner's own plans, in shares of the budget."""
    planner = make.Planner(loss, SHAPES)
    paths = {ticks: types.SimpleNamespace(ticks=ticks, peak=int(peak * budget)) for ticks, peak, _, _ in found}
    share = {ticks: (predicted, compiled) for ticks, _, predicted, compiled in found}
    monkeypatch.setattr(make, "baselines", lambda model: [types.SimpleNamespace(path=p) for p in paths.values()])
    monkeypatch.setattr(make.Planner, "offset", 0)
    monkeypatch.setattr(planner, "predicted", lambda p: int(share[p.ticks][0] * budget))
    size = lambda p: types.SimpleNamespace(device_bytes=int(share[p.ticks][1] * budget))
    monkeypatch.setattr(planner, "measured", size)
    if learned is not None:
        last = types.SimpleNamespace(ticks=0)
        share[0] = (1, 1 + learned / budget)
        planner._tried["last"] = last
    known = None if best is None else types.SimpleNamespace(ticks=best)
    return [p.ticks for p in planner._fixed(budget, known, compiles)]


@pytest.mark.parametrize(("peak", "tried"), [(2.9, [1]), (3.1, [])])
def test_a_fixed_policy_is_tried_though_the_coarse_model_says_that_it_does_not_fit(monkeypatch, peak, tried):
    assert fixed_policies(monkeypatch, [(1, peak, 1.0, 1.0)], 12 * MIB) == tried


def test_of_fixed_policies_those_that_should_fit_are_tried_first_and_those_that_hardly_do_last(monkeypatch):
    found = [
        (1, 1, 1.09, 1.2),
        (2, 1, 1.05, 1.1),
        (3, 1, 0.9, 1.1),
        (4, 1, 0.95, 1.1),
        (5, 1, 1.2, 0.5),
        (9, 1, 0.5, 0.5),
    ]
    tries = functools.partial(fixed_policies, monkeypatch, found, 1000, 9)
    assert tries() == [3, 4, 2, 1]  # 5 is predicted to take far too much, 9 is no faster
    assert tries(compiles=3) == [3, 4, 2]
    assert fixed_policies(monkeypatch, found, 1000) == [3, 4, 9]  # the first that fits


def test_what_was_learned_from_a_compile_holds_for_fixed_policies_too(monkeypatch):
    found = [(1, 1, 1.2, 1.0), (2, 1, 1.05, 1.0)]  # predicted to take so much more than they do
    assert fixed_policies(monkeypatch, found, 1000, 9) == [2]
    assert fixed_policies(monkeypatch, found, 1000, 9, learned=-200) == [1]


@pytest.mark.parametrize("names", [["model"], ["simple", "model"], ["simple", "grouped", "model"]])
@pytest.mark.parametrize("helps", [False, True])
def test_no_more_is_compiled_than_promised(monkeypatch, names, helps):
    """Whether a fixed policy is tried or not, and whatever plans may do; nothing fits."""
    planner, budget = make.Planner(loss, SHAPES), 1000
    monkeypatch.setattr(planner, "applied", lambda path: path)
    result = types.SimpleNamespace(device_bytes=2 * budget)
    monkeypatch.setattr(planner, "_measure", lambda path: seen.append(path) or result)
    monkeypatch.setattr(make.Planner, "offset", 0)
    monkeypatch.setattr(make.Planner, "before", types.SimpleNamespace(device_bytes=2 * budget))
    known = []
    for name in names:
        path = functools.cache(lambda at, name=name: (name, at))
        frontier = types.SimpleNamespace(peaks=range(50), ticks=range(50)[::-1], path=path)
        known.append(types.SimpleNamespace(frontier=frontier, segments=lambda path: path))
    monkeypatch.setattr(make.Planner, "models", known)
    monkeypatch.setattr(make.Planner, "model", known[-1])
    monkeypatch.setattr(planner, "predicted", lambda path: 100 + path[1])
    fixed = [types.SimpleNamespace(path=Fixed(("fixed", n))) for n in range(9)] if helps else []
    monkeypatch.setattr(make, "baselines", lambda model: fixed)
    seen: list = []
    with pytest.raises(nj.Infeasible, match="is too small"):
        planner.plan(budget)
    assert len(seen) == len(set(seen)) <= loop.COMPILES - 1
    assert len(seen) == loop.COMPILES - 1 or not helps
    assert all((name, 0) in seen for name in names)
    assert any(name == "fixed" for name, _ in seen) is helps


def test_a_planner_spends_no_compile_on_what_saves_a_thousandth_of_the_cost(monkeypatch):
    planner, asked = make.Planner(loss, SHAPES), []
    paths = [types.SimpleNamespace(at=at) for at in range(4)]
    frontier = types.SimpleNamespace(peaks=range(4), ticks=[10**6, 10**6 - 1, 10**6 - 2, 50], path=paths.__getitem__)
    monkeypatch.setattr(make.Planner, "model", types.SimpleNamespace(segments=lambda path: path.at))
    monkeypatch.setattr(make.Planner, "offset", 75)  # which the first compile shows to be wrong
    monkeypatch.setattr(planner, "predicted", lambda path: (10, 20, 30, 500)[path.at])
    result = lambda path: types.SimpleNamespace(device_bytes=planner.predicted(path))
    monkeypatch.setattr(planner, "measured", lambda path: asked.append(path.at) or result(path))
    planner._along(frontier, 100, 4)
    assert asked == [1]


class Fixed(tuple):
    """A path of a fixed policy: (name, ticks)."""

    peak = 0

    @property
    def ticks(self):
        return self[1]


def test_of_all_that_was_compiled_the_fastest_that_fits_is_the_plan(monkeypatch):
    planner = make.Planner(loss, SHAPES)
    sizes = {1: 10 * MIB, 5: 6 * MIB, 9: 4 * MIB}  # by ticks; other budgets had them compiled
    paths = {ticks: types.SimpleNamespace(ticks=ticks) for ticks in sizes}
    monkeypatch.setattr(planner, "compiled", lambda: [(paths[ticks], nbytes) for ticks, nbytes in sizes.items()])
    assert [planner._best(n * MIB) for n in (12, 10, 9, 5, 3)] == [paths[1], paths[1], paths[5], paths[9], None]
