"""Plans against fixed policies: extra FLOPs at the same compiled bytes, at budgets between the floor and the step as it is.

    python benchmarks/planner_table.py --targets v5e,h200 --models gpt,bert,vit,unet,moe --out benchmarks/results

Everything is compiled for the target. The fixed policies are JAX's own around groups of stretches of every size and around
every other, MaxText's lists of saved tensors around layers where the model has such tensors, those of `nexus_jax` around
modules, and the step as it is. Of the fixed policies, those are compiled that no other one is predicted to beat by 10 % of
the bytes with no more FLOPs. Each plan may compile as often as `nexus_jax.plan` does. Writes `planner_TARGET.json`.
"""

import argparse
import json
import pathlib
import re
import time

import zoo

import nexus_jax as nj
from nexus_jax import _compat, flops, peak, scopes
from nexus_jax.planner.baselines import baselines, path_of
from nexus_jax.planner.graph import Choice
from nexus_jax.planner.make import Planner, draft
from nexus_jax.planner.options import of_choice
from nexus_jax.planner.plan import Infeasible, Subject
from nexus_jax.program import step_of
from nexus_jax.targets.compiler import find_target

OURS = ("all", "alternate", "heavy_ops")
SPARE = 0.9  # fixed policies that are predicted to be so much worse than another are not compiled

# What MaxText's remat_policy saves of a layer (src/maxtext/layers/decoders.py, get_remat_policy), by the modules here.
MAXTEXT = {
    "save_qkv_proj": r"attn/(q|k|v)$",
    "save_out_proj": r"attn/out$",
    "save_dot_except_mlpwi": r"attn/(q|k|v|out)$|Dense_1$",
    "save_dot_except_mlp": r"attn/(q|k|v|out)$",
}


class Judge:
    """Bytes and FLOPs of steps on a target, each once."""

    def __init__(self, target):
        self.target = find_target(target)

    def predicted(self, fn, args):
        return peak.predict(step_of(fn, args), self.target).device_bytes

    def flops(self, fn, args):
        program = step_of(fn, args)
        return flops.count(program.fun, *program.arrays).flops

    def compiled(self, fn, args):
        return nj.measure(fn, *args, target=self.target).device_bytes


def maxtext(model):
    """Paths of MaxText's lists, each layer (two stretches) a boundary."""
    names = {}
    for (start, stop), span in model.spans.items():
        if stop <= start + 2:
            for v, batched in span.shape.matmuls:
                variable = model.flat.variables[span.values[v]]
                eqn = next(e for e in model.flat.eqns[span.start : span.stop] if variable in e.outvars)
                if not batched:
                    names[id(span.shape), v] = scopes.module_path(_compat.scope_path(eqn))

    for name, pattern in MAXTEXT.items():

        def pick(n, shape, pattern=pattern):
            saved = {v for v, batched in shape.matmuls if not batched and re.search(pattern, names[id(shape), v])}
            return of_choice(shape, Choice(saved=frozenset(saved)))

        if any(re.search(pattern, path) for path in names.values()):
            yield name, path_of(model, 2, pick)


def fixed_policies(name, model, fn, args):
    """(name, function, arguments) of every fixed policy."""
    subject = Subject.of(model.flat)
    for policy in baselines(model):
        yield f"{policy.name} x{policy.group}", draft(subject, model.segments(policy.path)).apply(fn), args
    for policy, path in maxtext(model):
        yield f"MaxText {policy}", draft(subject, model.segments(path)).apply(fn), args
    for policy in OURS:
        yield (policy, *getattr(zoo, name)(policy=policy))


def compiled_policies(name, model, fn, args, judge):
    """(name, bytes, FLOPs) of the fixed policies that may be the best."""
    found = [(n, f, a, judge.predicted(f, a), judge.flops(f, a)) for n, f, a in fixed_policies(name, model, fn, args)]
    for n, f, a, nbytes, count in found:
        if not any(b < SPARE * nbytes and c <= count for _, _, _, b, c in found):
            yield n, judge.compiled(f, a), count


def table(name, target, count, objective):
    """A row for each budget: the plan, and the best fixed policy that fits."""
    fn, args = getattr(zoo, name)()
    judge = Judge(target)
    planner = Planner(fn, args, target=target, objective=objective)
    start = time.process_time()
    model = planner.model
    solving = time.process_time() - start
    plain, base = planner.before.device_bytes, planner.before.flops
    fixed = list(compiled_policies(name, model, fn, args, judge))
    floor = min(planner.measured(planner.model.frontier.path(0)).device_bytes, *(b for _, b, _ in fixed))
    rows = []
    for k in range(count):
        budget = floor + (plain - floor) * (k + 1) // (count + 1)
        best = min(((f - base, n) for n, b, f in fixed if b <= budget), default=(None, None))
        try:
            made = planner.plan(budget)
            plan = {"bytes": made.device_bytes, "predicted": made.predicted_bytes, "extra": made.extra_flops}
            plan |= {"gap": made.gap, "compiles": 1 + len(made.trials)}
        except Infeasible:
            plan = None
        rows.append({"budget": budget, "plan": plan, "fixed": best[0], "policy": best[1]})
    return {"model": name, "plain": plain, "floor": floor, "flops": base, "solving": solving, "rows": rows}


def show(one, target):
    pairs = [(r["plan"]["extra"], r["fixed"]) for r in one["rows"] if r["plan"] and r["fixed"] is not None]
    alone = sum(r["plan"] is not None and r["fixed"] is None for r in one["rows"])
    print(
        f"{one['model']} on {target}: {one['plain'] >> 20} MiB as it is, {one['floor'] >> 20} MiB at least; plan no worse "
        f"at {alone + sum(p <= f for p, f in pairs)} of {len(one['rows'])} budgets, 20 % better at "
        f"{alone + sum(p <= 0.8 * f for p, f in pairs)}; solved in {one['solving']:.1f} s",
        flush=True,
    )
    share = lambda x: "does not fit" if x is None else f"{100 * x / one['flops']:6.2f} %"
    for r in one["rows"]:
        plan = r["plan"] or {"extra": None, "bytes": 0}
        print(
            f"  {r['budget'] >> 20:6} MiB  plan {share(plan['extra'])} in {plan['bytes'] >> 20:6} MiB  "
            f"fixed {share(r['fixed'])}  {r['policy']}",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--targets", default="v5e,h200")
    parser.add_argument("--models", default="gpt,bert,vit,unet,moe")
    parser.add_argument("--budgets", type=int, default=12)
    parser.add_argument("--objective", default="flops")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    for target in args.targets.split(","):
        found = []
        for name in args.models.split(","):
            found.append(table(name, target, args.budgets, args.objective))
            show(found[-1], target)
            if args.out:
                args.out.mkdir(parents=True, exist_ok=True)
                (args.out / f"planner_{target}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
