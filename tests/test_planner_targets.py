"""Plans for devices that are not there: they fit as compiled by the targets' own compilers."""

import jax
import jax.numpy as jnp
import models
import pytest
from checks import needs

import nexus_jax as nj
from nexus_jax.planner import Infeasible, Planner, groups, loop


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("NEXUS_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "planner-targets"))


def workload(make, policy="none", d=256, batch=8, **kwargs):
    net = make(d=d, heads=4, vocab=1024, **kwargs)
    net = net if policy == "none" else nj.apply_selective_checkpointing(net, policy)
    tokens = jax.ShapeDtypeStruct((batch, 512), jnp.int32)
    params = jax.eval_shape(net.init, jax.random.key(0), tokens)
    return (lambda p, t: models.loss_of(net.apply(p, t), t)), (params, tokens)


@pytest.mark.parametrize(("target", "shares"), [("v5e", [0.7]), ("h200", [0.6, 0.8])])
def test_the_compiled_step_fits_and_no_policy_at_hand_is_better(target, shares):
    needs(target)
    fn, args = workload(models.GPT, layers=3, dtype=jnp.bfloat16)
    planner = Planner(fn, args, target=target, objective="flops")
    plain = planner.before
    plans = []
    for share in shares:
        budget = int(share * plain.device_bytes)
        plan = planner.plan(budget)
        measured = nj.measure(plan.apply(fn), *args, target=target)
        assert measured.device_bytes == plan.device_bytes <= budget < plan.unplanned_bytes == plain.device_bytes
        assert measured.flops - plain.flops == plan.extra_flops > 0
        assert len(plan.trials) < loop.COMPILES
        plans.append(plan)
    assert [p.extra_flops for p in plans] == sorted((p.extra_flops for p in plans), reverse=True)
    for policy in ("all", "heavy_ops"):
        ours, own = workload(models.GPT, policy, layers=3, dtype=jnp.bfloat16)
        fixed = nj.measure(ours, *own, target=target)
        for plan in plans:
            if fixed.device_bytes <= plan.budget:
                assert plan.extra_flops < fixed.flops - plain.flops


def test_with_a_host_less_is_made_again():
    target = "h200"
    needs(target)
    fn, args = workload(models.GPT, layers=3, dtype=jnp.bfloat16, d=2048, batch=32)
    alone, both = (Planner(fn, args, target=target, host_budget=host) for host in (0, "1GiB"))
    budget = int(0.45 * alone.before.device_bytes)
    without, plan = alone.plan(budget), both.plan(budget)
    moved = both.path_of(plan).host
    assert without.host_bytes == 0 < moved == plan.host_bytes <= 2**30
    assert plan.device_bytes <= budget
    assert plan.extra_flops < without.extra_flops
    assert nj.measure(plan.apply(fn), *args, target=target).host_bytes == moved
    assert "offload" in str(plan)


def test_a_model_with_a_budget_and_a_host_offloads():
    target = "h200"
    needs(target)
    net = models.GPT(d=2048, heads=4, vocab=1024, layers=2, dtype=jnp.bfloat16)
    tokens = jax.ShapeDtypeStruct((32, 512), jnp.int32)
    params = jax.eval_shape(net.init, jax.random.key(0), tokens)
    step = lambda m: lambda p, t: jnp.sum(m.apply(p, t).astype(jnp.float32) ** 2)
    budget = int(0.5 * nj.measure(step(net), params, tokens, target=target).device_bytes)
    config = nj.SelectiveCheckpointConfig(memory_budget=budget, target=target, host_budget="1GiB")
    model = nj.apply_selective_checkpointing(net, config)
    found = nj.measure(step(model), params, tokens, target=target)
    [made] = nj.policy_of(model).plans
    assert 0 < made.host_bytes == found.host_bytes <= 2**30
    assert max(made.device_bytes, found.device_bytes) <= budget


def test_the_smallest_budget_named_is_enough():
    needs("h200")
    fn, args = workload(models.GPT, layers=3, dtype=jnp.bfloat16)
    planner = Planner(fn, args, target="h200", objective="flops")
    with pytest.raises(Infeasible, match="is too small on h200: the step takes") as error:
        planner.plan(planner.before.device_bytes // 20)
    assert planner.plan(error.value.smallest).device_bytes <= error.value.smallest


def test_where_nothing_can_be_saved_the_step_as_it_is_is_named():
    def loss(w, x):
        return jnp.sum(x @ w)

    shapes = jax.ShapeDtypeStruct((64, 64), jnp.float32), jax.ShapeDtypeStruct((32, 64), jnp.float32)
    with pytest.raises(Infeasible, match="as it is and no plan takes less") as error:
        nj.plan(loss, *shapes, memory_budget=100)
    assert nj.plan(loss, *shapes, memory_budget=error.value.smallest).does_nothing


def test_a_scan_over_layers_fits_too(monkeypatch):
    needs("v5e")
    monkeypatch.setattr(groups, "_MOST", 1)  # each plan of several steps at once is a long compile more
    fn, args = workload(models.ScannedGPT, layers=4)
    planner = Planner(fn, args, target="v5e", objective="flops")
    budget = planner.before.device_bytes // 2
    plan = planner.plan(budget)
    assert any(s.inside for s in plan.segments)
    assert nj.measure(plan.apply(fn), *args, target="v5e").device_bytes == plan.device_bytes <= budget
    ours, own = workload(models.ScannedGPT, "all", layers=4)
    everything = nj.measure(ours, *own, target="v5e").flops - planner.before.flops
    assert 0 < plan.extra_flops < 0.8 * everything
