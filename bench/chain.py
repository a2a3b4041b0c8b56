"""Measure the whole forward chain beside its baselines, in one run and in turns.

    python -m bench.chain --kohakuriver .venv/bin/kohakuriver                        everything: table, JSON and plot
    python -m bench.chain --kohakuriver .venv/bin/kohakuriver --gate bench/gates.toml   the ratios that CI enforces

Every figure is a median; a ratio is the median of the ratios of runs that stood side by side, so that a machine that
is busy for a while slows both. Needs Linux, iperf3 and socat; ssh and sshd where that baseline is wanted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.contenders import Contender, KohakuRiver, Relay4, Services, Ssh, Straight, WebSockets4
from bench.measures import MEASURES, RUNS, of_hops, processor_vendor, run_once
from bench.plot import ratio_plot
from bench.slowdown import SlowDown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OURS = KohakuRiver.name
OTHER_HOPS = "other hops"


@dataclass(frozen=True)
class Gate:
    """A bound of a ratio: ours to `baseline`, a hop's to the "other hops", or without a baseline of our own median.

    `of` is which of our paths is meant: through the host ("kohakuriver"), or past it ("straight").
    """

    measure: str
    of: str = OURS
    baseline: str | None = None
    at_least: float | None = None
    at_most: float | None = None

    def value(self, results: Results) -> float:
        if self.baseline is None:
            return results.median(self.measure, self.of)
        if self.baseline == OTHER_HOPS:
            return results.share(self.measure)
        return results.ratio(self.measure, self.baseline, self.of)

    def holds(self, results: Results) -> bool:
        value = self.value(results)
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)

    def __str__(self) -> str:
        return f"≥ {self.at_least}" if self.at_least is not None else f"≤ {self.at_most}"

    def line(self, results: Results) -> str:
        verdict = "ok    " if self.holds(results) else "FAILED"
        of = f"of {self.baseline}" if self.baseline else ""
        path = " straight" if self.of == Straight.name else ""
        return f"{verdict} {self.measure + path:<19} {self.value(results):6.2f} {of:<13} (gate {self})"


@dataclass
class Results:
    """Samples by measure and contender; samples of one index stood side by side."""

    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, contender: str, values: dict[str, float]) -> None:
        for measure, value in values.items():
            self.samples.setdefault(measure, {}).setdefault(contender, []).append(value)

    def median(self, measure: str, contender: str) -> float:
        return statistics.median(self.samples[measure][contender])

    def share(self, measure: str) -> float:
        """One hop's CPU time in terms of what the others need on average, each in its least disturbed run.

        All of them moved the same messages, so it hardly depends on the machine; and whatever else that does can only
        add to a run.
        """
        way = measure.partition("_")[2]
        own, *others = (
            min(self.samples[name][OURS]) for name in sorted(of_hops(way), key=lambda name: name != measure)
        )
        return own / statistics.mean(others)

    def ratio(self, measure: str, baseline: str, of: str = OURS) -> float:
        pairs = zip(self.samples[measure][of], self.samples[measure][baseline], strict=True)
        return statistics.median(ours / base for ours, base in pairs)

    def baselines(self, measure: str) -> list[str]:
        return [name for name in self.samples[measure] if name not in (OURS, Straight.name)]


@contextmanager
def started(contenders: Sequence[Contender]) -> Iterator[None]:
    with ExitStack() as stack:
        services = Services()
        stack.callback(services.close)
        services.start(services)
        for contender in contenders:
            stack.callback(contender.close)
            contender.start(services)
        yield


def measure_in_turns(results: Results, run: str, contenders: Sequence[Contender], rounds: int, seconds: float) -> None:
    for number in range(rounds):
        # Who goes first changes, so that nobody always runs on the machine that another one warmed up.
        shift = number % len(contenders)
        for contender in [*contenders[shift:], *contenders[:shift]]:
            results.add(contender.name, run_once(run, contender, seconds))


def table(results: Results, titles: dict[str, str]) -> str:
    lines = []
    for measure, by_contender in results.samples.items():
        unit = MEASURES[measure].unit
        lines.append(f"{measure:<19} {titles[OURS]:<26} {results.median(measure, OURS):>10.2f} {unit}")
        straight = Straight.name in by_contender
        if straight:
            lines.append(f"{'':<19} {titles[Straight.name]:<26} {results.median(measure, Straight.name):>10.2f} {unit}")
        lines += [
            f"{'':<19} {titles[name]:<26} {results.median(measure, name):>10.2f} {unit:<7}"
            f" ratio {results.ratio(measure, name):.2f}"
            + (f", straight {results.ratio(measure, name, Straight.name):.2f}" if straight else "")
            for name in results.baselines(measure)
        ]
    return "\n".join(lines)


def as_json(results: Results, titles: dict[str, str]) -> dict[str, object]:
    return {
        "machine": {
            "cpus": os.cpu_count(),
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "python": platform.python_version(),
            "loop": os.environ.get("KOHAKURIVER_LOOP", "uvloop"),
        },
        "contenders": titles,
        "measures": {
            measure: {
                "unit": MEASURES[measure].unit,
                "higher_is_better": MEASURES[measure].higher_is_better,
                "samples": by_contender,
                "median": {name: results.median(measure, name) for name in by_contender},
                "ratio": {name: results.ratio(measure, name) for name in results.baselines(measure)},
                "straight_ratio": {
                    name: results.ratio(measure, name, Straight.name)
                    for name in results.baselines(measure)
                    if Straight.name in by_contender
                },
            }
            for measure, by_contender in results.samples.items()
        },
    }


def read_gates(path: Path) -> tuple[list[Gate], dict[str, float]]:
    """The gates and the settings (`rounds`, `seconds`) of a gates.toml, with the bounds of this processor's make."""
    document = tomllib.loads(path.read_text())
    vendor = processor_vendor()
    gates = [{name: _bound(value, vendor) for name, value in gate.items()} for gate in document["gate"]]
    return [Gate(**gate) for gate in gates], document["settings"]


def _bound(value: Any, vendor: str) -> Any:
    """Of a bound for each make of processors that of `vendor`; the widest where there is none for it."""
    return value.get(vendor, max(value.values())) if isinstance(value, dict) else value


def check_gates(
    gates: Sequence[Gate], results: Results, contenders: Sequence[Contender], settings: dict[str, float]
) -> bool:
    """Measure what the gates name. One that fails is measured again twice as long: all samples together decide."""
    rounds, seconds = int(settings["rounds"]), settings["seconds"]
    wanted = {gate.measure for gate in gates}
    for run, measures in RUNS.items():
        if not wanted.intersection(measures):
            continue
        measure_in_turns(results, run, contenders, rounds, seconds)
        missed = [gate.measure for gate in gates if gate.measure in measures and not gate.holds(results)]
        if missed:
            print(f"{run}: measuring again, for {', '.join(missed)}", flush=True)
            measure_in_turns(results, run, contenders, 2 * rounds, seconds)
    for gate in gates:
        print(gate.line(results))
    return all(gate.holds(results) for gate in gates)


def ratio_parser(doc: str | None, output: str) -> argparse.ArgumentParser:
    """The arguments of a program that measures ratios; `output` is the file that it writes."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kohakuriver", type=Path, required=True, help="the program to measure")
    parser.add_argument("--gate", type=Path, metavar="FILE", help="check the ratios of FILE; exit 1 when one fails")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default 5)")
    parser.add_argument("--seconds", type=float, default=2, help="length of one bulk run (default 2)")
    parser.add_argument("--output", type=Path, metavar="DIR", help=f"write {output} into DIR")
    return parser


def write_json(directory: Path | None, name: str, content: object) -> None:
    """Keep what was measured, where somebody wants it kept."""
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(json.dumps(content, indent=1) + "\n")


def exit_code(gates: Sequence[Gate], results: Results) -> int:
    """Print what became of each gate; 1 if one failed."""
    for gate in gates:
        print(gate.line(results))
    return 0 if all(gate.holds(results) for gate in gates) else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kohakuriver", type=Path, required=True, help="the program to measure")
    parser.add_argument("--gate", type=Path, metavar="FILE", help="check the ratios of FILE; exit 1 when one fails")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write chain.json and chain.svg into DIR")
    parser.add_argument("--only", default="", metavar="RUN,…", help=f"of {', '.join(RUNS)}")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender (default 5)")
    parser.add_argument("--seconds", type=float, default=3, help="length of one bulk run (default 3)")
    parser.add_argument("--baselines", default="straight,relay4,websockets4,ssh", metavar="NAME,…")
    parser.add_argument(
        "--slow-down", type=SlowDown.parse, metavar="HOP=PERCENT",
        help="make forward, host or runner burn so much more CPU time than it needs: shows what a gate can see",
    )  # fmt: skip
    return parser.parse_args()


def make_contenders(executable: Path, baselines: set[str], slow_down: SlowDown | None) -> list[Contender]:
    for program in ("iperf3", "socat"):
        if shutil.which(program) is None:
            raise SystemExit(f"{program} is missing: scripts/system-packages bench")
    ours = KohakuRiver(executable, slow_down)
    contenders: list[Contender] = [ours]
    if Straight.name in baselines:
        contenders.append(Straight(ours))
    if "relay4" in baselines:
        contenders.append(Relay4())
    if "websockets4" in baselines:
        contenders.append(WebSockets4())
    if "ssh" in baselines:
        if Ssh.is_here():
            contenders.append(Ssh())
        else:
            print("no ssh baseline: ssh or sshd is missing", file=sys.stderr)
    return contenders


def main() -> int:
    arguments = parse_arguments()
    start, results = time.monotonic(), Results()
    if arguments.gate:
        every_gate, settings = read_gates(arguments.gate)
        gates = [gate for gate in every_gate if gate.measure in MEASURES]
        contenders = make_contenders(
            arguments.kohakuriver,
            {name for gate in gates for name in (gate.baseline, gate.of) if name},
            arguments.slow_down,
        )
        with started(contenders):
            good = check_gates(gates, results, contenders, settings)
    else:
        good = True
        contenders = make_contenders(arguments.kohakuriver, set(arguments.baselines.split(",")), arguments.slow_down)
        runs = [run for run in RUNS if not arguments.only or run in arguments.only.split(",")]
        with started(contenders):
            for run in runs:
                measure_in_turns(results, run, contenders, arguments.rounds, arguments.seconds)
    titles = {contender.name: contender.title for contender in contenders}
    print(table(results, titles))
    print(f"{time.monotonic() - start:.0f} s")
    if arguments.output:
        write_json(arguments.output, "chain.json", as_json(results, titles))
        (arguments.output / "chain.svg").write_text(ratio_plot(results, titles))
    return 0 if good else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what was started is stopped
    sys.exit(main())
