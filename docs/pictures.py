"""The pictures of the README and of docs/offload.md, from compiled steps, the time model and benchmarks/results.

    python docs/pictures.py        # all of them, or those named: timeline (needs the extra [tpu]), policies, peak, offload

`docs/compare_gpt.png` is what `python examples/train_gpt.py --compare --out docs` writes.
"""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import matplotlib

import nexus_jax as nj

matplotlib.use("Agg")
from matplotlib import pyplot as plt

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))
import models
import train_gpt

HERE = pathlib.Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "results"
COLORS = {"v5e": "#3b6ea5", "h200": "#e0a458"}


def timeline():
    """Memory over a step of a six-layer GPT on a TPU v5e, under three policies."""

    def workload(policy):
        return train_gpt.workload(policy, batch=16, length=512, layers=6, d_model=512, heads=8)

    found = nj.compare(workload, ("none", "heavy_ops", "all"), targets="v5e", schedules=True)
    lines = {row.policy: row.measured["v5e"].timeline() for row in found}
    nj.timeline.draw(lines, HERE / "timeline.png")


def policies():
    """Temporaries of the 12-layer GPT of docs/policies.md, by policy and target."""
    rows = json.loads((RESULTS / "gpt_linen.json").read_text())["ours"]["rows"]
    figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
    for offset, (target, color) in zip((-0.19, 0.19), COLORS.items(), strict=True):
        sizes = [row["measured"][target]["temp_bytes"] / 2**30 for row in rows]
        places = [i + offset for i in range(len(rows))]
        axes.barh(places, sizes, height=0.36, color=color, label=target)
        for place, size in zip(places, sizes, strict=True):
            axes.text(size + 0.1, place, f"{size:.2f}", va="center", fontsize=8)
    cost = [f"{row['policy']}  ({row['flops'] / rows[0]['flops']:.2f}x FLOPs)" for row in rows]
    axes.set_yticks(range(len(rows)), cost)
    axes.invert_yaxis()
    axes.set_xlabel("compiled temporaries in device memory, GiB")
    axes.set_title("A 12-layer GPT (d 1024, batch 8 x 1024), value_and_grad, no device needed", loc="left", fontsize=11)
    _finish(figure, axes, "policies.png")


def peak():
    """Predicted without a compile, against compiled."""
    cases = json.loads((RESULTS / "peak.json").read_text())["cases"]
    figure, axes = plt.subplots(figsize=(6, 5.2), layout="constrained")
    ends = [f(c[k] for c in cases for k in ("compiled", "predicted")) / 2**20 for f in (min, max)]
    axes.plot(ends, ends, color="#999999", linewidth=1, zorder=1)
    axes.fill_between(ends, [0.9 * e for e in ends], [1.1 * e for e in ends], color="#999999", alpha=0.2, linewidth=0)
    for target, color in COLORS.items():
        for held_out, marker in ((False, "o"), (True, "^")):
            xy = [
                (c["compiled"] / 2**20, c["predicted"] / 2**20)
                for c in cases
                if (c["target"], c["held_out"]) == (target, held_out)
            ]
            label = f"{target}, {'never looked at before' if held_out else 'developed on'}"
            axes.scatter(*zip(*xy, strict=True), color=color, marker=marker, s=34, label=label, zorder=2)
    axes.set(xscale="log", yscale="log", xlabel="device bytes compiled, MiB", ylabel="predicted without a compile, MiB")
    axes.set_title("The peak of a step, predicted (band: 10 %)", loc="left", fontsize=11)
    _finish(figure, axes, "peak.png")


def offload():
    """How much of what a GPT keeps the links of four devices move while it computes, by the width of its layers."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    widths = [2**k for k in range(8, 15)]
    for axes, policy in zip(panels, ("heavy_ops", "all"), strict=True):
        for target, color in {**COLORS, "v5p": "#6a9955", "v6e": "#a05195"}.items():
            auto = nj.ActivationOffloader(offload_threshold_mb="auto", target=target, prefetch_ahead=1)
            every = nj.ActivationOffloader(offload_threshold_mb=1.0, prefetch_ahead=1)
            shares = [100 * _moved(auto, policy, d) / _moved(every, policy, d) for d in widths]
            axes.plot(widths, shares, color=color, marker="o", markersize=4, label=target)
        axes.set(xscale="log", xlabel="width of the model")
        axes.set_xticks(widths, [str(d) for d in widths])
        axes.minorticks_off()
        axes.set_title(f"policy {policy}", loc="left", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("moved while the layers compute, % of what is kept")
    _finish(figure, panels[1], "offload.png")


def _moved(offloader, policy, width):
    """Bytes that leave, of a GPT of six layers and 8 x 1024 tokens."""
    gpt = models.GPT(layers=6, d=width, heads=width // 64, vocab=1024, dtype=jnp.bfloat16)
    model, tokens = nj.apply_selective_checkpointing(gpt, policy), jax.ShapeDtypeStruct((8, 1024), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    loss = offloader.wrap(lambda p, t: models.loss_of(model.apply(p, t), t))
    return sum(r.nbytes for r in nj.residuals(loss, params, tokens) if r.place == "host")


def _finish(figure, axes, name):
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(HERE / name, dpi=140)
    plt.close(figure)


PICTURES = {f.__name__: f for f in (timeline, policies, peak, offload)}

if __name__ == "__main__":
    for name in sys.argv[1:] or PICTURES:
        PICTURES[name]()
