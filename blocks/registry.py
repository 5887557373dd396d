"""The token mixers by name, and the arguments that a mixer's paper gives it in a stage.

`MIXERS` is all that the lab, `tessel compare` and `tessel explain` know of mixers: decorate a class with `token_mixer`
and they have it.
"""

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn


@dataclass(frozen=True)
class Place:
    """Where a mixer stands: `dim` channels, `stride` pixels of the image per position, and, if given, its heads."""

    dim: int
    stride: int = 4
    num_heads: int | None = None

    @property
    def stage(self) -> int:
        """0 to 3 for strides up to 4, 8, 16, and above."""
        return min(max(self.stride.bit_length() - 3, 0), 3)

    @property
    def side(self) -> int:
        """Side of the map of an image of 224 pixels, at least 2."""
        return max(224 // self.stride, 2)


@dataclass(frozen=True)
class TokenMixer:
    """A mixer class, its name in specifications, and its arguments besides `dim`.

    defaults: values, or functions of the `Place`. arguments: name -> type, of all that a specification may set.
    no_weight_decay: last parts of the names of parameters that have two or more dimensions and take no weight decay.
    """

    name: str
    kind: type[nn.Module]
    defaults: Mapping[str, Any]
    arguments: Mapping[str, Any]
    no_weight_decay: frozenset[str]

    def make(self, place: Place, **given: Any) -> nn.Module:
        """The mixer with the arguments `given`, else those of its paper."""
        defaults = {key: value(place) if callable(value) else value for key, value in self.defaults.items()}
        return self.kind(place.dim, **{**defaults, **given})


# name -> mixer, filled by `token_mixer`
MIXERS: dict[str, TokenMixer] = {}


def token_mixers(model: nn.Module) -> dict[str, nn.Module]:
    """The token mixers of `model` by their path, in order; of mixers that consist of others only the outer one."""
    kinds, found, last = {mixer.kind for mixer in MIXERS.values()}, {}, "none"
    for path, module in model.named_modules():
        if (type(module) in kinds or hasattr(module, "specification")) and not path.startswith(f"{last}."):
            found[path], last = module, path
    return found


Class = TypeVar("Class", bound=type[nn.Module])


def token_mixer(
    name: str, *, fixed: Collection[str] = (), no_weight_decay: Collection[str] = (), **defaults: Any
) -> Callable[[Class], Class]:
    """A class decorator that adds a mixer to `MIXERS`.

    defaults: its arguments in a stage by the paper, as values or functions of the `Place`; the others keep the default
    of the constructor. fixed: arguments that a specification may not set, such as those that change the map's shape.
    """

    def add(kind: Class) -> Class:
        parameters = inspect.signature(kind.__init__, eval_str=True).parameters
        arguments = {key: p.annotation for key, p in parameters.items() if key not in ("self", "dim", *fixed)}
        MIXERS[name] = TokenMixer(name, kind, defaults, arguments, frozenset(no_weight_decay))
        return kind

    return add


def by_stage(*values: Any) -> Callable[[Place], Any]:
    """One value for each of the four stages."""
    return lambda place: values[place.stage]


def divisor(target: float, *, step: int = 1) -> Callable[[Place], int]:
    """The divisor of `dim` nearest to `target`, a multiple of `step`; `step` if there is none."""
    return lambda place: _nearest_divisor(place.dim, target, step)


def heads(head_dim: int, *, step: int = 1) -> Callable[[Place], int]:
    """The number of heads that the place has, else that which brings them nearest to `head_dim` channels."""
    return lambda place: place.num_heads or _nearest_divisor(place.dim, place.dim / head_dim, step)


def _nearest_divisor(dim: int, target: float, step: int) -> int:
    divisors = [n for n in range(step, dim + 1, step) if dim % n == 0]
    return min(divisors, key=lambda n: abs(n - target), default=step)
