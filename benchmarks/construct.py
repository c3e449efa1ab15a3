"""Balanced clustering and exact assignment against their peers, in one run: CPU-seconds on one thread, the least of
several; inertia recomputed here in float64 from the labels; the floor measured in the same run.

    python benchmarks/construct.py cluster --data mix,gauss --k 8,16 --seeds 3 --peer kmc  # P1, one start for both
    python benchmarks/construct.py cluster --preset llama-moe --data mix --k 16            # P2, what LLaMA-MoE runs
    python benchmarks/construct.py cluster --layers 32 --data mix --k 16                   # P2, a 7B's layers
    python benchmarks/construct.py cluster --model FOLDER --k 8 --peer kmc                 # rows of a real checkpoint
    python benchmarks/construct.py assign --k 8,16                                         # P3

Peers (`pip install k-means-constrained==0.9.1`, which brings ortools) are found missing and then said to be missing.
`mix` is a Gaussian plus a weak rank-64 part with decaying weights, `gauss` is isotropic; rows have unit length.
"""

# ruff: noqa: E402
# Threads are pinned before numpy loads.
from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import functools
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import numpy.typing as npt

from prismoe.balance import balanced_kmeans
from prismoe.balance.assignment import assign
from prismoe.balance.products import thin_product
from prismoe.checkpoint import Checkpoint

Rows = npt.NDArray[np.float32]
KMC = {"max_iter": 500, "tol": 1e-4, "random_state": 0}


def synthetic(kind: str, seed: int, rows: int, columns: int) -> Rows:
    generator = np.random.Generator(np.random.Philox(key=[seed, len(kind)]))
    data = generator.standard_normal((rows, columns), dtype=np.float32)
    if kind == "mix":
        weights = (0.245 * np.arange(1, 65) ** -0.5).astype(np.float32)
        low = generator.standard_normal((rows, 64), dtype=np.float32) * weights
        data += low @ generator.standard_normal((64, columns), dtype=np.float32)
    data /= np.sqrt(np.einsum("nd,nd->n", data, data))[:, None]
    return data


def plus_plus(data: Rows, count: int, seed: int) -> Rows:
    """k-means++ on all rows: the start that we and the peer share."""
    generator = np.random.Generator(np.random.Philox(key=[seed, 3]))
    chosen = [int(generator.integers(len(data)))]
    nearest = np.full(len(data), np.inf)
    while len(chosen) < count:
        nearest = np.minimum(nearest, np.maximum(2.0 - 2.0 * (data @ data[chosen[-1]]), 0.0))
        chosen.append(int(generator.choice(len(data), p=nearest / nearest.sum())))
    return data[chosen]


def inertia(data: Rows, labels: npt.NDArray[Any]) -> float:
    total = 0.0
    for j in range(int(labels.max()) + 1):
        part = data[labels == j].astype(np.float64)
        total += float(((part - part.mean(axis=0)) ** 2).sum())
    return total


def least(work: Callable[[], Any], times: int) -> tuple[float, Any]:
    """CPU-seconds of this process, the least of `times`, and the last result."""
    seconds = math.inf
    for _ in range(times):
        started = time.process_time()
        result = work()
        seconds = min(seconds, time.process_time() - started)
    return seconds, result


def peer(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def kmc(data: Rows, clusters: int, **arguments: Any) -> tuple[float, npt.NDArray[Any], int]:
    from k_means_constrained import KMeansConstrained  # type: ignore[import-not-found]

    size = len(data) // clusters
    model = KMeansConstrained(n_clusters=clusters, size_min=size, size_max=size, **KMC, **arguments)
    seconds, labels = least(lambda: model.fit_predict(data), 1)
    return seconds, labels, int(model.n_iter_)


class Machine:
    """What one thread of this machine does now: float32 peak and reading rate, through the same libraries."""

    def __init__(self, data: Rows) -> None:
        square = np.random.default_rng(0).standard_normal((2048, 2048), dtype=np.float32)
        with thin_product(size=1 << 30) as product:
            seconds, _ = least(lambda: product(square, square), 5)
        self.flops = 2 * 2048**3 / seconds
        flat = data.reshape(-1)
        seconds, _ = least(lambda: np.add.reduce(flat), 5)
        self.read = flat.nbytes / seconds

    def pass_floor(self, data: Rows, clusters: int) -> float:
        return max(2 * data.size * clusters / self.flops, data.nbytes / self.read)

    def __str__(self) -> str:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        load = " ".join(f"{value:.1f}" for value in os.getloadavg())
        return (
            f"{names[0]} × {len(names)}, load {load}, Python {platform.python_version()}, numpy {np.__version__}; "
            f"one thread: float32 {self.flops / 1e9:.0f} GFLOP/s, read {self.read / 1e9:.1f} GB/s"
        )


def thin(data: Rows, clusters: int) -> tuple[float, float]:
    """One product of all rows with the centres: as we do it, and NumPy's."""
    centres = data[:clusters].copy()
    with thin_product(size=data.size) as product:
        ours, _ = least(lambda: product(data, centres), 5)
    return ours, least(lambda: data @ centres.T, 5)[0]


def cases(options: argparse.Namespace) -> Iterator[tuple[str, Rows]]:
    if options.model:
        checkpoint = Checkpoint.open(options.model)
        for layer in range(checkpoint.family.num_layers):
            rows = np.array(checkpoint.ffn(layer).up_FD, np.float32)
            yield f"layer {layer}", rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return
    for kind in options.data.split(","):
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            yield f"{kind} seed {seed}", synthetic(kind, seed, options.rows, options.dim)


def cluster(options: argparse.Namespace) -> None:
    if options.layers:
        return many_layers(options)
    version = peer("k-means-constrained") if options.peer == "kmc" or options.preset else None
    if options.peer == "kmc" or options.preset:
        print(f"peer k-means-constrained {version or 'MISSING: no ratio, no pass'}")
    ratios = []
    print("case | K | ours s | inertia | passes | % of floor | peer s | its | inertia | random split | ratio")
    for number, (name, data) in enumerate(cases(options), options.first_seed):
        if number == options.first_seed:
            machine = Machine(data)
            print(machine)
        shuffled = np.random.default_rng(0).permutation(len(data))
        for clusters in map(int, options.k.split(",")):
            start = None if options.preset else plus_plus(data, clusters, number)
            work = functools.partial(balanced_kmeans, data, clusters, start=start, seed=number)
            seconds, found = least(work, options.repeat)
            ours = inertia(data, found.labels)
            assert np.ptp(np.bincount(found.labels)) <= 1
            assert abs(found.inertia - ours) <= 1e-6 * ours
            share = 100 * found.passes * machine.pass_floor(data, clusters) / seconds
            line = f"{name} | {clusters} | {seconds:.3f} | {ours:.3f} | {found.passes:.1f} | {share:.0f}"
            if version:
                arguments: dict[str, Any] = {"n_init": 10} if options.preset else {"init": start, "n_init": 1}
                theirs, labels, iterations = kmc(data, clusters, **arguments)
                other = inertia(data, labels)
                line += f" | {theirs:.2f} | {iterations} | {other:.3f} | {inertia(data, shuffled % clusters):.2f}"
                line += f" | {theirs / seconds:.1f}{'' if ours <= other else ' INERTIA ABOVE THE PEER'}"
                ratios.append(theirs / seconds)
            print(line, flush=True)
            product, blas = thin(data, clusters)
            floor = machine.pass_floor(data, clusters)
            print(
                f"    one product: {1e3 * product:.1f} ms (numpy {1e3 * blas:.1f}, floor {1e3 * floor:.1f})", flush=True
            )
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        print(f"ratio: least {min(ratios):.1f}, geometric mean {mean:.1f}")


def many_layers(options: argparse.Namespace) -> None:
    """All layers of a model, each from its own k-means++ start; the peak of resident memory while clustering."""
    kind, clusters = options.data.split(",")[0], int(options.k.split(",")[0])
    with thin_product(size=1 << 30):  # import torch before the clock and the memory are read
        pass
    seconds, above = [], 0
    for layer in range(options.layers):
        data = synthetic(kind, layer, options.rows, options.dim)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = resident("VmRSS")
        cpu, found = least(lambda: balanced_kmeans(data, clusters, seed=layer), 1)  # noqa: B023
        above = max(above, resident("VmHWM") - before + data.nbytes)
        seconds.append(cpu)
        assert np.ptp(np.bincount(found.labels)) == 0
    matrix = 4 * options.rows * options.dim
    print(Machine(data))
    print(
        f"{options.layers} layers of {options.rows} × {options.dim}, {kind}, K={clusters}: {sum(seconds):.1f} CPU-s "
        f"(each {min(seconds):.2f} – {max(seconds):.2f}); memory for rows and clustering {above / 1e6:.0f} MB, "
        f"{above / matrix:.2f} × one matrix"
    )


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def flow(costs: npt.NDArray[np.float64]) -> npt.NDArray[Any]:
    """ortools' min-cost flow on costs rounded to 1e-9."""
    from ortools.graph.python import min_cost_flow  # type: ignore[import-not-found]

    rows, clusters = costs.shape
    solver = min_cost_flow.SimpleMinCostFlow()
    heads, tails = np.repeat(np.arange(rows), clusters), np.tile(rows + np.arange(clusters), rows)
    whole = np.round(costs.ravel() * 1e9).astype(np.int64)
    solver.add_arcs_with_capacity_and_unit_cost(heads, tails, np.ones(rows * clusters, int), whole)
    supplies = np.concatenate([np.ones(rows, int), np.full(clusters, -(rows // clusters))])
    solver.set_nodes_supplies(np.arange(rows + clusters), supplies)
    assert solver.solve() == solver.OPTIMAL
    found: npt.NDArray[Any] = solver.flows(np.arange(rows * clusters)).reshape(rows, clusters).argmax(axis=1)
    return found


def kmc_wrapper(data: Rows, centres: Rows, distances: npt.NDArray[np.float64]) -> npt.NDArray[Any]:
    from k_means_constrained import k_means_constrained_ as inside  # type: ignore[import-not-found]

    size = len(data) // len(centres)
    graph = inside.minimum_cost_flow_problem_graph(data, centres, distances, size, size)
    found: npt.NDArray[Any] = inside.solve_min_cost_flow_graph(*graph)
    return found


def assignment(options: argparse.Namespace) -> None:
    """Iterations of balanced Lloyd are the problems: each is solved cold, and warm from the prices before it."""
    have = {"ortools": peer("ortools"), "k-means-constrained": peer("k-means-constrained")}
    print({name: version or "MISSING: no ratio, no pass" for name, version in have.items()})
    print("data | K | iteration | cold ms | warm ms | ortools ms | kmc wrapper ms | optimum | ortools' less ours")
    for kind in options.data.split(","):
        data = synthetic(kind, 0, options.n, options.dim)
        print(Machine(data))
        for clusters in map(int, options.k.split(",")):
            centres, prices = plus_plus(data, clusters, 0).astype(np.float64), None
            sums: dict[str, list[float]] = {"cold": [], "warm": [], "ortools": [], "kmc": []}
            rows = np.arange(len(data))
            for iteration in range(options.iterations):
                costs = (centres**2).sum(axis=1) + 1.0 - 2.0 * (data @ centres.astype(np.float32).T).astype(np.float64)
                cold, found = least(lambda: assign(costs), options.repeat)  # noqa: B023
                warm, again = least(lambda: assign(costs, prices=prices), options.repeat)  # noqa: B023
                ours = float(costs[rows, found.labels].sum())
                assert abs(float(costs[rows, again.labels].sum()) - ours) <= 1e-12 * ours
                line = f"{kind} | {clusters} | {iteration} | {1e3 * cold:.1f} | {1e3 * warm:.1f}"
                sums["cold"].append(cold)
                if iteration:
                    sums["warm"].append(warm)
                theirs, missing = math.nan, math.nan
                if have["ortools"]:
                    theirs, labels = least(lambda: flow(costs), 2)  # noqa: B023
                    missing = float(costs[rows, labels].sum()) - ours
                    assert abs(missing) <= 1e-9 * ours
                    sums["ortools"].append(theirs)
                wrapper = math.nan
                if have["k-means-constrained"]:
                    distances = np.sqrt(np.maximum(costs, 0.0))
                    wrapper, _ = least(lambda: kmc_wrapper(data, centres, distances), 2)  # noqa: B023
                    sums["kmc"].append(wrapper)
                print(f"{line} | {1e3 * theirs:.1f} | {1e3 * wrapper:.0f} | {ours:.9f} | {missing:.1e}", flush=True)
                prices = found.prices
                centres = np.stack([data[found.labels == j].mean(axis=0, dtype=np.float64) for j in range(clusters)])
            mean = {name: sum(values) / len(values) if values else math.nan for name, values in sums.items()}
            _, blas = thin(data, clusters)
            print(
                f"    mean: warm is {mean['warm'] / blas:.2f} × a NumPy product ({1e3 * blas:.1f} ms); kmc wrapper "
                f"{mean['kmc'] / mean['cold']:.0f} × cold, {mean['kmc'] / mean['warm']:.0f} × warm; ortools "
                f"{mean['ortools'] / mean['cold']:.1f} × cold, {mean['ortools'] / mean['warm']:.1f} × warm"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("cluster")
    one.set_defaults(run=cluster)
    one.add_argument("--rows", type=int, default=11008)
    one.add_argument("--dim", type=int, default=4096)
    one.add_argument("--k", default="8,16")
    one.add_argument("--data", default="mix,gauss")
    one.add_argument("--seeds", type=int, default=1)
    one.add_argument("--first-seed", type=int, default=0)
    one.add_argument("--repeat", type=int, default=2)
    one.add_argument("--peer", choices=["kmc", "none"], default="none")
    one.add_argument("--preset", choices=["llama-moe"])
    one.add_argument("--layers", type=int, default=0)
    one.add_argument("--model")
    two = commands.add_parser("assign")
    two.set_defaults(run=assignment)
    two.add_argument("--n", type=int, default=11008)
    two.add_argument("--dim", type=int, default=4096)
    two.add_argument("--k", default="8,16")
    two.add_argument("--data", default="mix,gauss")
    two.add_argument("--iterations", type=int, default=4)
    two.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
