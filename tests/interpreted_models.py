"""Whole models: Triton kernels in the CPU interpreter against plain PyTorch; run by test_kernels.py."""

import pytest
import timm
import torch
from interpreter import poisoned_memory  # noqa: F401  (a fixture)
from torch.utils._python_dispatch import TorchDispatchMode

import tessel.zoo  # noqa: F401  (registers the models)
from tessel.kernels import dispatch

# the smallest model of each family that has an operator, and its operator
MODELS = {
    "biformer_atto": "routed",
    "cswin_atto": "window",
    "litv2_atto": "window",
    "tessel_davit_atto": "window",
    "tessel_halonet_atto": "halo",
    "transnext_atto": "aggregated",
}


class Calls(TorchDispatchMode):
    """Records the names of this package's torch operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "tessel":
            self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


def logits_and_gradients(model, x) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    y = model(x)
    return {"logits": y.detach(), **dict(zip(names, torch.autograd.grad(y.sin().sum(), parameters), strict=True))}


@pytest.mark.parametrize(("name", "operator"), MODELS.items(), ids=MODELS)
def test_models_agree_on_both_paths(name, operator, monkeypatch):
    # eval mode, because batch norm cannot normalize maps of one pixel
    model = timm.create_model(name, num_classes=3, drop_path_rate=0.0).double().eval()
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    monkeypatch.setattr(dispatch, "default_backend", "reference")
    want = logits_and_gradients(model, x)
    monkeypatch.setattr(dispatch, "default_backend", "triton")
    with Calls() as calls:
        got = logits_and_gradients(model, x)
    assert calls.names == {f"{operator}_attention", f"{operator}_attention_backward"}
    # Tolerance relative to the largest gradient: some are zero except for rounding (a bias common to all keys)
    largest = max(gradient.abs().max().item() for gradient in want.values())
    for parameter, value in want.items():
        torch.testing.assert_close(
            got[parameter], value, rtol=1e-12, atol=1e-12 * largest, msg=lambda m, p=parameter: f"{p}: {m}"
        )
