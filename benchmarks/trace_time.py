"""How long tracing takes: the transformed model against the same boundaries written by hand, in turn, in one process.

    python benchmarks/trace_time.py [--rounds 7]

A ratio of medians of the processor's time; absolute times mean nothing on a shared machine. The 12-layer GPT of gpt_table.py, abstract
arguments; the model has been initialised before, as in training.
"""

import argparse
import gc
import statistics
import time

import gpt_table
import jax

from nexus_jax import report


def traced(loss, args):
    gc.collect()  # so that neither pays for the other's garbage
    start = time.process_time()
    jax.jit(jax.value_and_grad(lambda *a: loss(*a))).trace(*args)  # a fresh function: no cache answers
    return time.process_time() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    rows = []
    for policy in gpt_table.BY_HAND:
        for name, workload in gpt_table.FRAMEWORKS.items():
            ours, hand = workload(policy), workload(policy, by_hand=True)
            for program in (ours, hand):
                traced(*program)
            times = [(traced(*ours), traced(*hand)) for _ in range(rounds)]
            ratio = statistics.median(a for a, _ in times) / statistics.median(b for _, b in times)
            rows.append((name, policy, f"{ratio:.2f}"))
    print(report.table("tracing, transformed / by hand", ("framework", "policy", "ratio"), rows))


if __name__ == "__main__":
    main()
