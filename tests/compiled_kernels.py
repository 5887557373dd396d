"""Triton kernels compiled ahead of time for real GPUs, without one; run by test_kernels.py."""

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tessel.kernels import routed_triton
from tessel.kernels.routed import CASES

POINTERS = {"index_ptr": "*i32", "list_ptr": "*i32", "count_ptr": "*i32", "lse_ptr": "*fp32", "delta_ptr": "*fp32"}
KERNELS = ("_forward_kernel", "_query_backward_kernel", "_key_backward_kernel")


def compile_for(kernel, constants: dict, *, warps: int, capability: int = 90):
    names = kernel.arg_names
    signature = {
        name: "constexpr"
        if name in constants
        else POINTERS.get(name, "*bf16")
        if name.endswith("_ptr")
        else "fp32"
        if name.startswith("scale")
        else "i32"
        for name in names
    }
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.endswith("_ptr")}
    source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()}, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_routed_compiles(case, kernel):
    _, (height, width), (rows, cols), _, head_dim, topk = case
    own, partner, warps = routed_triton.tiles((height // rows) * (width // cols))
    constants = {"D": head_dim, "PAD_D": head_dim, "TOPK": topk, "INTERPRET": False, "TILE_Q": own, "TILE_K": partner}
    if kernel == "_key_backward_kernel":
        del constants["TOPK"]
        constants |= {"TILE_Q": partner, "TILE_K": own}
    compiled = compile_for(getattr(routed_triton, kernel), constants, warps=warps)
    assert compiled.metadata.shared <= 100 << 10
    assert "ld.global.v4" in compiled.asm["ptx"] or "cp.async" in compiled.asm["ptx"], "128-bit loads"
    # a transposed product may be silently wrong on Hopper: only loaded tiles are transposed
    ir = compiled.asm["ttir"]
    defined = {line.split(" = ")[0].strip(): line for line in ir.splitlines() if " = " in line}
    for line in ir.splitlines():
        if "tt.trans" in line:
            operand = line.split("tt.trans ")[1].split()[0]
            assert "tt.load" in defined[operand], line


@pytest.mark.parametrize("capability", [80, 89])
def test_routed_compiles_for_older_gpus(capability):
    constants = {"D": 32, "PAD_D": 32, "TOPK": 4, "INTERPRET": False, "TILE_Q": 16, "TILE_K": 64}
    assert compile_for(routed_triton._forward_kernel, constants, warps=2, capability=capability).asm["cubin"]


def test_inverse_list_compiles():
    assert compile_for(routed_triton._invert_kernel, {"TOPK": 16, "PAD_K": 16, "TILE": 32}, warps=4).asm["cubin"]
