"""The 12-layer GPT of docs/policies.md: what each policy keeps, recomputes, and takes on targets that nobody here owns.

    python benchmarks/gpt_table.py [--targets v5e,h200] [--frameworks linen,nnx] [--out benchmarks/results]

Beside each policy stands the same boundaries written by hand with nn.remat / nnx.remat. Nothing runs: arguments are
abstract and the targets' compilers work without a device. `nexus-jax compare benchmarks/gpt_table.py:linen` shows any
other policy or target.
"""

import argparse
import datetime
import functools
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
from nexus_jax.flops import count_matmuls

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))
import models

SIZE = dict(d=1024, heads=16, vocab=32768, dtype=jnp.bfloat16)
POLICIES = ("none", "all", "alternate", "attention", "heavy_ops", "matmuls", "offload", "heavy_ops_offload")
BY_HAND = ("all", "alternate", "heavy_ops")
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


def _tokens(batch, length):
    return jax.ShapeDtypeStruct((batch, length), jnp.int32)


def linen_model(policy, layers, by_hand=False):
    plain = models.GPT(**SIZE, layers=layers)
    match policy if by_hand else None:
        case "all":
            return models.GPT(**SIZE, layers=layers, block=nn.remat(models.Block, static_argnums=(2,)))
        case "alternate":
            return HandAlternate(**SIZE, layers=layers)
        case "heavy_ops":
            return models.GPT(**SIZE, layers=layers, block=HandBlock)
    return nj.apply_selective_checkpointing(plain, policy)


def nnx_model(policy, layers, length, by_hand=False):
    plain = nnx.eval_shape(lambda: models.NNXGPT(**SIZE, layers=layers, length=length, rngs=nnx.Rngs(0)))
    if not by_hand:
        return nj.apply_selective_checkpointing(plain, policy)
    for i, block in enumerate(plain.blocks):
        if policy == "all" or (policy == "alternate" and i % 2 == 0):
            object.__setattr__(block, "__class__", NNXHandBlock)
        if policy == "heavy_ops":
            object.__setattr__(block.attn, "__class__", NNXNamedAttention)
    return plain


def linen(policy="none", batch=8, length=1024, layers=12, by_hand=False):
    """A workload for `nexus-jax`: the loss of the linen GPT, and its arguments as shapes."""
    model, tokens = linen_model(policy, layers, by_hand), _tokens(batch, length)
    return (lambda p, t: models.loss_of(model.apply(p, t), t)), (linen_params(batch, length, layers), tokens)


@functools.cache
def linen_params(batch, length, layers):
    """Those of the plain model: a policy changes none of them."""
    return jax.eval_shape(linen_model("none", layers).init, jax.random.key(0), _tokens(batch, length))


def flax_nnx(policy="none", batch=8, length=1024, layers=12, by_hand=False):
    """The same of the nnx GPT."""
    return nnx_workload(nnx_model(policy, layers, length, by_hand), batch, length)


def nnx_workload(model, batch, length):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(p, rest, tokens):
        # nnx.remat by hand refuses Variables from outside the trace of the gradient: give it new ones
        return models.loss_of(nnx.merge(graphdef, p, jax.tree.map(lambda x: x, rest))(tokens), tokens)

    return loss, (params, rest, _tokens(batch, length))


FRAMEWORKS = {"linen": linen, "nnx": flax_nnx}


def matmuls(workload, policy):
    """How many matmuls a step runs under a policy."""
    loss, args = workload(policy)
    return count_matmuls(jax.value_and_grad(loss), *args)


def table(framework, ours, hand, targets, recomputed):
    none = ours[0]
    by_hand = {row.policy: row for row in hand}
    lines = []
    for row in ours:
        line = [row.policy, report.size(row.residual_device_bytes), report.size(row.residual_host_bytes)]
        line += [str(recomputed[row.policy]), f"{row.flops / none.flops:.3f}"]
        for t in targets:
            m, theirs = row.measured[t], by_hand.get(row.policy)
            below = 100 * (1 - m.temp_bytes / none.measured[t].temp_bytes)
            more = "" if theirs is None else f"{m.temp_bytes - theirs.measured[t].temp_bytes:+d} B"
            line += [f"{m.temp_bytes / 2**30:.2f} GiB", f"{below:.1f} %", report.size(m.host_bytes), more]
        lines.append(line)
    columns = ["policy", "residuals", "on the host", "recomputed matmuls", "FLOPs"]
    for t in targets:
        columns += [f"{t} temp", "below none", "host", "against by hand"]
    return report.table(f"12-layer GPT in {framework}, value_and_grad", columns, lines, width=200)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default="v5e,h200")
    parser.add_argument("--frameworks", default="linen,nnx")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    targets = [t for t in args.targets.split(",") if t]
    for framework in args.frameworks.split(","):
        workload = FRAMEWORKS[framework]
        ours = nj.compare(workload, POLICIES, targets=targets)
        hand = nj.compare(lambda policy: workload(policy, by_hand=True), BY_HAND, targets=targets)
        counts = {policy: matmuls(workload, policy) for policy in POLICIES}
        recomputed = {policy: count - counts["none"] for policy, count in counts.items()}
        print(table(framework, ours, hand, targets, recomputed), flush=True)
        if args.out:
            packages = ("jax", "jaxlib", "flax", "libtpu", "jax-cuda13-pjrt")
            versions = {n: importlib.metadata.version(n) for n in packages}
            document = {"date": str(datetime.date.today()), "versions": versions}
            document |= {"recomputed_matmuls": recomputed}
            document |= {"ours": ours.as_dict(), "by_hand": hand.as_dict()}
            (args.out / f"gpt_{framework}.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
