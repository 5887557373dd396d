"""Triton kernels in the CPU interpreter under torch.compile, torch.export, autocast and partly frozen inputs.

Run by test_kernels.py.
"""

import interpreted_aggregated
import interpreted_halo
import interpreted_window
import pytest
import torch
from interpreter import poisoned_memory  # noqa: F401  (a fixture)
from torch import nn
from torch.export import Dim

from tessel.kernels import aggregated_attention, halo_attention, routed_attention, window_attention


class Operator(nn.Module):
    """A module that calls one operator, for tracing."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, x, *others):
        if self.name == "window":
            taps = others if len(others) == 4 else None
            lepe = None if taps is None else [taps[:2], taps[2:]]
            return window_attention(x, windows=((x.shape[1], 2), (2, x.shape[2])), lepe=lepe, backend="triton")
        if self.name == "halo":
            return halo_attention(x, *others, block_size=2, halo_size=1, backend="triton")
        if self.name == "routed":
            return routed_attention(x, others[0], grid=(2, 2), scale=0.3, backend="triton")
        return interpreted_aggregated.call(aggregated_attention, (x, *others[:-2]), others[-2:], backend="triton")


def arguments(name, batch=1, size=(4, 6), dtype=torch.float64):
    if name == "window":
        return interpreted_window.inputs((batch, size, 2, 8, ((1, 1), (1, 1)), True), dtype)
    if name == "halo":
        return interpreted_halo.inputs((batch, size, 1, 8, 8, 2, 1, 1), dtype)[0]
    if name == "routed":
        qkv = torch.randn(batch, *size, 3, 1, 8, dtype=torch.float64).to(dtype).requires_grad_()
        return [qkv, torch.rand(batch, 4, 4).topk(2).indices]
    tensors, indices = interpreted_aggregated.inputs((batch, size, (2, 3), 1, 8, None), dtype)
    return [*tensors, *indices]


NAMES = ("window", "halo", "routed", "aggregated")


def value_and_grads(call, inputs):
    y = call(*inputs)
    return y.detach(), torch.autograd.grad(y.square().sum(), [x for x in inputs if x.requires_grad])


@pytest.mark.parametrize("name", NAMES)
def test_inductor_compiles_one_graph(name):
    inputs, operator = arguments(name), Operator(name)
    compiled = torch.compile(operator, fullgraph=True)
    torch.testing.assert_close(value_and_grads(compiled, inputs), value_and_grads(operator, inputs))
    torch._dynamo.reset()


@pytest.mark.parametrize("name", NAMES)
def test_exports_as_one_node_with_dynamic_sizes(name):
    inputs, operator = [x.detach() for x in arguments(name, batch=2)], Operator(name)
    # the bias table of aggregated attention is made for one size of the map
    free = {0: Dim.AUTO} if name == "aggregated" else {0: Dim.AUTO, 1: Dim.AUTO, 2: Dim.AUTO}
    maps = {"window": 1, "halo": 2, "routed": 1, "aggregated": 2}[name]
    shapes = [free] * maps + [None] * (len(inputs) - maps)
    if name == "routed":
        shapes[1] = {0: Dim.AUTO}
    dynamic = {"x": shapes[0], "others": tuple(shapes[1:])}
    program = torch.export.export(operator, tuple(inputs), dynamic_shapes=dynamic)
    # a region without autocast is exported as a subgraph
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    targets = [str(node.target) for graph in graphs for node in graph.nodes]
    assert sum(target.startswith("tessel.") for target in targets) == 1
    size = (4, 6) if name == "aggregated" else (6, 8)
    others = [x.detach() for x in arguments(name, batch=3, size=size)]
    torch.testing.assert_close(program.module()(*others), operator(*others))


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name):
    exact = [x.detach() for x in arguments(name)]
    single = [x.float() if x.is_floating_point() else x for x in exact]
    with torch.autocast("cpu", torch.bfloat16):
        y = Operator(name)(*single)
    expected = Operator(name)(*exact)
    assert y.dtype == torch.bfloat16
    assert (y.double() - expected).norm() / expected.norm() < 2e-2


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_of_one_input_alone(name, compiled):
    """All other inputs are frozen; the gradient must equal that with all inputs trainable."""
    inputs, operator = arguments(name), Operator(name)
    trainable = [i for i, x in enumerate(inputs) if x.requires_grad]
    _, want = value_and_grads(operator, inputs)
    call = torch.compile(operator, fullgraph=True, backend="aot_eager") if compiled else operator
    for i in (trainable[0], trainable[-1]):
        alone = [x.detach().requires_grad_() if n == i else x.detach() for n, x in enumerate(inputs)]
        _, (got,) = value_and_grads(call, alone)
        torch.testing.assert_close(got, want[trainable.index(i)])
    torch._dynamo.reset()
