"""From measured rows to a verdict: which implementation `auto` takes on this machine."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import geometric_mean
from typing import Any

import torch

from .. import verdicts
from ..verdicts import Judgment
from .isolated_runner import Job
from .problems import PROBLEMS, SINGLE, cases
from .session import MANY, Settings, case_of, run_session
from .timing import COMPILED, EAGER, OURS

Key = tuple[str, str, str, str]  # operator, class of shapes, dtype, direction

BUDGETS = {"quick": 120, "default": 600, "all": 1200}  # seconds


def jobs_of(extent: str, settings: Settings) -> list[Job]:
    """The cases of an extent: `quick` those of classification, `default` also single images, `all` every size.

    In the interpreter every extent has the same small cases.
    """
    jobs = [(operator, name) for operator in PROBLEMS for name in cases(operator, interpreted=settings.interpreted)]
    if settings.interpreted:
        return jobs
    if extent != "all":
        jobs = [job for job in jobs if "-224" in job[1] or "-256" in job[1]]
    if extent == "quick":
        return [job for job in jobs if not job[1].endswith(SINGLE)]
    return jobs + [(operator, MANY) for operator in PROBLEMS]


@dataclass
class Verification:
    """The records of a session, and the verdict they give. `on_progress` gets one line for each finished case.

    The verdict is written after every timed case, so that an interrupted run keeps what it has.
    """

    settings: Settings
    on_progress: Callable[[str], None] = print
    checks: dict[Job, list[dict]] = field(default_factory=lambda: defaultdict(list))
    rows: list[dict] = field(default_factory=list)

    def run(self, jobs: Sequence[Job]) -> list[Judgment]:
        """Check and time the jobs. Judgments of an earlier verdict stay, for the classes that are not judged now."""
        found = verdicts.environment(self.settings.device)
        self.environment, earlier = found, verdicts.find(self.settings.device)
        self.earlier = earlier[1] if earlier else []
        run_session(jobs, self.settings, self._add)
        return self._write()

    def _add(self, record: dict) -> None:
        if "check" in record:
            check = record["check"]
            self.checks[check["operator"], check["case"]].append(check)
        elif "row" in record:
            self.rows.append(record["row"])
        elif "done" in record:
            operator, case = record["done"]
            timed = any((row["operator"], row["case"]) == (operator, case) for row in self.rows)
            self.on_progress(f"{operator} {case}: {'timed' if timed else 'checked'}")
            if timed:
                self._write()

    def _write(self) -> list[Judgment]:
        new = judge(self.checks, self.rows, self.settings)
        known = {one.key: one for one in [*self.earlier, *new]}
        if known:
            verdicts.write(self.environment, known.values())
        return list(known.values())


def judge(checks: Mapping[Job, Sequence[dict]], rows: Iterable[dict], settings: Settings) -> list[Judgment]:
    """A judgment for each operator, class of shapes, dtype and direction that was timed or failed a check.

    The kernels are taken if they passed every check of every case of the class, and were faster in each of them.
    """
    times: dict[Key, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if "median_us" in row:
            key = row["operator"], row["shape_class"], row["dtype"], row["direction"]
            times[key][row["case"]][row["implementation"]] = row["median_us"]
    failures: dict[Key, list[str]] = defaultdict(list)
    for job, records in checks.items():
        for check in records:
            for key in _keys(job, check["dtype"], settings):
                failures[key] += [f"{job[1]}: {reason}" for reason in check["reasons"]]
    judgments = []
    for key in dict.fromkeys([*times, *(key for key, found in failures.items() if found)]):
        fastest, reason = _faster(times[key], EAGER)
        compiled, _ = _faster(times[key], COMPILED)
        failed, by_case = failures[key], dict(times[key])
        judgments.append(Judgment(*key, fastest, compiled, not failed, "; ".join(failed[:3]) or reason, by_case))
    return judgments


def _keys(job: Job, dtype: str, settings: Settings) -> list[Key]:
    """The keys of the judgments to which a case belongs."""
    problem = PROBLEMS[job[0]](case_of(job, settings), getattr(torch, dtype), "meta")
    works = [problem.workload(training=training) for training in (False, True)]
    return [(job[0], work.shape_class, dtype, work.direction) for work in works]


def _faster(times: Mapping[str, Mapping[str, float]], against: str) -> tuple[str, str]:
    """`triton` if our kernels beat an implementation in every case, else `plain` and the reason."""
    if not times:
        return "plain", "the kernels were not timed"
    for case, by_name in times.items():
        if OURS not in by_name:
            return "plain", f"{case}: the kernels were not timed"
        theirs, ours = by_name.get(against, float("inf")), by_name[OURS]
        if theirs <= ours:
            return "plain", f"{case}: {against} PyTorch takes {theirs:.0f} us, the kernels {ours:.0f} us"
    measured = all(against in by_name for by_name in times.values())
    return ("triton", "") if measured else ("plain", f"{against} PyTorch was not timed")


def summary(judgments: Iterable[Judgment]) -> list[dict[str, Any]]:
    """A row of a table for each judgment: its key, the speed-ups, what `auto` takes, and why not the kernels."""
    rows = []
    for one in sorted(judgments, key=lambda judgment: judgment.key):
        rows.append(
            {
                "operator": one.operator,
                "class": one.shape_class,
                "dtype": one.dtype,
                "direction": one.direction,
                "correct": "yes" if one.correct else "NO",
                "times eager": _speedup(one, EAGER),
                "times compiled": _speedup(one, COMPILED),
                "auto takes": _taken(one),
                "reason": one.reason,
            }
        )
    return rows


def _taken(judgment: Judgment) -> str:
    if not judgment.correct or judgment.fastest == judgment.compiled:
        return judgment.fastest if judgment.correct else "plain"
    return f"{judgment.fastest}; compiled: {judgment.compiled}"


def _speedup(judgment: Judgment, against: str) -> str:
    """How many times faster the kernels are, the geometric mean over the cases."""
    ratios = [t[against] / t[OURS] for t in judgment.microseconds.values() if OURS in t and against in t]
    return f"{geometric_mean(ratios):.2f}" if ratios else ""
