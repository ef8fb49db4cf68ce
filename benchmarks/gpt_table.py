"""The 12-layer GPT of docs/policies.md: what each policy keeps, recomputes, and takes on targets that nobody here owns.

    python benchmarks/gpt_table.py [--targets v5e,h200] [--frameworks linen,nnx] [--out benchmarks/results/gpt.json]

Beside each policy stands the same boundaries written by hand with nn.remat / nnx.remat. Nothing runs: arguments are
abstract and the targets' compilers work without a device.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import pathlib
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import nexus_jax as nj
from nexus_jax import report
from nexus_jax.flops import count_matmuls, matmul_flops
from nexus_jax.targets import compile_for, compiled_bytes

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))
import models

SIZE = dict(layers=12, d=1024, heads=16, vocab=32768, dtype=jnp.bfloat16)
TOKENS = jax.ShapeDtypeStruct((8, 1024), jnp.int32)
POLICIES = ("none", "all", "alternate", "heavy_ops", "offload", "heavy_ops_offload")
KEPT = jax.checkpoint_policies.save_only_these_names("q", "k", "v", "context")


class NamedAttention(models.Attention):
    """The attention with names on what HEAVY_OPS keeps, as one would write it by hand."""

    @nn.compact
    def __call__(self, x):
        d = x.shape[-1]
        heads = (self.heads, d // self.heads)
        dense = lambda n: checkpoint_name(nn.DenseGeneral(heads, dtype=self.dtype, name=n)(x), n)
        context = checkpoint_name(models.attend(dense("q"), dense("k"), dense("v"), self.dtype), "context")
        return nn.DenseGeneral(d, axis=(-2, -1), dtype=self.dtype, name="out")(context)


class HandBlock(models.Block):
    attention: type = nn.remat(NamedAttention, policy=KEPT)


class HandAlternate(models.GPT):
    def make_block(self, i):
        return nn.remat(models.Block, static_argnums=(2,)) if i % 2 == 0 else models.Block


class NNXNamedAttention(models.NNXAttention):
    @nnx.remat(policy=KEPT)
    def __call__(self, x):
        q, k, v = (checkpoint_name(f(x), n) for n, f in (("q", self.q), ("k", self.k), ("v", self.v)))
        return self.out(checkpoint_name(models.attend(q, k, v, self.dtype), "context"))


class NNXHandBlock(models.NNXBlock):
    __call__ = nnx.remat(models.NNXBlock.__call__)


def linen_by_hand(policy):
    match policy:
        case "all":
            return models.GPT(**SIZE, block=nn.remat(models.Block, static_argnums=(2,)))
        case "alternate":
            return HandAlternate(**SIZE)
        case "heavy_ops":
            return models.GPT(**SIZE, block=HandBlock)


def nnx_by_hand(policy, plain):
    model = nnx.clone(plain)
    for i, block in enumerate(model.blocks):
        if policy == "all" or (policy == "alternate" and i % 2 == 0):
            object.__setattr__(block, "__class__", NNXHandBlock)
        if policy == "heavy_ops":
            object.__setattr__(block.attn, "__class__", NNXNamedAttention)
    return model


def linen_program(model):
    """The loss as a function of parameters and tokens, and abstract arguments."""
    params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    return (lambda p, t: models.loss_of(model.apply(p, t), t)), (params, TOKENS)


def nnx_program(model):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(p, rest, tokens):
        # nnx.remat by hand refuses Variables from outside the trace of the gradient: give it new ones
        return models.loss_of(nnx.merge(graphdef, p, jax.tree.map(lambda x: x, rest))(tokens), tokens)

    return loss, (params, rest, TOKENS)


def programs(framework):
    """``(policy, "ours" or "by hand", loss, arguments)`` of every row."""
    if framework == "linen":
        plain = models.GPT(**SIZE)
        for policy in POLICIES:
            yield policy, "ours", *linen_program(nj.apply_selective_checkpointing(plain, policy))
            if policy in ("all", "alternate", "heavy_ops"):
                yield policy, "by hand", *linen_program(linen_by_hand(policy))
    else:
        make = lambda: models.NNXGPT(**SIZE, length=1024, rngs=nnx.Rngs(0))
        plain = nnx.eval_shape(make)
        for policy in POLICIES:
            yield policy, "ours", *nnx_program(nj.apply_selective_checkpointing(plain, policy))
            if policy in ("all", "alternate", "heavy_ops"):
                yield policy, "by hand", *nnx_program(nnx_by_hand(policy, plain))


@dataclasses.dataclass
class Row:
    framework: str
    policy: str
    written: str
    residual_device: int
    residual_host: int
    flops: int
    matmuls: int
    temp: dict[str, int] = dataclasses.field(default_factory=dict)
    host: dict[str, int] = dataclasses.field(default_factory=dict)


def measure(framework, policy, written, loss, args, targets):
    step = jax.value_and_grad(loss)
    kept = nj.residuals(loss, *args)
    row = Row(
        framework,
        policy,
        written,
        kept.device_bytes,
        kept.host_bytes,
        matmul_flops(step, *args),
        count_matmuls(step, *args),
    )
    for target in targets:
        found = compiled_bytes(compile_for(target, step, *args))
        row.temp[target], row.host[target] = found.temp, found.host_temp
    return row


def table(rows, targets):
    base = {r.framework: r for r in rows if r.policy == "none"}
    lines = []
    for r in rows:
        none = base[r.framework]
        line = [r.framework, r.policy, r.written, report.size(r.residual_device), report.size(r.residual_host)]
        line += [f"{r.matmuls - none.matmuls:+d}", f"{r.flops / none.flops:.3f}"]
        for t in targets:
            below = 100 * (1 - r.temp[t] / none.temp[t])
            line += [f"{r.temp[t] / 2**30:.2f} GiB", f"{below:.0f} %", report.size(r.host[t])]
        lines.append(line)
    columns = ["framework", "policy", "written", "residuals", "on the host", "matmuls", "FLOPs"]
    for t in targets:
        columns += [f"{t} temp", "below none", f"{t} host"]
    return report.table("12-layer GPT, value_and_grad", columns, lines, width=200)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default="v5e,h200")
    parser.add_argument("--frameworks", default="linen,nnx")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    targets = [t for t in args.targets.split(",") if t]
    rows = []
    for framework in args.frameworks.split(","):
        for program in programs(framework):
            rows.append(measure(framework, *program, targets))
            print(f"done: {framework} {rows[-1].policy} {rows[-1].written}", file=sys.stderr, flush=True)
    print(table(rows, targets))
    if args.out:
        versions = {n: importlib.metadata.version(n) for n in ("jax", "jaxlib", "flax", "libtpu", "jax-cuda13-pjrt")}
        document = {
            "date": str(datetime.date.today()),
            "versions": versions,
            "rows": [dataclasses.asdict(r) for r in rows],
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
