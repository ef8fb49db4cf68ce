"""Plans against fixed policies: extra FLOPs at the same bytes, at budgets between the floor and the step as it is.

    python benchmarks/planner_table.py --target v5e --models gpt,bert,vit,unet,moe --budgets 12 [--compile]

Bytes are those of `nexus_jax.peak`, or of the compiler with `--compile`. The fixed policies are JAX's own around groups of
stretches of every size (and around every other), those of `nexus_jax` around modules, and the whole step as it is. Writes
`results/planner_TARGET.json`.
"""

import argparse
import json
import pathlib
import time

import zoo

import nexus_jax as nj
from nexus_jax import flops, peak
from nexus_jax.planner import loop
from nexus_jax.planner.baselines import baselines
from nexus_jax.planner.loss import Loss
from nexus_jax.planner.make import _draft
from nexus_jax.planner.model import model_of
from nexus_jax.planner.plan import Subject
from nexus_jax.planner.prices import Prices
from nexus_jax.program import step_of
from nexus_jax.targets.compiler import find_target

OURS = ("all", "alternate", "heavy_ops")


class Judge:
    """Bytes and FLOPs of steps on a target."""

    def __init__(self, target, compiled):
        self.target, self.compiled = find_target(target), compiled

    def __call__(self, fn, args):
        program = step_of(fn, args)
        if not self.compiled:
            return peak.predict(program, self.target).device_bytes, flops.count(program.fun, *program.arrays).flops
        found = nj.measure(fn, *args, target=self.target)
        return found.device_bytes, found.flops


def fixed_policies(name, model, fn, args, subject, judge):
    """(name, bytes, FLOPs) of every fixed policy."""
    for policy in baselines(model):
        draft = _draft(subject, model.segments(policy.path))
        yield (f"{policy.name} x{policy.group}", *judge(draft.apply(fn), args))
    for policy in OURS:
        wrapped, own = getattr(zoo, name)(policy=policy)
        yield (policy, *judge(wrapped, own))


def table(name, target, count, compiled, objective):
    """A row for each budget: the plan, and the best fixed policy that fits."""
    fn, args = getattr(zoo, name)()
    judge = Judge(target, compiled)
    loss = Loss(fn, args)
    start = time.process_time()
    model = model_of(loss.flat, loss.differentiated((0,)), Prices(judge.target, objective))
    solving = time.process_time() - start
    subject = Subject.of(model.flat)
    plain, base = judge(fn, args)
    fixed = list(fixed_policies(name, model, fn, args, subject, judge))
    seen = {}

    def planned(at):
        if at not in seen:
            seen[at] = judge(_draft(subject, model.segments(model.frontier.path(at))).apply(fn), args)
        return seen[at][0]

    floor = min(planned(0), *(b for _, b, _ in fixed))
    rows = []
    for k in range(count):
        budget = floor + (plain - floor) * (k + 1) // (count + 1)
        found = loop.search(len(model.frontier.peaks), budget, planned, planned)
        best = min(((f - base, n) for n, b, f in fixed if b <= budget), default=(None, None))
        extra = None if found.best is None else seen[found.best.at][1] - base
        rows.append({"budget": budget, "plan": extra, "fixed": best[0], "policy": best[1]})
    return {"model": name, "plain": plain, "floor": floor, "flops": base, "solving": solving, "rows": rows}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", default="v5e")
    parser.add_argument("--models", default="gpt,bert,vit,unet,moe,mlp")
    parser.add_argument("--budgets", type=int, default=12)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--objective", default="flops")
    args = parser.parse_args()
    found = []
    for name in args.models.split(","):
        one = table(name, args.target, args.budgets, args.compile, args.objective)
        found.append(one)
        rows = one["rows"]
        both = [(r["plan"], r["fixed"]) for r in rows if r["plan"] is not None and r["fixed"] is not None]
        summary = (
            f"{name} on {args.target}: {one['plain'] >> 20} MiB as it is, {one['floor'] >> 20} MiB at least; plan no "
            f"worse at {sum(p <= f for p, f in both)} of {len(rows)} budgets, 20 % better at "
            f"{sum(p <= 0.8 * f for p, f in both)}; solved in {one['solving']:.1f} s"
        )
        print(summary, flush=True)
        for r in rows:
            share = lambda x: "does not fit" if x is None else f"{100 * x / one['flops']:6.2f} %"
            print(
                f"  {r['budget'] >> 20:6} MiB  plan {share(r['plan'])}  fixed {share(r['fixed'])}  {r['policy']}",
                flush=True,
            )
        results = pathlib.Path(__file__).parent / "results"
        kind = "compiled" if args.compile else "predicted"
        (results / f"planner_{args.target}_{kind}.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
