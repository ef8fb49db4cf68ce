"""What the training examples share: flags, policies, the training loop, and the comparison of policies."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import matplotlib
import optax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import nexus_jax
from nexus_jax import report
from nexus_jax.flops import matmul_flops

matplotlib.use("Agg")  # before pyplot: training machines have no display
from matplotlib import pyplot as plt

POLICIES = ("none", "all", "alternate", "heavy_ops", "auto", "offload", "heavy_ops_offload")
OUT = pathlib.Path("out")
COMPARE_STEPS = 7  # odd, so that the median is one of the times
TOLERANCE = 1e-4  # of the loss: policies change how XLA fuses, and so the rounding, but nothing else

STEPS_HELP = f"training steps (--compare always takes {COMPARE_STEPS})"

# nn.remat does the same, so it is the compiler: on the CPU, jax 0.10.2 recomputes but frees nothing by it.
CPU_NOTE = (
    "on the CPU, host memory is the device's own: offloading moves nothing, and temporaries include what it "
    "would move. Temporaries depend on the compiler: with jax 0.10 they may not fall at all, nor with plain "
    "jax.checkpoint. Residuals are what autodiff keeps, before the compiler fuses any. Step times of one and "
    "the same program differ by up to a tenth."
)

Batch = tuple[jax.Array, ...]


# --- flags --------------------------------------------------------------------------------------------------


def flag(default: Any, about: str) -> Any:
    """A field of a configuration that is also a flag of the command line."""
    return dataclasses.field(default=default, metadata={"help": about})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run. Every field is a flag: ``auto_min_params`` is ``--auto-min-params``."""

    policy: str = flag("heavy_ops", "what is saved, recomputed or offloaded")
    steps: int = flag(200, STEPS_HELP)
    batch: int = flag(16, "sequences, or images, of one step")
    layers: int = flag(4, "transformer blocks")
    d_model: int = flag(128, "width")
    heads: int = flag(4, "attention heads; must divide the width")
    lr: float = flag(1e-3, "learning rate after warm-up")
    seed: int = flag(0, "of the parameters and of the order of the data")
    auto_min_params: int = flag(50_000, "auto recomputes modules of more parameters than this")
    offload_min_mb: float = flag(0.05, "offload policies move values of at least this many MB")
    compare: bool = flag(False, "train a few steps under every policy, and show what each costs and frees")
    out: pathlib.Path = flag(OUT, "folder of the picture of --compare")


C = TypeVar("C", bound=Config)


def parse(kind: type[C], about: str, argv: Sequence[str] | None) -> C:
    """The command line as a configuration; a bad flag ends the program with one sentence, as in argparse."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=about, formatter_class=formatter)
    for field in dataclasses.fields(kind):
        name, given = "--" + field.name.replace("_", "-"), {"default": field.default, **field.metadata}
        match field.default:
            case bool():
                parser.add_argument(name, action="store_true", **given)
            case str():
                parser.add_argument(name, choices=POLICIES, **given)
            case int() | float():
                least = 0 if field.name in ("seed", "auto_min_params") else 1
                parser.add_argument(name, type=_number(type(field.default), least), **given)
            case _:
                parser.add_argument(name, type=type(field.default), **given)
    config = kind(**vars(parser.parse_args(argv)))
    if config.d_model % config.heads:
        parser.error(f"argument --heads: {config.heads} heads do not divide --d-model {config.d_model}")
    if config.out.exists() and not config.out.is_dir():
        parser.error(f"argument --out: {config.out} is not a folder")
    return config


def _number(kind: type, least: int) -> Callable[[str], Any]:
    def number(text: str) -> Any:
        value = kind(text)  # argparse turns a ValueError into its own message
        if kind is int and value < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        if kind is float and not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
        return value

    number.__name__ = kind.__name__  # the word in that message
    return number


# --- one model under one policy -----------------------------------------------------------------------------


def checkpointing(config: Config) -> nexus_jax.SelectiveCheckpointConfig:
    """The configuration of the chosen policy, with its sizes cut down to a model that trains on a laptop."""
    policy: Any = config.policy
    if "offload" in policy:
        shipped = nexus_jax.load_policy(policy)
        rules = [
            rule if rule.min_mb is None else dataclasses.replace(rule, min_mb=config.offload_min_mb)
            for rule in shipped.residual
        ]
        policy = dataclasses.replace(shipped, residual=tuple(rules))
    return nexus_jax.SelectiveCheckpointConfig(policy=policy, auto_wrap_min_params=config.auto_min_params)


def optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW; the learning rate warms up over a tenth of the run, then falls along a cosine."""
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.lr, warmup_steps=config.steps // 10, decay_steps=config.steps, end_value=config.lr / 10
    )
    return optax.adamw(rate, b2=0.95, weight_decay=0.01)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trainee:
    """A model under one policy, ready to train.

    Attributes:
        loss: ``loss(params, *batch)``, a pure function: what residuals and FLOPs are counted on.
        params: shapes of its first argument; the arrays themselves are donated from step to step.
        step: the compiled training step; asked for its memory.
        advance: trains on one batch and returns the loss before the update.
        score: the validation loss, or the test accuracy, now.
    """

    loss: Callable[..., jax.Array]
    params: Any
    step: Any
    advance: Callable[..., jax.Array]
    score: Callable[[], float]


def shapes(tree: Any) -> Any:
    """The tree with shapes for arrays: all that counting needs."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one policy costs and frees; times and losses are those of the steps taken."""

    device_bytes: int
    host_bytes: int
    temp_bytes: int
    flops: int
    times: tuple[float, ...]
    losses: tuple[float, ...]


# --- training -----------------------------------------------------------------------------------------------


def run(config: C, build: Callable[[C], Trainee], batches: Iterable[Batch], name: str, score: str) -> int:
    """Train under the chosen policy, or compare all of them; the exit status of the program.

    Args:
        config: the flags.
        build: makes and compiles the model of a configuration; the same seed gives the same model.
        batches: endless, and the same every time.
        name: of the picture's file.
        score: what ``Trainee.score`` is called.
    """
    console = Console()
    if config.compare:
        return _compare(dataclasses.replace(config, steps=COMPARE_STEPS), build, batches, name, console)
    with console.status(f"compiling under {config.policy}"):
        trainee = build(config)
    batches = iter(batches)
    batch = next(batches)
    kept = nexus_jax.residuals(trainee.loss, trainee.params, *batch)
    console.print(
        f"{config.policy}: residuals {report.size(kept.device_bytes)} on the device, "
        f"{report.size(kept.host_bytes)} on the host; "
        f"compiled step {report.size(_temp_bytes(trainee))} temporary",
        soft_wrap=True,
    )
    before, losses = trainee.score(), []
    with _bar(console) as bar:
        task = bar.add_task("training", total=config.steps, loss=float("nan"))
        for _ in range(config.steps):
            losses.append(float(trainee.advance(*batch)))
            bar.update(task, advance=1, loss=losses[-1])
            batch = next(batches)
    console.print(f"train loss   {losses[0]:.4f} -> {losses[-1]:.4f}")
    console.print(f"{score}   {before:.4f} -> {trainee.score():.4f}")
    return 0


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("loss {task.fields[loss]:.4f}"), console=console)


def _temp_bytes(trainee: Trainee) -> int:
    return trainee.step.memory_analysis().temp_size_in_bytes


# --- comparing ----------------------------------------------------------------------------------------------


def _compare(
    config: C,
    build: Callable[[C], Trainee],
    batches: Iterable[Batch],
    name: str,
    console: Console,
) -> int:
    trainees: dict[str, Trainee] = {}
    with console.status("compiling") as status:
        for policy in POLICIES:
            status.update(f"compiling under {policy}")
            trainees[policy] = build(dataclasses.replace(config, policy=policy))
    costs = measure(config, trainees, batches, console)
    console.print(cost_table(costs), markup=False, highlight=False, soft_wrap=True)
    if jax.default_backend() == "cpu":
        console.print(f"note: {CPU_NOTE}", markup=False, highlight=False)
    console.print(f"picture: {draw(costs, config.out / f'compare_{name}.png')}")
    apart = disagreement(costs)
    console.print(f"largest relative difference of a loss from none: {apart:.1e}")
    if not apart <= TOLERANCE:
        console.print(f"[red]error:[/] policies must not change the loss by more than {TOLERANCE:.0e}")
        return 1
    return 0


def measure(
    config: Config, trainees: Mapping[str, Trainee], batches: Iterable[Batch], console: Console
) -> dict[str, Cost]:
    """What each policy costs and frees.

    The policies take their steps in turn, so that whatever else the machine does slows all of them alike.
    """
    times: dict[str, list[float]] = {policy: [] for policy in trainees}
    losses: dict[str, list[float]] = {policy: [] for policy in trainees}
    batches = iter(batches)
    batch = next(batches)
    with _bar(console) as bar:
        task = bar.add_task("training", total=config.steps * len(trainees), loss=float("nan"))
        for _ in range(config.steps):
            for policy, trainee in trainees.items():
                start = time.perf_counter()
                losses[policy].append(float(trainee.advance(*batch)))  # float waits for the device
                times[policy].append(time.perf_counter() - start)
                bar.update(task, advance=1, loss=losses[policy][-1])
            batch = next(batches)
    costs = {}
    for policy, trainee in trainees.items():
        kept = nexus_jax.residuals(trainee.loss, trainee.params, *batch)
        costs[policy] = Cost(
            device_bytes=kept.device_bytes,
            host_bytes=kept.host_bytes,
            temp_bytes=_temp_bytes(trainee),
            flops=matmul_flops(jax.value_and_grad(trainee.loss), trainee.params, *batch),
            times=tuple(times[policy]),
            losses=tuple(losses[policy]),
        )
    return costs


def extra_flops(costs: Mapping[str, Cost], policy: str) -> float:
    """Matmuls run again, in percent of the plain model's step."""
    return 100 * (costs[policy].flops / costs["none"].flops - 1)


def time_ratio(costs: Mapping[str, Cost], policy: str) -> float:
    """Median step time over that of the plain model."""
    return statistics.median(costs[policy].times) / statistics.median(costs["none"].times)


def disagreement(costs: Mapping[str, Cost]) -> float:
    """The largest relative difference of any loss from the plain model's; NaN where a loss is NaN."""
    plain = costs["none"].losses
    apart = [abs(a - b) / abs(b) for cost in costs.values() for a, b in zip(cost.losses, plain, strict=True)]
    return next((x for x in apart if x != x), max(apart))


def cost_table(costs: Mapping[str, Cost]) -> str:
    """One row per policy."""
    columns = (
        "policy",
        "residuals, device",
        "residuals, host",
        "compiled temporaries",
        "extra FLOPs, %",
        "time / none",
        "final loss",
    )
    rows = [
        (
            policy,
            report.size(cost.device_bytes),
            report.size(cost.host_bytes),
            report.size(cost.temp_bytes),
            f"{extra_flops(costs, policy):.2f}",
            f"{time_ratio(costs, policy):.2f}",
            f"{cost.losses[-1]:.7f}",
        )
        for policy, cost in costs.items()
    ]
    return report.table(f"{len(costs['none'].losses)} training steps under each policy", columns, rows)


def draw(costs: Mapping[str, Cost], path: pathlib.Path) -> pathlib.Path:
    """Write the residual bytes of each policy as a picture, with what they cost beside them."""
    names = list(costs)
    device = [cost.device_bytes / 2**20 for cost in costs.values()]
    host = [cost.host_bytes / 2**20 for cost in costs.values()]
    longest = max(d + h for d, h in zip(device, host, strict=True))
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(names) + 1.6), layout="constrained")
    axes.barh(names, device, color="#3b6ea5", height=0.62, label="on the device")
    axes.barh(names, host, left=device, color="#e0a458", height=0.62, label="on the host")
    for row, (name, d, h) in enumerate(zip(names, device, host, strict=True)):
        text = "the plain model"
        if name != "none":
            text = f"{extra_flops(costs, name):+.1f}% FLOPs, {time_ratio(costs, name):.2f}x time"
        axes.text(d + h + 0.012 * longest, row, text, va="center", fontsize=9)
    axes.set_xlim(0, 1.32 * longest)  # room for the text beside the longest bar
    axes.invert_yaxis()
    axes.set_xlabel("residuals of one step, MiB")
    axes.set_title("What the backward pass keeps, and the cost of keeping less", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    # Above the bars, where no text of theirs can reach it.
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderaxespad=0.2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    plt.close(figure)
    return path
