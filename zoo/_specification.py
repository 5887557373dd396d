"""The language of the lab: which mixers the stages of a model have, as text.

    cross_shaped_window(stripe_width=7) | hilo(alpha=0.9) | bi_level_routing(topk=4), channel | full_attention

`|` separates stages; the mixers between commas alternate in the blocks of a stage. A mixer is a name of
`tessel.blocks.MIXERS`, with arguments by name, whose values are literals of Python. The beginning of an argument's name
is enough if no other begins like it. Arguments that are not given are those of the mixer's paper in such a stage.
"""

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..blocks import MIXERS, Place, TokenMixer
from ._keymap import nearest


@dataclass(frozen=True)
class MixerSpec:
    """A mixer with the arguments that a specification gives it; `str` is its specification."""

    mixer: TokenMixer
    arguments: Mapping[str, Any]

    def __str__(self) -> str:
        given = ", ".join(f"{key}={value!r}" for key, value in self.arguments.items())
        return f"{self.mixer.name}({given})" if given else self.mixer.name

    def make(self, place: Place) -> nn.Module:
        """The mixer, with its specification in the attribute `specification`."""
        mixer = self.mixer.make(place, **self.arguments)
        mixer.specification = str(self)  # type: ignore[assignment]
        return mixer


def parse_mixers(text: str, stages: int) -> list[tuple[MixerSpec, ...]]:
    """The mixers of each stage; one stage alone stands for all. Raises ValueError that names the wrong part."""
    parts = text.split("|")
    if len(parts) not in (1, stages):
        raise ValueError(f"mixers={text!r} has {len(parts)} stages separated by '|'; give {stages}, or one for all")
    return [parse_stage(part) for part in parts] * (stages // len(parts))


def parse_stage(text: str) -> tuple[MixerSpec, ...]:
    """The mixers that alternate in a stage. Raises ValueError that names the wrong part."""
    try:
        body = ast.parse(f"[{text.strip()}]", mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"mixers {text.strip()!r}: {error.msg}; write name(argument=value), name, ...") from error
    if not isinstance(body, ast.List) or not body.elts:
        raise ValueError(f"mixers {text.strip()!r} names no mixer; write name(argument=value), name, ...")
    return tuple(_mixer(node) for node in body.elts)


def _mixer(node: ast.expr) -> MixerSpec:
    function = node.func if isinstance(node, ast.Call) else node
    keywords = node.keywords if isinstance(node, ast.Call) else []
    if not isinstance(function, ast.Name) or (isinstance(node, ast.Call) and node.args):
        raise ValueError(f"{ast.unparse(node)!r} is not a mixer; write name or name(argument=value)")
    if function.id not in MIXERS:
        raise ValueError(
            f"no mixer is named {function.id!r}{nearest(function.id, MIXERS)}; there are {', '.join(sorted(MIXERS))}"
        )
    mixer, given = MIXERS[function.id], {}
    for keyword in keywords:
        name = _argument(mixer, keyword.arg or "**")
        if name in given:
            raise ValueError(f"{mixer.name}: argument {name!r} is given twice")
        given[name] = _value(f"{mixer.name}: {name}", keyword.value, mixer.arguments[name])
    return MixerSpec(mixer, given)


def _argument(mixer: TokenMixer, name: str) -> str:
    """The whole name of an argument that `name` is, or begins."""
    begun = [known for known in mixer.arguments if known.startswith(name)]
    if name in mixer.arguments or len(begun) == 1:
        return name if name in mixer.arguments else begun[0]
    known = ", ".join(mixer.arguments)
    raise ValueError(f"{mixer.name} has no argument {name!r}{nearest(name, mixer.arguments)}; it takes {known}")


def _value(what: str, node: ast.expr, kind: Any) -> Any:
    """The literal `node`, of the type `kind`."""
    # here, so that importing the zoo does not load it
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    wanted = kind.__name__ if isinstance(kind, type) else kind
    try:
        return TypeAdapter(kind, config=ConfigDict(strict=True)).validate_python(ast.literal_eval(node))
    except (ValueError, ValidationError) as error:
        raise ValueError(f"{what}={ast.unparse(node)} must be a literal of type {wanted}") from error


def specification(mixers: Sequence[nn.Module]) -> str:
    """The specification of a stage with these mixers: the shortest list that gives them by alternating."""
    texts = [mixer.specification for mixer in mixers]
    period = next(n for n in range(1, len(texts) + 1) if all(a == b for a, b in zip(texts, texts[n:], strict=False)))
    return ", ".join(map(str, texts[:period]))
