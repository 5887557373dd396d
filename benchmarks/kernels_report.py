"""Markdown report of benchmarks/kernels.py: goals, cases where a baseline wins, one table per operator."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from tessel.kernels.verification.timing import BOTH, COMPILED, EAGER, FORWARD, OURS, REPLAY


class Goal(NamedTuple):
    """A speed-up of our kernels that all cases of an operator whose names match must reach."""

    operator: str
    cases: str  # regular expression
    direction: str
    against: str  # a baseline, or "floor" for the lower bound of the time
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
    """Rows of a benchmark, indexed by (operator, case, direction, implementation)."""

    def __init__(self, rows: Iterable[dict]):
        self.rows = {(r["operator"], r["case"], r["direction"], r["implementation"]): r for r in rows}
        self.measured = list(dict.fromkeys(key[:3] for key in self.rows))

    def median(self, at: tuple[str, str, str], implementation: str) -> float | None:
        return self.rows.get((*at, implementation), {}).get("median_us")

    def best_baseline(self, at: tuple[str, str, str]) -> tuple[str, float] | None:
        """Return the fastest implementation that is not ours, and its time in microseconds."""
        names = [key[3] for key in self.rows if key[:3] == at and key[3] not in (OURS, REPLAY)]
        times = [(name, t) for name in names if (t := self.median(at, name)) is not None]
        return min(times, key=lambda pair: pair[1]) if times else None

    def ratio(self, at: tuple[str, str, str], baseline: str) -> float | None:
        """Return how many times faster ours is than the baseline; for "floor", how many times slower than the floor."""
        ours = self.rows.get((*at, OURS), {})
        if ours.get("median_us") is None:
            return None
        if baseline == "floor":
            return ours["median_us"] / ours["floor_us"]
        theirs = self.median(at, baseline)
        return None if theirs is None else theirs / ours["median_us"]


def lost_cases(times: Times) -> list[str]:
    """Describe the cases in which a baseline is faster than ours."""
    found = []
    for at in times.measured:
        ours, best = times.median(at, OURS), times.best_baseline(at)
        if ours is not None and best is not None and best[1] < ours:
            found.append(f"{', '.join(at)}: {best[0]} takes {best[1]:.1f} us, ours {ours:.1f} us")
    return found


def goal_status(goal: Goal, times: Times) -> str:
    """Return the goal with "met", "met where measured" (some cases have no time), "not met" or "not measured"."""
    at = [k for k in times.measured if k[0] == goal.operator and k[2] == goal.direction and re.search(goal.cases, k[1])]
    ratios = {k[1]: times.ratio(k, goal.against) for k in at}
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
                    _number(times.ratio(at, EAGER), ".2f"),
                    _number(times.ratio(at, COMPILED), ".2f"),
                    best[0] if best else "",
                    _number(times.ratio(at, best[0]) if best else None, ".2f"),
                )
            )
        )
    return lines


def _section(title: str, entries: list[str], none: str) -> list[str]:
    return [f"## {title}", "", *([f"- {entry}" for entry in entries] or [none]), ""]


def check_lines(checks: list[dict]) -> list[str]:
    """Describe every failed correctness check, and the largest error of each operator and dtype among the others."""
    lines = [
        f"{c['operator']}, {c['case']}, {c['dtype']}: failed: {'; '.join(c['reasons'])}"
        for c in checks
        if not c["passed"]
    ]
    passed = [c for c in checks if c["passed"]]
    for operator, dtype in dict.fromkeys((c["operator"], c["dtype"]) for c in passed):
        errors = [
            (error, name, eager)
            for c in passed
            if (c["operator"], c["dtype"]) == (operator, dtype)
            for name, (error, eager) in c["errors"].items()
        ]
        count = sum((c["operator"], c["dtype"]) == (operator, dtype) for c in passed)
        worst, name, eager = max(errors)
        lines.append(f"{operator}, {dtype}: {count} passed; largest error {worst:.1e} ({name}; eager {eager:.1e})")
    return lines


def report(results: dict) -> str:
    """Return the whole report."""
    times = Times(results["rows"])
    facts = ", ".join(f"{key} {value}" for key, value in results["facts"].items())
    lines = ["# Kernels and their baselines", "", facts, ""]
    if results["dry_run"]:
        lines += ["A dry run: small cases in the interpreter; nothing was timed.", ""]
    lines += _section("Goals", [goal_status(goal, times) for goal in GOALS], "")
    lines += _section("Cases where a baseline wins", lost_cases(times), "None among the measured cases.")
    lines += _section("Correctness checks", check_lines(results["checks"]), "None was run.")
    for operator in dict.fromkeys(at[0] for at in times.measured):
        lines += [f"## {operator}", "", *table(times, operator), ""]
    missing = [
        f"{r['operator']}, {r['case']}, {r['direction']}, {r['implementation']}: {r['reason']}"
        for r in results["rows"]
        if "reason" in r
    ]
    lines += _section("Not measured", missing, "Every implementation ran.")
    return "\n".join(lines)
