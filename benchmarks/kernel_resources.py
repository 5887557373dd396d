"""Compile every Triton kernel for NVIDIA GPUs, on a machine without one, and check its registers and spills.

    python benchmarks/kernel_resources.py [--operator NAME] [--write]

The check compares with the table in docs/kernels.md and fails if a kernel needs more registers, spills or shared memory
than it says, or has fewer 128-bit loads. With --write the table is written instead. The kernels are those of a forward
and backward pass of every operator's `CASES` in bfloat16 for sm_90 (H100, H200); the first case of each kernel is also
compiled for sm_80 and sm_89.
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
from tessel.kernels.triton_common import KernelSpec

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "kernels.md"
HEADER = ("operator", "case", "kernel", "warps", "registers", "spills", "shared", "wide loads")
MAX_SHARED = 100 << 10  # bytes; leaves room for two programs on a multiprocessor of 228 KB


class Resources(NamedTuple):
    """What one kernel uses: registers per thread, spill instructions, bytes of shared memory, 128-bit loads."""

    registers: int
    spills: int
    shared: int
    wide_loads: int


def operators() -> dict:
    """Operator name -> (its package, the module of its Triton kernels)."""
    names = sorted(p.parent.name for p in (ROOT / "kernels").glob("*/triton.py"))
    package = tessel.kernels.__name__
    return {n: tuple(importlib.import_module(f"{package}.{n}{module}") for module in ("", ".triton")) for n in names}


def build(spec: KernelSpec, pointer_types: dict[str, str], capability: int = 90):
    """Compile a kernel as Triton would for bfloat16 tensors whose addresses are multiples of 16.

    `pointer_types` names the type of the pointers that are not bfloat16.
    """
    names = spec.kernel.arg_names

    def kind(name: str) -> str:
        if name in spec.constants:
            return "constexpr"
        if name.endswith("_ptr"):
            return "*" + pointer_types.get(name, "bf16")
        return "fp32" if name.startswith("scale") else "i32"

    source = ASTSource(
        spec.kernel,
        {name: kind(name) for name in names},
        {(names.index(name),): value for name, value in spec.constants.items()},
        {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.endswith("_ptr")},
    )
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def measure(binary) -> Resources:
    """Read the resources of a compiled kernel with the disassembler that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        tools = triton.knobs.nvidia
        usage = _run(tools.cuobjdump.path, "-res-usage", file.name)
        code = _run(tools.nvdisasm.path, "-c", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        sys.exit(f"cuobjdump printed no registers: {usage[:500]}")
    spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
    wide = len(re.findall(r"\b(?:LDG|LDGSTS)\.E[.\w]*\.128\b", code))
    return Resources(int(registers[1]), spills, binary.metadata.shared, wide)


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def transposed_products(binary) -> list[str]:
    """Return the transposes of anything but a loaded tile. A transposed product may be silently wrong on Hopper."""
    lines = binary.asm["ttir"].splitlines()
    defined = {line.split(" = ")[0].strip(): line for line in lines if " = " in line}
    transposes = [line for line in lines if "tt.trans " in line]
    return [t for t in transposes if "tt.load" not in defined[t.split("tt.trans ")[1].split()[0]]]


def survey(only: str | None) -> dict[tuple[str, ...], tuple[int, Resources]]:
    """Compile and measure: (operator, case, kernel) -> (warps, resources).

    Kernels that compile to the same binary appear once, under the first case that uses them. Exits if a kernel
    transposes a product.
    """
    rows, seen = {}, set()
    jobs = [
        (name, case, kernel, spec, module.POINTER_TYPES)
        for name, (operator, module) in operators().items()
        if only in (None, name)
        for case, shape in operator.CASES.items()
        for kernel, spec in module.aot_specs(shape).items()
    ]
    for name, case, kernel, spec, pointer_types in tqdm(jobs, "compiling", disable=None):
        same = (name, kernel, spec.num_warps, spec.num_stages, tuple(sorted(spec.constants.items())))
        if same in seen:
            continue
        seen.add(same)
        if not any(key[0] == name and key[2] == kernel for key in rows):
            for capability in (80, 89):
                build(spec, pointer_types, capability)
        binary = build(spec, pointer_types)
        if wrong := transposed_products(binary):
            sys.exit(f"{name}, {case}, {kernel}: a product is transposed: {wrong[0].strip()}")
        rows[name, case, kernel] = spec.num_warps, measure(binary)
    return rows


def table(rows: dict) -> str:
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    for key, (warps, resources) in rows.items():
        lines.append("| " + " | ".join((*key, str(warps), *map(str, resources))) + " |")
    return "\n".join(lines)


def documented(page: str) -> dict[tuple[str, ...], Resources]:
    """Read the table of docs/kernels.md: (operator, case, kernel) -> resources."""
    match = re.search(r"<!-- table: resources -->\n(.*?)<!-- end -->", page, re.DOTALL)
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in match[1].splitlines()[2:]] if match else []
    return {tuple(c[:3]): Resources(*map(int, c[4:])) for c in cells}


def regressions(rows: dict, expected: dict, *, complete: bool) -> list[str]:
    """Return a message for each kernel that needs more than the table says and, if `complete`, for each stale row."""
    found = []
    for key, (_, got) in rows.items():
        name, limit = ", ".join(key), expected.get(key)
        if limit is None:
            found.append(f"{name}: not in the table")
        elif got.registers > limit.registers or got.spills > limit.spills or got.shared > limit.shared:
            found.append(f"{name}: needs {got}, the table says {limit}")
        elif got.wide_loads < limit.wide_loads:
            found.append(f"{name}: {got.wide_loads} 128-bit loads, the table says {limit.wide_loads}")
        if got.shared > MAX_SHARED:
            found.append(f"{name}: {got.shared} bytes of shared memory, more than {MAX_SHARED}")
    if complete:
        found += [f"{', '.join(key)}: in the table, but no longer compiled" for key in expected.keys() - rows.keys()]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operator", choices=sorted(operators()), help="check only this operator and print its table")
    parser.add_argument("--write", action="store_true", help="write the table to docs/kernels.md")
    args = parser.parse_args()
    rows = survey(args.operator)
    if args.operator:
        print(table(rows))
    page = PAGE.read_text()
    if args.write:
        if args.operator:
            parser.error("--write needs all operators; leave out --operator")
        new = f"<!-- table: resources -->\n{table(rows)}\n<!-- end -->"
        PAGE.write_text(re.sub(r"<!-- table: resources -->\n.*?<!-- end -->", lambda _: new, page, flags=re.DOTALL))
        return
    if found := regressions(rows, documented(page), complete=args.operator is None):
        hint = f"Triton {triton.__version__}; if the change is intended: benchmarks/kernel_resources.py --write"
        sys.exit("\n".join([*found, hint]))
    print(f"{len(rows)} kernels within {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
