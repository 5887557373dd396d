"""Key maps: how a published checkpoint's keys and tensors correspond to ours, as data, total in both directions.

A rule pairs a published pattern with ours. A hole `{s}` stands for a number, the hole `{p}` for a last name such as
`weight`; `{s+1}` on our side is the number on theirs plus one. The first rule whose pattern matches a key decides, so
literal rules stand above general ones.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

State = Mapping[str, Tensor]

_HOLE = re.compile(r"\{([a-z]+)([+-]\d+)?\}")


@dataclass(frozen=True)
class Edit:
    """A change of tensors on the way: from the published ones to ours, and back. Both map tuples to tuples.

    It must be a rearrangement (permutation, reshape, concatenation), so that it serves gradients as it serves weights.
    """

    to_ours: Callable[..., tuple[Tensor, ...]]
    to_published: Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Pattern:
    text: str

    @cached_property
    def _holes(self) -> list[tuple[str, int]]:
        return [(name, int(shift or 0)) for name, shift in _HOLE.findall(self.text)]

    @cached_property
    def _regex(self) -> re.Pattern:
        parts, end, seen = [], 0, set()
        for hole in _HOLE.finditer(self.text):
            name = hole[1]
            body = r"[A-Za-z_]\w*" if name == "p" else r"\d+"
            parts += [
                re.escape(self.text[end : hole.start()]),
                f"(?P={name})" if name in seen else f"(?P<{name}>{body})",
            ]
            end = hole.end()
            seen.add(name)
        return re.compile("".join(parts) + re.escape(self.text[end:]))

    def match(self, key: str) -> dict[str, str] | None:
        """The holes' contents, shifts undone; None where the key is not of this pattern."""
        found = self._regex.fullmatch(key)
        if found is None:
            return None
        shifts = dict(self._holes)
        values = {k: v if k == "p" else str(int(v) - shifts[k]) for k, v in found.groupdict().items()}
        return None if any(v.startswith("-") for v in values.values()) else values

    def fill(self, values: Mapping[str, str]) -> str:
        return _HOLE.sub(lambda h: values[h[1]] if h[1] == "p" else str(int(values[h[1]]) + int(h[2] or 0)), self.text)


class Rule:
    """One published pattern (or several, in order) for one of ours (or several); `ours=None` drops the key.

    A dropped key holds nothing that training changed: it is rebuilt by the model and absent from what we publish.
    """

    def __init__(self, published: str | Sequence[str], ours: str | Sequence[str] | None, edit: Edit | None = None):
        self.published = _patterns(published)
        self.ours: tuple[Pattern, ...] = () if ours is None else _patterns(ours)
        self.edit = edit


class UnknownKeys(ValueError):
    """Keys that no rule maps, or that the model lacks."""


class MissingKeys(ValueError):
    """Keys without which the model would be loaded in part."""


def _patterns(texts: str | Sequence[str]) -> tuple[Pattern, ...]:
    return tuple(Pattern(t) for t in ([texts] if isinstance(texts, str) else texts))


class KeyMap:
    """The rules of one model, applied in either direction to a dict of weights or of gradients.

    `parameters` and `buffers` are our model's keys; integer buffers (counters, index tables) carry no weights and are
    dropped on the way, as are keys whose rule says so.
    """

    def __init__(self, rules: Iterable[Rule], *, name: str, parameters: Iterable[str], buffers: Iterable[str] = ()):
        self.rules, self.name = tuple(rules), name
        self.parameters, self.buffers = frozenset(parameters), frozenset(buffers)

    def knows(self, state: State) -> bool:
        """Whether every key of `state` is of this published layout."""
        return all(self._find(key, to_ours=True)[0] for key in state)

    def from_published(self, state: State, *, optional: frozenset[str] = frozenset()) -> dict[str, Tensor]:
        """Ours from published. `optional` names keys of ours that may be absent (a classifier).

        Raises UnknownKeys or MissingKeys, naming published keys.
        """
        result = self._convert(state, to_ours=True)
        extra = [key for key in result if key not in self.parameters | self.buffers]
        self._refuse(UnknownKeys, [self._published_name(key) for key in extra], "published keys it has no place for")
        missing = self._missing(result) - optional
        self._refuse(MissingKeys, [self._published_name(key) for key in missing], "published keys that are not there")
        return result

    def to_published(self, state: State) -> dict[str, Tensor]:
        """Published from ours. Raises UnknownKeys or MissingKeys, naming our keys."""
        extra = [k for k, t in state.items() if k not in self.parameters | self.buffers and t.is_floating_point()]
        self._refuse(UnknownKeys, extra, "keys that are not the model's")
        self._refuse(MissingKeys, self._missing(state), "keys that are not there")
        return self._convert(state, to_ours=False)

    def _missing(self, state: Iterable[str]) -> frozenset[str]:
        missing = (self.parameters | self.buffers) - set(state)
        # gradients come without any buffer; weights come with all of them
        return missing - self.buffers if self.buffers <= missing else missing

    def _convert(self, state: State, *, to_ours: bool) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        done: set[str] = set()
        unknown: list[str] = []
        for key, tensor in state.items():
            if key in done:
                continue
            rule, values = self._find(key, to_ours=to_ours)
            if rule is None:
                # a counter of ours (batch norm) needs no published name
                if to_ours or tensor.is_floating_point():
                    unknown.append(key)
                continue
            sources, targets = (rule.published, rule.ours) if to_ours else (rule.ours, rule.published)
            names = [pattern.fill(values) for pattern in sources]
            done.update(names)
            if not targets or not tensor.is_floating_point():
                continue
            self._refuse(MissingKeys, [n for n in names if n not in state], f"keys that belong to {key!r}")
            tensors = tuple(state[name] for name in names)
            if rule.edit is not None:
                tensors = (rule.edit.to_ours if to_ours else rule.edit.to_published)(*tensors)
            result.update(zip((pattern.fill(values) for pattern in targets), tensors, strict=True))
        self._refuse(UnknownKeys, unknown, "keys that no rule of its key map knows")
        return result

    def _find(self, key: str, *, to_ours: bool) -> tuple[Rule | None, dict[str, str]]:
        for rule in self.rules:
            for pattern in rule.published if to_ours else rule.ours:
                values = pattern.match(key)
                if values is not None:
                    return rule, values
        return None, {}

    def _published_name(self, key: str) -> str:
        rule, values = self._find(key, to_ours=False)
        return key if rule is None else rule.published[0].fill(values)

    def _refuse(self, error: type[ValueError], keys: Iterable[str], what: str) -> None:
        if keys := sorted(keys):
            raise error(f"{self.name}: {len(keys)} {what}: {', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''}")


def nearest(word: str, words: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the closest of `words`, or nothing."""
    close = difflib.get_close_matches(word, list(words), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
