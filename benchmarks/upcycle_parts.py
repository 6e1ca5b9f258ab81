"""What one worker's processor time goes into while it makes a layer, part by part, and what it is at the least.

    python benchmarks/make_source.py /tmp/source --layers 2 --vocab-size 4096
    python benchmarks/upcycle_parts.py /tmp/source model.vocab_size=4096 [--output FOLDER] [--out benchmarks/results]

Two layers in turn, in this one process; the first visits warm memory up, and medians are of the others. A part's time
is its own thread's, without that of parts within it, so that a busy machine changes it little. Without --output the
bytes are hashed and dropped; with it they are written too (4 GB, removed afterwards).
"""

from __future__ import annotations

import argparse
import collections
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from moelab.config.load import load_config
from moelab.config.upcycle import UpcycleConfig
from moelab_upcycling import assembly, dense, maker, neurons, source, streams, worker, writer
from moelab_upcycling.convert import prepare, registry_of

# part -> where its function is looked up
PARTS: dict[str, list[tuple[Any, str]]] = {
    "drawing": [(streams, "fill")],
    "copying rows to their places": [(assembly, "place_rows"), (neurons, "place_rows")],
    "turning down_proj": [(assembly, "transpose_into"), (source, "transpose_into")],
    "moments of rows": [(dense.LoadedMatrix, "sums")],
    "reading the source": [(source.DenseSource, "_read_into")],
    "looking for NaN": [(source, "all_finite")],
    "scaling": [(maker, "scaled")],
    "tables of quantiles": [(streams, "normal_table")],
    "filling buffers": [(writer.ShardWriter, "write")],
}


class Clock:
    """Own processor seconds of each part."""

    def __init__(self) -> None:
        self.seconds: collections.Counter[str] = collections.Counter()
        self._inner = [0.0]

    def of(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed."""

        @functools.wraps(function)
        def timed(*arguments: Any, **keys: Any) -> Any:
            started = time.thread_time()
            self._inner.append(0.0)
            try:
                return function(*arguments, **keys)
            finally:
                spent = time.thread_time() - started
                self.seconds[name] += spent - self._inner.pop()
                self._inner[-1] += spent

        return timed

    @contextmanager
    def everywhere(self) -> Iterator[None]:
        """All PARTS and the hash."""
        with mock.patch.multiple(worker, running=self._running(worker.running)):
            patches = [
                mock.patch.object(place, name, self.of(part, getattr(place, name)))
                for part, places in PARTS.items()
                for place, name in places
            ]
            for patch in patches:
                patch.start()
            try:
                yield
            finally:
                mock.patch.stopall()

    def _running(self, make: Callable[[], Any]) -> Callable[[], Any]:
        def made() -> Any:
            digest = make()
            return mock.Mock(spec_set=["update", "hexdigest"], update=self.of("hashing", digest.update),
                             hexdigest=digest.hexdigest)  # fmt: skip

        return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", type=Path, help="a folder for upcycle_parts.json and .md")
    options = parser.parse_args()
    loaded = load_config(["upcycle/qwen2_57b_a14b", f"source={options.source}", *options.settings], UpcycleConfig)
    plan = prepare(loaded.config, registry_of(loaded.config))
    if options.output:
        options.output.mkdir(parents=True)
    worker._keep_memory()
    made = worker.ShardMaker(plan, str(options.output) if options.output else None)
    rounds = []
    for number in range(options.rounds):
        (shard,) = [i for i, one in enumerate(plan.shards) if one.layer_id == number % 2]
        clock = Clock()
        with clock.everywhere():
            clock.of("the rest", made.do)(worker.Job(shard), lambda nbytes: None)
        rounds.append(clock.seconds)
        if options.output:
            (options.output / plan.shards[shard].file).unlink()
    nbytes = plan.shards[0].nbytes
    results = {part: statistics.median(one[part] for one in rounds[2:]) for part in rounds[-1]}
    results["all"] = statistics.median(sum(one.values()) for one in rounds[2:])
    results |= {f"limit: {name}": seconds for name, seconds in limits(plan.target.hidden_size).items()}
    tell(results, nbytes, options.out)


def limits(width: int) -> dict[str, float]:
    """Seconds for the same work of a layer at 7B's width by the call that numpy does it fastest with."""
    raw, small = np.random.PCG64(0), np.zeros(1 << 15, np.uint16)
    index, table = np.zeros(small.size, np.intp), np.zeros(1 << 16, np.uint16)
    index[:] = raw.random_raw(small.size // 4).view(np.uint16)
    big, other = np.ones(1 << 26, np.uint16), np.ones(1 << 26, np.uint16)
    drawn = 64 * 3 * 1280 * width
    return {
        "raw random bits": drawn * per_value(small.size, lambda: raw.random_raw(small.size // 4)),
        "looking normals up": drawn * per_value(small.size, lambda: table.take(index, out=small, mode="wrap")),
        "copying 4.02 GB in memory": 2.01e9 * per_value(big.size, lambda: np.copyto(other, big)),
    }


def per_value(count: int, work: Callable[[], object]) -> float:
    """Seconds, the least of 20."""
    times = []
    for _ in range(20):
        started = time.thread_time()
        work()
        times.append(time.thread_time() - started)
    return min(times) / count


def tell(results: dict[str, float], nbytes: int, out: Path | None) -> None:
    from report import machine, markdown_table, write_results  # torch comes after the measuring

    ordered = sorted(results.items(), key=lambda item: (item[0].startswith("limit"), -item[1]))
    rows = [[name, f"{seconds:.3f}", f"{seconds / nbytes * 1e9:.3f}"] for name, seconds in ordered]
    table = markdown_table(["part", "processor seconds a layer", "ns a byte written"], rows)
    print(table)
    if out:
        write_results(out, "upcycle_parts", machine() | {"GB a layer": round(nbytes / 1e9, 2)}, results, ["", table])


if __name__ == "__main__":
    main()
