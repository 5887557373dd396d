"""Golden records: the outputs and gradients of published models in float64, for generated weights and inputs.

A record (`tests/goldens/*.json.gz`) lists the keys and shapes of the published checkpoint, and what the published code
returned for the weights that `draw` generates from these keys.
"""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

RECORDS = Path(__file__).parent / "goldens"


def load(name: str) -> dict[str, Any]:
    with gzip.open(RECORDS / f"{name}.json.gz", "rt") as file:
        return json.load(file)


def draw(name: str, shape) -> Tensor:
    """Standard normal numbers with a random seed derived from `name`."""
    numbers = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))
    return torch.from_numpy(np.asarray(numbers))


def published_state(record: dict[str, Any]) -> dict[str, Tensor]:
    """The weights that belong to a record, by their published keys, without integer buffers."""
    state = {key: _weight(key, shape) for key, shape in record["state"]}
    for key, shape, value in record.get("constants", ()):
        state[key] = torch.full(tuple(shape), float(value), dtype=torch.float64)
    return state


def _weight(key: str, shape) -> Tensor:
    x, leaf = draw(key, shape), key.rpartition(".")[2]
    if len(shape) >= 2:
        return x / np.sqrt(np.prod(shape[1:]))
    if leaf == "running_var":
        return 1 + 0.1 * x.abs()
    if leaf in ("bias", "running_mean") or leaf.endswith("_bias"):
        return 0.1 * x
    return 1 + 0.1 * x


def relative_error(got: Tensor, want) -> float:
    want = torch.as_tensor(want, dtype=torch.float64).flatten()
    return float((got.detach().flatten() - want).norm() / want.norm())


def errors(record: dict[str, Any], *, logits: Tensor, features: list[Tensor]) -> dict[str, float]:
    """Relative errors of the logits and of each feature map, pooled to 2 x 2 as in the record."""
    found = {"logits": relative_error(logits, record["logits"])}
    for i, (feature, want) in enumerate(zip(features, record["features"], strict=True)):
        assert list(feature.shape) == want["shape"]
        pooled = torch.nn.functional.adaptive_avg_pool2d(feature, 2)
        found[f"feature {i}"] = relative_error(pooled, want["pooled"])
    return found


def gradient_errors(record: dict[str, Any], *, input_grad: Tensor, grads: dict[str, Tensor]) -> dict[str, float]:
    """Relative errors of gradient norms: of the input, and of every parameter by its published key."""
    floor = 1e-6 * record["input_grad_norm"]
    found = {"input": abs(float(input_grad.norm()) / record["input_grad_norm"] - 1)}
    assert set(grads) == set(record["grad_norms"])
    for key, want in record["grad_norms"].items():
        found[key] = abs(float(grads[key].norm()) - want) / max(abs(want), floor)
    return found
