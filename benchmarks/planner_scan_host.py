"""Plans of a scan over layers without a host's memory and with it, at budgets from the least that anything takes.

    python benchmarks/planner_scan_host.py --target h200 --layers 24 --d 2048
    python benchmarks/planner_scan_host.py --target v5e --layers 12 --d 1024

Nothing runs: bytes and FLOPs are of the compiled steps, seconds are the planner's. Prints a table in Markdown.
"""

import argparse

import zoo

from nexus_jax import report
from nexus_jax.planner.make import Planner
from nexus_jax.planner.plan import Infeasible


def cells(planner, budget):
    """What a plan takes, as text; dashes where there is none."""
    try:
        plan = planner.plan(budget)
    except Infeasible:
        return ["none fits", "", ""]
    return [
        f"{100 * plan.extra_flops / plan.step_flops:.2f} %",
        f"{plan.cost / 1e9:.2f} ms",
        f"{plan.host_bytes >> 20}",
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="h200")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--d", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--host", default="64GiB")
    parser.add_argument("--budgets", type=int, default=6)
    args = parser.parse_args()
    fn, example = zoo.gpt_scanned(layers=args.layers, d=args.d, heads=args.d // 64, batch=args.batch)
    alone, both = (Planner(fn, example, target=args.target, host_budget=host) for host in (0, args.host))
    least = both.measured(both.model.frontier.path(0)).device_bytes
    plain = both.before.device_bytes
    print(f"{args.layers} layers, d = {args.d}, as it is {report.size(plain)}")
    print(
        "| budget, MiB | without a host: extra FLOPs | seconds lost | with one: extra FLOPs | seconds lost | on the host, MiB |"
    )
    print("|---|---|---|---|---|---|")
    for k in range(args.budgets):
        budget = round(least * (plain / 2 / least) ** (k / max(1, args.budgets - 1)))
        without, own = cells(alone, budget), cells(both, budget)
        print("| " + " | ".join([str(budget >> 20), *without[:2], *own]) + " |", flush=True)


if __name__ == "__main__":
    main()
