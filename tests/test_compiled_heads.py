"""Whole segmenters under torch.compile: losses and gradients are those of eager execution."""

from typing import Any

import pytest
import recipe_runner
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from tessel.train.recipe.schema import Dense, Model
from tessel.train.tasks.segment.model import build_segmenter
from tessel.train.tasks.segment.options import SegmentOptions

# where a graph ends, torch reads the gradient of its outputs, and warns that they have none
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

PEM = SegmentOptions(decode_head={"type": "PEM", **recipe_runner.NARROW_PEM})
FREQFUSION = SegmentOptions(
    decode_head={"type": "FPNHead", "channels": 8}, neck={"type": "FreqFusion", "out_channels": 8, "compressed": 8}
)


def learned(model: Any, run: Any, *batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch, computed by `run`, and the gradients of the model's weights."""
    torch.manual_seed(1)  # of the points at which masks are compared
    model.zero_grad()
    loss = torch.stack([value for name, value in run(*batch).items() if "loss" in name]).sum()
    loss.backward()
    return loss.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.large
@pytest.mark.parametrize("options", [PEM, FREQFUSION], ids=["PEM", "FreqFusion"])
def test_losses_and_gradients_are_those_of_eager_execution(options):
    torch.manual_seed(0)
    model: Any = build_segmenter(Model(name="test_convnext"), options, dense=Dense(), classes=list("abcdef"), size=64)
    torch.compiler.reset()
    counters.clear()
    compiled, graphs = torch.compile(model), []
    for count in (3, 6):  # another number of objects compiles nothing anew
        batch = torch.randn(2, 3, 97, 67), torch.randint(count, (2, 97, 67))
        (loss, gradients), (found, ours) = learned(model, model, *batch), learned(model, compiled, *batch)
        torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-5)
        for name, want in gradients.items():
            assert float((ours[name] - want).norm() / (want.norm() + 1e-3)) < 1e-3, name
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0
