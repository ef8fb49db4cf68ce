"""Policies as data: the grammar, what it means, and what a broken file is told."""

import dataclasses
import pickle
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from checks import assert_close, total
from hypothesis import given, settings
from hypothesis import strategies as st
from models import GPT, linen_loss

import nexus_jax as nj
from nexus_jax.flops import count_matmuls
from nexus_jax.policy.select import ModuleNode, check_selection, select

TOKENS = jnp.arange(32).reshape(2, 16) % 64
NAMES = (
    "all",
    "alternate",
    "attention",
    "auto",
    "dots_with_no_batch_dims_saveable",
    "heavy_ops",
    "heavy_ops_offload",
    "matmuls",
    "none",
    "offload",
    "offload_dot_with_no_batch_dims",
)

words = st.text("abcXYZ_.*", min_size=1, max_size=8).filter(lambda s: not s.startswith("*") and "**" not in s)
names = st.one_of(words, st.lists(words, min_size=1, max_size=3).map(tuple))
checkpoint_rules = st.builds(
    nj.CheckpointRule,
    type=words,
    path=st.none() | words,
    min_params=st.none() | st.integers(0, 10**9),
    layers=st.none() | st.sampled_from(["::", "::2", "1::2", "-4:", ":3"]),
    depth=st.none() | st.integers(0, 5),
    family=st.none() | st.booleans(),
    fallback=st.booleans(),
)
residual_rules = st.builds(
    nj.ResidualRule,
    place=st.sampled_from(["save", "recompute", "offload"]),
    op=st.none() | names,
    batch_dims=st.none() | st.booleans(),
    weight=st.none() | st.booleans(),
    feeds=st.none() | st.just("weight"),
    name=st.none() | names,
    min_mb=st.none() | st.floats(0, 1e6),
    dtype=st.none() | names,
)
policies = st.builds(
    nj.Policy,
    name=st.just("mine"),
    summary=st.text(max_size=20),
    checkpoint=st.lists(checkpoint_rules, max_size=3).map(tuple),
    residual=st.lists(residual_rules, max_size=3).map(tuple),
)


@settings(deadline=None)
@given(policies)
def test_a_policy_survives_its_file_its_repr_and_pickle(tmp_path_factory, policy):
    path = tmp_path_factory.mktemp("p") / "mine.toml"
    policy.save(path)
    assert nj.load_policy(path) == policy
    assert eval(repr(policy), vars(nj)) == policy
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert hash(policy) == hash(nj.load_policy(path))


def test_shipped_policies():
    assert nj.available_policies() == NAMES
    for name in NAMES:
        policy = nj.load_policy(name)
        assert policy.name == name and policy.summary and not policy.strict
        assert policy.summary in str(policy)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("summary = x", r"p\.toml: not valid TOML: .*line 1"),
        ("sumary = 'x'", r"p\.toml:1: unknown key 'sumary'"),
        ("summary = 3", r"p\.toml:1: summary=3: write a string"),
        ("[checkpoint]\ntype = 'A'", r"p\.toml:1: write \[\[checkpoint\]\] with two brackets"),
        ("\n[[checkpoint]]\ntyp = 'A'", r"p\.toml:3: unknown key 'typ' in \[\[checkpoint\]\]; it has depth"),
        ("[[checkpoint]]\n", r"p\.toml:1: in \[\[checkpoint\]\]: a checkpoint rule needs a condition"),
        ("[[checkpoint]]\ntype = '('", r"p\.toml:2: in \[\[checkpoint\]\]: type='\(' does not compile"),
        ("[[checkpoint]]\nlayers = '2'", r"p\.toml:2: .*layers='2': write a slice"),
        ("[[checkpoint]]\nmin_params = -1", r"p\.toml:2: .*min_params=-1: write a whole number"),
        ("[[checkpoint]]\ntype='A'\n\n[[checkpoint]]\nmin_params = 1.5", r"p\.toml:5: .*min_params=1\.5"),
        ("[[residual]]\nplace = 'sav'", r"p\.toml:2: .*place='sav': write one of save, recompute, offload"),
        ("[[residual]]\nop = 'dot_general'", r"p\.toml:1: .*place"),
        ("[[residual]]\nplace='save'\nfeeds = 'x'", r"p\.toml:3: .*feeds='x': write \"weight\""),
        ("[[residual]]\nplace='save'\nmin_mb = nan", r"p\.toml:3: .*min_mb=nan"),
        ("[[residual]]\nplace='save'\nop = []", r"p\.toml:3: .*op=\(\): write a name"),
    ],
)
def test_a_broken_file_names_file_line_and_key(tmp_path, text, match):
    (tmp_path / "p.toml").write_text(text)
    with pytest.raises(ValueError, match=match):
        nj.load_policy(tmp_path / "p.toml")


def test_unknown_names_and_missing_files(tmp_path):
    with pytest.raises(
        ValueError, match=r"no policy is called 'heavy'; the choices are all, alternate, attention, auto, .*heavy_ops"
    ):
        nj.load_policy("heavy")
    with pytest.raises(FileNotFoundError, match=r"none\.toml"):
        nj.load_policy(tmp_path / "none.toml")


def test_a_function_cannot_be_written(tmp_path):
    config = nj.SelectiveCheckpointConfig(policy="custom", custom_policy=lambda m: True)
    with pytest.raises(ValueError, match="cannot be written to a file"):
        config.resolve().save(tmp_path / "p.toml")


def test_a_users_file_end_to_end(tmp_path):
    path = tmp_path / "mlp.toml"
    path.write_text(
        'summary = "mine"\n[[checkpoint]]\npath = "blocks_[12]/attn"\n'
        '[[residual]]\nop = "dot_general"\nbatch_dims = false\nplace = "save"\n'
    )
    model = GPT()
    params = model.init(jax.random.key(0), TOKENS)
    ours = nj.apply_selective_checkpointing(model, str(path))
    kept = nj.residuals(linen_loss(ours, TOKENS), params)
    assert nj.policy_of(ours).selection.boundaries == {("blocks_1", "attn"), ("blocks_2", "attn")}
    assert kept.nbytes < nj.residuals(linen_loss(model, TOKENS), params).nbytes
    inside = [r for r in kept if "blocks_1/attn" in r.path]
    assert len(inside) == 3 and all(r.op == "dot_general" for r in inside)  # q, k, v


@pytest.mark.parametrize(
    ("rule", "match"),
    [
        ({"path": "block_0"}, r"\[path='block_0'\] matches no module. The closest paths are blocks_0"),
        ({"type": "Attenton"}, r"\[type='Attenton'\] matches no module.*closest types are Attention"),
        ({"min_params": 10**9}, r"min_params=1000000000"),
    ],
)
def test_a_rule_that_matches_nothing_lists_the_closest(rule, match):
    policy = nj.Policy(checkpoint=(nj.CheckpointRule(**rule),))
    model = nj.apply_selective_checkpointing(GPT(), policy)
    with pytest.raises(ValueError, match=match):
        model.init(jax.random.key(0), TOKENS)


def attention(params, x):
    q, k = x @ params["q"], x @ params["k"]
    scores = jnp.tanh(jnp.einsum("bqd,bkd->bqk", q, k))
    return jnp.sin(jnp.einsum("bqk,bkd->bqd", scores, x)) @ params["o"]


PARAMS = {n: jnp.eye(8) * 0.5 for n in "qko"}
DATA = jnp.linspace(0, 1, 2 * 4 * 8).reshape(2, 4, 8)


@pytest.mark.parametrize("name", NAMES)
def test_directly_as_a_policy_of_jax_checkpoint(name):
    plain = lambda p, x: total(attention(p, x))
    ours = lambda p, x: total(jax.checkpoint(attention, policy=nj.load_policy(name))(p, x))
    assert_close(jax.grad(plain)(PARAMS, DATA), jax.grad(ours)(PARAMS, DATA))
    found, before = nj.residuals(ours, PARAMS, DATA), nj.residuals(plain, PARAMS, DATA)
    matmuls = count_matmuls(jax.grad(ours), PARAMS, DATA) - count_matmuls(jax.grad(plain), PARAMS, DATA)
    if name == "none":
        assert found.nbytes == before.nbytes and matmuls == 0
    else:
        assert found.nbytes < before.nbytes and matmuls > 0
    if name == "heavy_ops":  # saved: q and k, without batch dimensions; recomputed: scores and context
        assert matmuls == 2 and [r.op for r in found if r.shape == (2, 4, 8)].count("dot_general") == 2


def test_directly_offloading():
    policy = nj.checkpoint_policies.offload(min_mb=0.0)
    f = lambda p, x: total(jax.checkpoint(attention, policy=policy)(p, x))
    assert nj.residuals(f, PARAMS, DATA).host_bytes > 0
    small = lambda p, x: total(jax.checkpoint(attention, policy=nj.checkpoint_policies.offload())(p, x))
    assert nj.residuals(small, PARAMS, DATA).host_bytes == 0
    assert_close(jax.grad(f)(PARAMS, DATA), jax.grad(lambda p, x: total(attention(p, x)))(PARAMS, DATA))


def test_in_nn_remat():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.tanh(nn.Dense(8)(jnp.sin(nn.Dense(8)(x))))

    loss = lambda cls: lambda p: total(cls().apply(p, DATA))
    params = Layer().init(jax.random.key(0), DATA)
    heavy, full = (nn.remat(Layer, policy=p) for p in (nj.checkpoint_policies.heavy_ops, None))
    sizes = [nj.residuals(loss(c), params).nbytes for c in (Layer, heavy, full)]
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        ({"name": "mine"}, 1),
        ({"op": "tanh"}, 1),
        ({"dtype": "bfloat16"}, 2),
        ({"op": "dot_general", "min_mb": 1.0}, 0),
        ({"op": "dot_general", "batch_dims": True}, 0),
        ({"op": "dot_general", "weight": True}, 2),
    ],
    ids=str,
)
def test_residual_rules_inside_a_boundary(rule, kept):
    from jax.ad_checkpoint import checkpoint_name

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = checkpoint_name(jnp.sin(nn.Dense(8)(x)), "mine")
            y = (jnp.cos(y.astype(jnp.bfloat16)) * 2).astype(jnp.float32)
            return jnp.sin(jnp.tanh(jnp.exp(nn.Dense(8)(y))))

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Layer(name="layer")(x)

    policy = nj.Policy(checkpoint=(nj.CheckpointRule(path="layer"),), residual=(nj.ResidualRule(place="save", **rule),))
    params = Model().init(jax.random.key(0), DATA)
    ours = nj.apply_selective_checkpointing(Model(), policy)
    loss = lambda m: lambda p: total(m.apply(p, DATA))
    inside = [r for r in nj.residuals(loss(ours), params) if "layer" in r.path]
    assert len(inside) == kept, inside
    assert_close(jax.grad(loss(Model()))(params), jax.grad(loss(ours))(params))


# --- choosing boundaries, without a model ---------------------------------------------------------------------------

classes = st.sampled_from(["Block", "Attention", "MLP"])
trees = st.lists(
    st.tuples(st.lists(st.sampled_from("abc012"), min_size=1, max_size=4).map(tuple), classes, st.integers(0, 3)),
    max_size=20,
    unique_by=lambda t: t[0],
).map(lambda ts: [ModuleNode(path=p, type=c, params=(("w", (n,), "f4"),), size=n) for p, c, n in ts])


@settings(deadline=None)
@given(trees, policies)
def test_boundaries_never_nest_and_are_outermost(nodes, policy):
    chosen = select(policy, nodes).boundaries
    assert chosen <= {n.path for n in nodes}
    for path in chosen:
        assert not any(path[:i] in chosen for i in range(1, len(path)))
    assert select(policy, nodes) == select(policy, list(nodes))


@settings(deadline=None)
@given(st.integers(2, 30))
def test_alternate_takes_half_of_each_family_by_itself(n):
    nodes = [
        ModuleNode(path=(f"{family}_{i}",), type="Block", params=(("w", (k,), "f4"),), size=k)
        for k, family in ((3, "enc"), (5, "dec"))
        for i in range(n)
    ]
    chosen = select(nj.load_policy("alternate"), nodes).boundaries
    assert chosen == {(f"{family}_{i}",) for family in ("enc", "dec") for i in range(0, n, 2)}


def test_alternate_leaves_a_layer_alone_as_a_whole():
    """Self- and cross-attention have the same shapes; inside a decoder layer they are no layers of their own."""
    size, attention = 8, (("w", (2,), "f4"),)
    nodes = []
    for i in range(4):
        nodes.append(ModuleNode(path=(f"dec_{i}",), type="Decoder", params=(("w", (size,), "f4"),), size=size))
        for kind in ("self", "cross"):
            nodes.append(ModuleNode(path=(f"dec_{i}", kind), type="Attention", params=attention, size=2))
    assert select(nj.load_policy("alternate"), nodes).boundaries == {("dec_0",), ("dec_2",)}
    by_type = nj.Policy(checkpoint=(nj.CheckpointRule(type="Attention", layers="::2"),))
    assert select(by_type, nodes).boundaries == {(f"dec_{i}", "self") for i in range(4)}


def test_auto_takes_layers_and_large_modules_outside_families():
    big, small = (("w", (2_000_000,), "f4"),), (("w", (10,), "f4"),)
    nodes = [
        ModuleNode(path=("encoder",), type="Encoder", params=big * 3, size=6_000_000),
        *(ModuleNode(path=("encoder", f"b_{i}"), type="Block", params=big, size=2_000_000) for i in range(2)),
        ModuleNode(path=("decoder",), type="Decoder", params=big, size=2_000_000),
        ModuleNode(path=("decoder", "inner"), type="Inner", params=big, size=2_000_000),
        ModuleNode(path=("tiny",), type="Tiny", params=small, size=10),
    ]
    chosen = select(nj.load_policy("auto"), nodes).boundaries
    assert chosen == {("encoder", "b_0"), ("encoder", "b_1"), ("decoder",)}


def test_a_documented_policy_that_selects_nothing_says_what_would():
    nodes = [ModuleNode(path=("mlp",), type="MLP", params=(("w", (10,), "f4"),), size=10)]
    policy = nj.load_policy("auto")
    with pytest.warns(
        UserWarning,
        match=r"checkpoints nothing in this model.*mlp \(MLP, 10 parameters\).*auto_wrap_min_params",
    ):
        check_selection(policy, select(policy, nodes), nodes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_selection(nj.load_policy("none"), select(nj.load_policy("none"), nodes), nodes)


def test_policies_are_values():
    policy = nj.load_policy("heavy_ops")
    assert policy == nj.load_policy("heavy_ops") and len({policy, nj.load_policy("heavy_ops")}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign"):
        policy.name = "x"
