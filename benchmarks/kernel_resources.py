"""Compile every Triton kernel for real GPUs, without one, and hold its registers and spills against docs/kernels.md.

    python benchmarks/kernel_resources.py [--operator NAME] [--write]

Without --write it is a check: it fails where a kernel needs more registers, spills or shared memory than the table of
docs/kernels.md grants, or has no 128-bit load. The kernels are those of a forward and backward pass of every operator's
`CASES` in bfloat16 for sm_90 (H100, H200); the first case of each is compiled for sm_80 and sm_89 too.
"""

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import tessel.kernels

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "kernels.md"
HEADER = ("operator", "case", "kernel", "warps", "registers", "spills", "shared", "wide loads")
MOST_SHARED = 100 << 10  # two programs share a multiprocessor of 228 KB


class Resources(NamedTuple):
    """Of one kernel: registers a thread, spill instructions, bytes of shared memory, 128-bit load instructions."""

    registers: int
    spills: int
    shared: int
    wide_loads: int


def operators() -> dict:
    """Operator name -> (its module, the module of its Triton kernels)."""
    names = sorted(p.name.removesuffix("_triton.py") for p in (ROOT / "kernels").glob("[a-z]*_triton.py"))
    modules = {n: importlib.import_module(f"{tessel.kernels.__name__}.{n}_triton") for n in names}
    return {
        n: (importlib.import_module(f"{tessel.kernels.__name__}.{n}"), m)
        for n, m in modules.items()
        if hasattr(m, "launches")
    }


def build(launch, pointers: dict[str, str], capability: int = 90):
    """The binary of a launch, as Triton would compile it for tensors whose addresses are multiples of 16."""
    names = launch.kernel.arg_names

    def kind(name: str) -> str:
        if name in launch.constants:
            return "constexpr"
        if name.endswith("_ptr"):
            return "*" + pointers.get(name, "bf16")
        return "fp32" if name.startswith("scale") else "i32"

    source = ASTSource(
        launch.kernel,
        {name: kind(name) for name in names},
        {(names.index(name),): value for name, value in launch.constants.items()},
        {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.endswith("_ptr")},
    )
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def measure(binary) -> Resources:
    """Read the resources out of a compiled kernel with the disassembler that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        tools = triton.knobs.nvidia
        usage = _run(tools.cuobjdump.path, "-res-usage", file.name)
        code = _run(tools.nvdisasm.path, "-c", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        sys.exit(f"cuobjdump named no registers: {usage[:500]}")
    spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
    wide = len(re.findall(r"\b(?:LDG|LDGSTS)\.E[.\w]*\.128\b", code))
    return Resources(int(registers[1]), spills, binary.metadata.shared, wide)


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def transposed_products(binary) -> list[str]:
    """Transposes of anything but a loaded tile: a transposed product may silently be wrong on Hopper."""
    lines = binary.asm["ttir"].splitlines()
    defined = {line.split(" = ")[0].strip(): line for line in lines if " = " in line}
    transposes = [line for line in lines if "tt.trans " in line]
    return [t for t in transposes if "tt.load" not in defined[t.split("tt.trans ")[1].split()[0]]]


def survey(only: str | None) -> dict[tuple[str, ...], tuple[int, Resources]]:
    """(operator, case, kernel) -> warps and resources; kernels that compile alike stand under the first case."""
    rows, seen = {}, set()
    jobs = [
        (name, case, kernel, launch, module.POINTERS)
        for name, (operator, module) in operators().items()
        if only in (None, name)
        for case, shape in operator.CASES.items()
        for kernel, launch in module.launches(shape).items()
    ]
    for name, case, kernel, launch, pointers in tqdm(jobs, "compiling", disable=None):
        same = (name, kernel, launch.warps, launch.stages, tuple(sorted(launch.constants.items())))
        if same in seen:
            continue
        seen.add(same)
        if not any(key[0] == name and key[2] == kernel for key in rows):
            for capability in (80, 89):
                build(launch, pointers, capability)
        binary = build(launch, pointers)
        if wrong := transposed_products(binary):
            sys.exit(f"{name}, {case}, {kernel}: a product is transposed: {wrong[0].strip()}")
        rows[name, case, kernel] = launch.warps, measure(binary)
    return rows


def table(rows: dict) -> str:
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    for key, (warps, resources) in rows.items():
        lines.append("| " + " | ".join((*key, str(warps), *map(str, resources))) + " |")
    return "\n".join(lines)


def granted(page: str) -> dict[tuple[str, ...], Resources]:
    """What the table of docs/kernels.md says of each kernel."""
    match = re.search(r"<!-- table: resources -->\n(.*?)<!-- end -->", page, re.DOTALL)
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in match[1].splitlines()[2:]] if match else []
    return {tuple(c[:3]): Resources(*map(int, c[4:])) for c in cells}


def complaints(rows: dict, grants: dict, *, whole: bool) -> list[str]:
    """Each kernel that needs more than it is granted, and each row that has no kernel any more."""
    found = []
    for key, (_, got) in rows.items():
        name, limit = ", ".join(key), grants.get(key)
        if limit is None:
            found.append(f"{name}: not in the table")
        elif got.registers > limit.registers or got.spills > limit.spills or got.shared > limit.shared:
            found.append(f"{name}: needs {got}, granted {limit}")
        elif got.wide_loads < limit.wide_loads:
            found.append(f"{name}: {got.wide_loads} 128-bit loads, had {limit.wide_loads}")
        if got.shared > MOST_SHARED:
            found.append(f"{name}: {got.shared} bytes of shared memory, more than {MOST_SHARED}")
    if whole:
        found += [f"{', '.join(key)}: in the table, but compiled no more" for key in grants.keys() - rows.keys()]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operator", choices=sorted(operators()), help="only this operator; prints its table")
    parser.add_argument("--write", action="store_true", help="write the table instead of checking against it")
    args = parser.parse_args()
    rows = survey(args.operator)
    if args.operator:
        print(table(rows))
    page = PAGE.read_text()
    if args.write:
        if args.operator:
            parser.error("--write takes all operators; leave --operator out")
        new = f"<!-- table: resources -->\n{table(rows)}\n<!-- end -->"
        PAGE.write_text(re.sub(r"<!-- table: resources -->\n.*?<!-- end -->", lambda _: new, page, flags=re.DOTALL))
        return
    if found := complaints(rows, granted(page), whole=args.operator is None):
        sys.exit(
            "\n".join(
                [*found, f"Triton {triton.__version__}; if this is meant: benchmarks/kernel_resources.py --write"]
            )
        )
    print(f"{len(rows)} kernels within {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
