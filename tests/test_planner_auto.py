"""AUTO with a memory budget, and plans as policies of a model."""

import jax
import jax.numpy as jnp
import models
import pytest
from checks import assert_close, unfused
from flax import linen as nn
from flax import nnx

import nexus_jax as nj
from nexus_jax.boundary import planned
from nexus_jax.flops import count_matmuls
from nexus_jax.planner import Budget, auto
from nexus_jax.planner.make import draft

frees = pytest.mark.skipif(
    jax.__version_info__ < (0, 11),
    reason="XLA's CPU compiler of jax 0.10 frees nothing under remat: no plan fits there",
)
TOKENS = jax.random.randint(jax.random.key(1), (8, 64), 0, 64)


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("NEXUS_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "planner-auto"))


class Leanest:
    """The plan of least memory in the planner's model, without a compile; says what it was asked."""

    def __init__(self):
        self.calls, self.plans = [], []

    def program(self, call):
        self.calls.append(call)
        planner = auto.CallPlanner(call, None)
        self.plans.append(draft(planner.subject, planner.model.segments(planner.model.frontier.path(0))))
        return self.plans[-1].program(call)

    def document(self):
        return {"leanest": True}


def policy(whole):
    return nj.Policy(name="test", whole=whole)


class Norm(nn.Module):
    """Statistics that change, dropout, a value that is sown into the loss, and a flag."""

    @nn.compact
    def __call__(self, x, train):
        for i in range(4):
            x = jnp.sin(nn.Dense(32, name=f"dense_{i}")(x))
            x = nn.BatchNorm(use_running_average=not train)(x)
            x = nn.Dropout(0.5, deterministic=not train)(x)
        self.sow("losses", "penalty", jnp.mean(x**4))
        return x


def norm_loss(model, rest, x):
    def loss(params):
        keys = {"dropout": jax.random.key(5)}
        y, state = model.apply({"params": params, **rest}, x, True, rngs=keys, mutable=["batch_stats", "losses"])
        return jnp.mean(y**2) + state["losses"]["penalty"][0], state

    return loss


def test_state_streams_and_sown_values_are_those_of_the_plain_model():
    x = jax.random.normal(jax.random.key(0), (64, 16))
    plain, whole = Norm(), Leanest()
    model = nj.apply_selective_checkpointing(plain, policy(whole))
    variables = plain.init(jax.random.key(2), x, False)
    assert_close(variables, model.init(jax.random.key(2), x, False), 0)
    params, rest = variables["params"], {"batch_stats": variables["batch_stats"]}
    given = [norm_loss(m, rest, x) for m in (plain, model)]
    before, after = (unfused(jax.value_and_grad(loss, has_aux=True), params) for loss in given)
    assert_close(before, after, 1e-5)
    assert {len(c.differentiated) for c in whole.calls} == {len(jax.tree.leaves(params))}  # and no statistics
    bytes_of = [nj.residuals(lambda p, loss=loss: loss(p)[0], params).nbytes for loss in given]
    assert bytes_of[1] < 0.7 * bytes_of[0]


def test_who_is_not_differentiated_is_not_planned():
    x = jnp.ones((64, 16))
    whole = Leanest()
    model = nj.apply_selective_checkpointing(Norm(), policy(whole))
    variables = model.init(jax.random.key(2), x, False)
    jax.jit(lambda v: model.apply(v, x, False))(variables)
    assert not whole.calls


def test_a_warm_cache_of_the_plain_model_hides_nothing():
    plain, whole = models.GPT(layers=2), Leanest()
    params = plain.init(jax.random.key(0), TOKENS)
    step = jax.jit(jax.value_and_grad(lambda p, m: models.loss_of(m.apply(p, TOKENS), TOKENS)), static_argnums=1)
    before = step(params, plain)
    assert_close(before, step(params, nj.apply_selective_checkpointing(plain, policy(whole))), 1e-5)
    assert whole.calls


def test_forward_mode_and_second_derivatives():
    plain, whole = models.GPT(layers=1, d=8, heads=2, vocab=16), Leanest()
    tokens = TOKENS[:2, :8] % 16
    params = plain.init(jax.random.key(0), tokens)
    losses = [models.linen_loss(m, tokens) for m in (plain, nj.apply_selective_checkpointing(plain, policy(whole)))]
    forward = [unfused(lambda p, loss=loss: jax.jvp(loss, (p,), (p,)), params) for loss in losses]
    assert_close(*forward, 1e-5)
    product = lambda loss: lambda p: jax.jvp(jax.grad(loss), (p,), (p,))[1]
    assert_close(*(unfused(product(loss), params) for loss in losses), 1e-4)


def test_nnx_models_and_their_streams():
    plain, whole = models.NNXGPT(layers=3, length=64, dropout=0.3, rngs=nnx.Rngs(0)), Leanest()
    model = nj.apply_selective_checkpointing(plain, policy(whole))
    loss = lambda m: models.loss_of(m(TOKENS), TOKENS)
    for _ in range(2):  # the second time with streams that went on
        before, after = (nnx.jit(nnx.value_and_grad(loss))(m) for m in (plain, model))
        assert_close(before[0], after[0], 1e-5)
        assert_close(nnx.to_pure_dict(before[1]), nnx.to_pure_dict(after[1]), 1e-5)
    counts = [nnx.to_pure_dict(nnx.state(m, nnx.RngCount)) for m in (plain, model)]
    assert_close(*counts, 0)
    assert whole.calls
    assert nj.residuals(loss, model).nbytes < 0.7 * nj.residuals(loss, plain).nbytes


def test_a_plan_as_a_file_gives_the_same_residuals(tmp_path):
    plain, whole = models.GPT(layers=3), Leanest()
    params = plain.init(jax.random.key(0), TOKENS)
    loss = models.linen_loss(nj.apply_selective_checkpointing(plain, policy(whole)), TOKENS)
    kept = sorted((r.shape, r.op, r.nbytes) for r in nj.residuals(loss, params))
    count = count_matmuls(jax.grad(loss), params)
    assert count > count_matmuls(jax.grad(models.linen_loss(plain, TOKENS)), params)
    [made] = set(whole.plans)
    made.save(tmp_path / "plan.toml")
    nj.load_policy(tmp_path / "plan.toml").save(tmp_path / "again.toml")
    assert nj.load_policy(tmp_path / "again.toml").whole == made
    for given in (made, str(tmp_path / "plan.toml"), nj.load_policy(tmp_path / "again.toml")):
        again = models.linen_loss(nj.apply_selective_checkpointing(plain, given), TOKENS)
        assert sorted((r.shape, r.op, r.nbytes) for r in nj.residuals(again, params)) == kept
        assert count_matmuls(jax.grad(again), params) == count


def test_a_plan_for_another_model_says_what_differs():
    small, large = models.GPT(layers=1, vocab=16), models.GPT(layers=2, vocab=16)
    whole, tokens = Leanest(), TOKENS % 16
    grad = lambda m: jax.grad(models.linen_loss(m, tokens))
    params = [m.init(jax.random.key(0), tokens) for m in (small, large)]
    jax.make_jaxpr(grad(nj.apply_selective_checkpointing(small, policy(whole))))(params[0])
    model = nj.apply_selective_checkpointing(large, whole.plans[0])
    model.apply(params[1], tokens)  # not differentiated: nothing to plan
    with pytest.raises(nj.PlanMismatch, match=r"GPT: .* takes 37 arrays, planned for 21.*plan\.apply\(loss\)"):
        jax.make_jaxpr(grad(model))(params[1])


@frees
def test_auto_with_a_budget_fits_it_and_is_kept(monkeypatch, tmp_path):
    plain = models.GPT(layers=2)
    params = plain.init(jax.random.key(0), TOKENS)
    step = lambda m: lambda p: jnp.sum(m.apply(p, TOKENS).astype(jnp.float32) ** 2)  # as the planner's stand-in
    before = nj.measure(step(plain), params)
    budget = int(0.75 * before.device_bytes)
    config = nj.SelectiveCheckpointConfig(memory_budget=budget)
    model = nj.apply_selective_checkpointing(plain, config)
    assert "once the model is first differentiated" in str(nj.policy_of(model))
    assert nj.measure(step(model), params).device_bytes <= 1.01 * budget < before.device_bytes
    assert_close(*(unfused(jax.value_and_grad(step(m)), params) for m in (plain, model)), 1e-5)
    [made] = nj.policy_of(model).plans
    assert made.device_bytes <= budget
    assert str(made) in str(nj.policy_of(model))
    auto._MADE.clear()
    monkeypatch.setattr(auto.CallPlanner, "plan", lambda *_: pytest.fail("planned again"))
    jax.make_jaxpr(jax.grad(step(model)))(params)  # read from the disk
    assert nj.policy_of(model).plans == (made,)
    made.save(tmp_path / "plan.toml")
    again = nj.apply_selective_checkpointing(plain, str(tmp_path / "plan.toml"))
    text = lambda m: [(r.shape, r.op) for r in nj.residuals(step(m), params)]
    assert text(again) == text(model) != text(plain)


@frees
def test_a_budget_too_small_names_the_model_and_what_is_enough():
    plain = models.GPT(layers=2)
    params = plain.init(jax.random.key(0), TOKENS)
    model = nj.apply_selective_checkpointing(plain, nj.SelectiveCheckpointConfig(memory_budget="10kB"))
    with pytest.raises(nj.Infeasible, match="GPT, its call and gradient") as error:
        jax.jit(jax.grad(models.linen_loss(model, TOKENS)))(params)
    enough = nj.apply_selective_checkpointing(plain, nj.SelectiveCheckpointConfig(memory_budget=error.value.smallest))
    jax.make_jaxpr(jax.grad(models.linen_loss(enough, TOKENS)))(params)
    assert nj.policy_of(enough).plans[0].device_bytes <= error.value.smallest


def test_a_budget_as_a_file(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('summary = "Half of a v5e."\nmemory_budget = "50%"\ntarget = "v5e"\n')
    found = nj.load_policy(file)
    assert found.whole == Budget(memory_budget="50%", target="v5e")
    found.save(tmp_path / "copy.toml")
    assert nj.load_policy(tmp_path / "copy.toml").whole == found.whole
    assert hash(found) == hash(nj.load_policy(file))
    assert "memory_budget='50%'" in str(found)
    file.write_text('memory_budget = "50%"\ntarget = "v5e"\nhost_budget = "48GiB"\n')
    found = nj.load_policy(file)
    assert found.whole == Budget(
        memory_budget="50%", target="v5e", host_budget="48GiB"
    ) and "host_budget='48GiB'" in str(found)
    config = nj.SelectiveCheckpointConfig(memory_budget="50%", target="v5e", host_budget="48GiB")
    assert config.resolve().whole == found.whole


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('memory_budget = "a lot"', "is no size"),
        ("memory_budget = -1", "more than 0 bytes"),
        ('memory_budget = "90%"\ntarget = "v9"', "v9"),
        ('memory_budget = "90%"\ntype = "x"', "not type"),
        ('memory_budget = "1TiB"\ntarget = "v5e"', "a program may take"),
        ('memory_budget = "90%"\ntarget = "v5e"\nhost_budget = -1', "0 bytes or more"),
        ("nexus_jax_plan = 7", "no plan of this version"),
    ],
)
def test_files_of_nonsense(tmp_path, text, said):
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(ValueError, match=said) as error:
        nj.load_policy(tmp_path / "bad.toml")
    assert "bad.toml" in str(error.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"memory_budget": "a lot"}, "is no size"),
        ({"memory_budget": 0}, "more than 0 bytes"),
        ({"memory_budget": True}, "whole number"),
        ({"memory_budget": "90%", "target": "v9"}, "v9"),
        ({"memory_budget": "90%", "policy": "all"}, 'policy="auto"'),
        ({"target": "v5e"}, "memory_budget"),
        ({"host_budget": "1GiB"}, "goes with a memory_budget"),
        ({"memory_budget": "90%", "target": "v5e", "host_budget": "all of it"}, "host_budget.* is no size"),
        ({"memory_budget": "1GiB", "host_budget": "1GiB"}, "reaches its host is not known"),
    ],
)
def test_configurations_of_nonsense(given, said):
    with pytest.raises((ValueError, TypeError), match=said):
        nj.SelectiveCheckpointConfig(**given)


def test_what_cannot_be_planned_says_so():
    with pytest.raises(ValueError, match="apply_selective_checkpointing"):
        nj.SelectiveCheckpoint(memory_budget="1GiB")
    with pytest.raises(ValueError, match="apply_selective_checkpointing"):
        jax.make_jaxpr(jax.grad(jax.checkpoint(jnp.sin, policy=policy(Budget(memory_budget="1GiB")))))(1.0)
    with pytest.raises(ValueError, match="not both"):
        nj.Policy(whole=Budget(memory_budget=1), checkpoint=nj.load_policy("all").checkpoint)


@pytest.mark.parametrize("model", [lambda w, x: (jax.lax.psum(x @ w, "data"), ()), lambda w, x: (jnp.sin(x @ w), ())])
def test_one_device_of_several_is_refused(model):
    run = planned(Budget(memory_budget="1GiB"), nn.Dense)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss(w, x):
        y, _ = run(model, w, x)
        return jnp.sum(y)

    spec = jax.P("data")
    shard = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=(jax.P(), spec), out_specs=jax.P())
    with pytest.raises(ValueError, match=r"one device, and .*nexus_jax\.plan"):
        jax.make_jaxpr(shard)(jnp.ones((4, 4)), jnp.ones((8, 4)))
