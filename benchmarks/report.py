"""What the rows of benchmarks/kernels.py amount to: a table for each operator, where a baseline wins, the goals."""

import re
from collections.abc import Iterable
from typing import NamedTuple

FORWARD, BOTH = "forward", "forward+backward"
OURS, EAGER, COMPILED, REPLAY = "triton", "eager", "compiled", "triton, CUDA graph"


class Goal(NamedTuple):
    """Ours against a contender, or against the floor, over the cases of an operator whose names match."""

    operator: str
    cases: str
    direction: str
    against: str
    factor: float

    def text(self) -> str:
        relation = f"<= {self.factor}x the floor" if self.against == "floor" else f">= {self.factor}x {self.against}"
        return f"{self.operator} ({self.cases}), {self.direction}: {relation}"


GOALS = (
    Goal("routed", "-224$", BOTH, EAGER, 3.0),
    Goal("routed", "-224$", BOTH, COMPILED, 1.5),
    Goal("aggregated", "-224$", BOTH, EAGER, 3.0),
    Goal("aggregated", "-224$", BOTH, COMPILED, 1.5),
    Goal("window", "^cswin.*-224$", BOTH, EAGER, 2.0),
    Goal("halo", "-256$", BOTH, EAGER, 3.0),
    Goal("window", "-224-windows$", FORWARD, "floor", 1.7),
)


class Times:
    """Rows by what they measured."""

    def __init__(self, rows: Iterable[dict]):
        self.rows = {(r["operator"], r["case"], r["direction"], r["contender"]): r for r in rows}
        self.measured = list(dict.fromkeys(key[:3] for key in self.rows))

    def median(self, at: tuple[str, str, str], contender: str) -> float | None:
        return self.rows.get((*at, contender), {}).get("median_us")

    def best_baseline(self, at: tuple[str, str, str]) -> tuple[str, float] | None:
        """The fastest contender that is not ours, and its time."""
        names = [key[3] for key in self.rows if key[:3] == at and key[3] not in (OURS, REPLAY)]
        times = [(name, t) for name in names if (t := self.median(at, name)) is not None]
        return min(times, key=lambda pair: pair[1]) if times else None

    def against(self, at: tuple[str, str, str], contender: str) -> float | None:
        """How many times faster ours is than the contender; of the floor, how many times slower."""
        ours = self.rows.get((*at, OURS), {})
        if ours.get("median_us") is None:
            return None
        if contender == "floor":
            return ours["median_us"] / ours["floor_us"]
        theirs = self.median(at, contender)
        return None if theirs is None else theirs / ours["median_us"]


def losses(times: Times) -> list[str]:
    found = []
    for at in times.measured:
        ours, best = times.median(at, OURS), times.best_baseline(at)
        if ours is not None and best is not None and best[1] < ours:
            found.append(f"{', '.join(at)}: {best[0]} takes {best[1]:.1f} us, ours {ours:.1f} us")
    return found


def verdict(goal: Goal, times: Times) -> str:
    """Met, not met or not measured; a goal is met only where every case that was tried has a figure."""
    at = [k for k in times.measured if k[0] == goal.operator and k[2] == goal.direction and re.search(goal.cases, k[1])]
    ratios = {k[1]: times.against(k, goal.against) for k in at}
    known = {case: ratio for case, ratio in ratios.items() if ratio is not None}
    if not known:
        return f"{goal.text()}: not measured"
    worst = (max if goal.against == "floor" else min)(known, key=lambda case: known[case])
    fine = known[worst] <= goal.factor if goal.against == "floor" else known[worst] >= goal.factor
    state = "not met" if not fine else "met" if len(known) == len(ratios) else "met where measured"
    return f"{goal.text()}: {state} (worst {known[worst]:.2f}x at {worst}; {len(known)} of {len(ratios)} cases)"


def _line(cells: Iterable) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def table(times: Times, operator: str) -> list[str]:
    head = ("case", "direction", "ours, us", "p20-p80", "% of floor", "CUDA graph, us", "host, us", "peak MiB")
    lines = [_line((*head, "times eager", "times compiled", "best baseline", "times best")), "|" + "---|" * 12]
    for at in times.measured:
        if at[0] != operator:
            continue
        ours, best = times.rows.get((*at, OURS), {}), times.best_baseline(at)
        spread = f"{ours['p20_us']:.1f}-{ours['p80_us']:.1f}" if ours.get("p20_us") is not None else ""
        lines.append(
            _line(
                (
                    *at[1:],
                    _number(ours.get("median_us"), ".1f"),
                    spread,
                    _number(ours.get("floor_percent"), ".0f"),
                    _number(times.median(at, REPLAY), ".1f"),
                    _number(ours.get("host_us"), ".0f"),
                    _number(ours.get("peak_mib"), ".0f"),
                    _number(times.against(at, EAGER), ".2f"),
                    _number(times.against(at, COMPILED), ".2f"),
                    best[0] if best else "",
                    _number(times.against(at, best[0]) if best else None, ".2f"),
                )
            )
        )
    return lines


def _listed(title: str, entries: list[str], none: str) -> list[str]:
    return [f"## {title}", "", *([f"- {entry}" for entry in entries] or [none]), ""]


def gate_lines(gates: list[dict]) -> list[str]:
    """The failed ones in full; of the others the largest error of each operator and type."""
    lines = [
        f"{g['operator']}, {g['case']}, {g['dtype']}: failed: {'; '.join(g['reasons'])}"
        for g in gates
        if not g["passed"]
    ]
    passed = [g for g in gates if g["passed"]]
    for operator, dtype in dict.fromkeys((g["operator"], g["dtype"]) for g in passed):
        errors = [
            (error, name, eager)
            for g in passed
            if (g["operator"], g["dtype"]) == (operator, dtype)
            for name, (error, eager) in g["errors"].items()
        ]
        count = sum((g["operator"], g["dtype"]) == (operator, dtype) for g in passed)
        worst, name, eager = max(errors)
        lines.append(f"{operator}, {dtype}: {count} passed; largest error {worst:.1e} ({name}; eager {eager:.1e})")
    return lines


def report(results: dict) -> str:
    """The whole page."""
    times = Times(results["rows"])
    facts = ", ".join(f"{key} {value}" for key, value in results["facts"].items())
    lines = ["# Kernels against their baselines", "", facts, ""]
    if results["dry_run"]:
        lines += ["A dry run: stand-ins in the interpreter, nothing was timed.", ""]
    lines += _listed("Goals", [verdict(goal, times) for goal in GOALS], "")
    lines += _listed("Where a baseline wins", losses(times), "Nowhere among what was measured.")
    lines += _listed("Gates", gate_lines(results["gates"]), "None was reached.")
    for operator in dict.fromkeys(at[0] for at in times.measured):
        lines += [f"## {operator}", "", *table(times, operator), ""]
    missing = [
        f"{r['operator']}, {r['case']}, {r['direction']}, {r['contender']}: {r['reason']}"
        for r in results["rows"]
        if "reason" in r
    ]
    lines += _listed("Not measured", missing, "Every contender ran.")
    return "\n".join(lines)
