"""How long the solver takes, over the number of equal layers: python benchmarks/planner_speed.py 3 12 48 192

The layers are those of a perceptron with a residual stream (five equations), or with --gpt those of a GPT, or with
--scanned those of a GPT as one scan.
"""

import argparse
import math
import time

import jax
import jax.numpy as jnp
import zoo

from nexus_jax.planner.loss import Loss
from nexus_jax.planner.model import model_of
from nexus_jax.planner.prices import Prices
from nexus_jax.targets.compiler import find_target


def perceptron(layers):
    def loss(ws, x):
        for up, down in ws:
            x = x + jnp.tanh(x @ up) @ down
        return jnp.mean(x**2)

    w = (jax.ShapeDtypeStruct((256, 1024), jnp.float32), jax.ShapeDtypeStruct((1024, 256), jnp.float32))
    return loss, ([w] * layers, jax.ShapeDtypeStruct((4096, 256), jnp.float32))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("layers", type=int, nargs="+")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--gpt", action="store_true")
    which.add_argument("--scanned", action="store_true")
    args = parser.parse_args()
    before = None
    for layers in args.layers:
        small = {"layers": layers, "d": 64, "length": 64, "batch": 2, "vocab": 512}
        if args.scanned:
            fn, given = zoo.gpt_scanned(**small)
        else:
            fn, given = zoo.gpt(**small) if args.gpt else perceptron(layers)
        start = time.process_time()
        loss = Loss(fn, given)
        differentiated = loss.differentiated((0,))
        traced = time.process_time()
        model = model_of(loss.flat, differentiated, Prices(find_target("v5e"), "flops"))
        end = time.process_time()
        solved = sum(m.options.solved for m in (model, *model.bodies.values()))
        frontier = model.frontier
        middle = frontier.peaks[len(frontier.peaks) // 2]
        path, bound = frontier.within(middle), frontier.bound(middle)
        power = (
            ""
            if before is None
            else f", power {math.log((end - start) / before[1]) / math.log(layers / before[0]):.2f}"
        )
        print(
            f"{layers} layers, {len(loss.flat.eqns)} equations: traced in {traced - start:.1f} s, differentiated, cut and "
            f"solved in {end - traced:.1f} s ({solved} kinds of stretches, {len(frontier.peaks)} plans, gap "
            f"in the middle {100 * (1 - bound / path.ticks):.2f} %){power}",
            flush=True,
        )
        before = (layers, end - start)


if __name__ == "__main__":
    main()
