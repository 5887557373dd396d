"""Key mappings between a published checkpoint and our state dicts, written as data and applied in both directions.

A rule pairs a published key pattern with ours. The placeholder `{p}` stands for a last name such as `weight`, any other
placeholder, as `{s}`, for a number; `{s+1}` is that number plus one. The first rule with a matching pattern applies, so
more specific rules come first.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

State = Mapping[str, Tensor]

_PLACEHOLDER = re.compile(r"\{([a-z]+)([+-]\d+)?\}")


@dataclass(frozen=True)
class Edit:
    """Functions that rearrange tensors, from the published ones to ours and back; both map tensors to a tuple of them.

    They may permute, reshape, split and concatenate, so that gradients can be converted like weights.
    """

    to_ours: Callable[..., tuple[Tensor, ...]]
    to_published: Callable[..., tuple[Tensor, ...]]


# published layers of queries and of keys and values <-> our qkv layer
PACK_QKV = Edit(lambda q, kv: (torch.cat([q, kv]),), lambda qkv: qkv.tensor_split([len(qkv) // 3]))


@dataclass(frozen=True)
class Pattern:
    """A key with placeholders, such as `layers.{s}.norm.{p}`."""

    text: str

    @cached_property
    def _offsets(self) -> dict[str, int]:
        return {name: int(offset or 0) for name, offset in _PLACEHOLDER.findall(self.text)}

    @cached_property
    def _regex(self) -> re.Pattern:
        parts, end, seen = [], 0, set()
        for found in _PLACEHOLDER.finditer(self.text):
            name = found[1]
            body = r"[A-Za-z_]\w*" if name == "p" else r"\d+"
            parts += [
                re.escape(self.text[end : found.start()]),
                f"(?P={name})" if name in seen else f"(?P<{name}>{body})",
            ]
            end = found.end()
            seen.add(name)
        return re.compile("".join(parts) + re.escape(self.text[end:]))

    def match(self, key: str) -> dict[str, str] | None:
        """The values of the placeholders, offsets subtracted; None if `key` does not match."""
        found = self._regex.fullmatch(key)
        if found is None:
            return None
        values = {k: v if k == "p" else str(int(v) - self._offsets[k]) for k, v in found.groupdict().items()}
        return None if any(v.startswith("-") for v in values.values()) else values

    def fill(self, values: Mapping[str, str]) -> str:
        """The key with these values of the placeholders."""
        return _PLACEHOLDER.sub(
            lambda found: values[found[1]] if found[1] == "p" else str(int(values[found[1]]) + int(found[2] or 0)),
            self.text,
        )


class KeyRule:
    """Maps published keys of one pattern (or of several, in order) to ours; `ours=None` drops them.

    Only keys that training does not change may be dropped: the model recomputes them, and `to_published` omits them.
    """

    def __init__(self, published: str | Sequence[str], ours: str | Sequence[str] | None, edit: Edit | None = None):
        self.published = _patterns(published)
        self.ours: tuple[Pattern, ...] = () if ours is None else _patterns(ours)
        self.edit = edit

    def to_ours(self, key: str) -> str | None:
        """Our name of the published `key`, for rules with one pattern on each side; None if `key` does not match."""
        values = self.published[0].match(key)
        return None if values is None else self.ours[0].fill(values)


# (published prefix, our prefix) of a token mixer -> its rules
MixerKeys = Callable[[str, str], Sequence[KeyRule]]


def transformer_keys(published: str, ours: str) -> list[KeyRule]:
    """Rules of the norms and the MLP of a transformer block, by its prefixes."""
    return [
        KeyRule(published + "norm1.{p}", ours + "mixer.norm.{p}"),
        KeyRule(published + "norm2.{p}", ours + "mlp.norm.{p}"),
        KeyRule(published + "mlp.fc{n}.{p}", ours + "mlp.fn.fc{n}.{p}"),
    ]


class UnknownKeys(ValueError):
    """Keys that no rule maps, or that the model does not have."""


class MissingKeys(ValueError):
    """Keys of the model that the checkpoint does not have."""


def _patterns(texts: str | Sequence[str]) -> tuple[Pattern, ...]:
    return tuple(Pattern(t) for t in ([texts] if isinstance(texts, str) else texts))


class KeyMap:
    """The rules of one model, applied in either direction to a dict of weights or of gradients.

    `parameters` and `buffers` are the keys of our model. Integer buffers (counters, index tables) are not converted:
    they hold no weights.
    """

    def __init__(self, rules: Iterable[KeyRule], *, name: str, parameters: Iterable[str], buffers: Iterable[str] = ()):
        self.rules, self.name = tuple(rules), name
        self.parameters, self.buffers = frozenset(parameters), frozenset(buffers)

    def knows(self, state: State) -> bool:
        """Whether a rule matches every key of `state`, a published state dict."""
        return all(self._find(key, to_ours=True)[0] for key in state)

    def from_published(self, state: State, *, optional: frozenset[str] = frozenset()) -> dict[str, Tensor]:
        """Published state dict to ours. `optional`: those of our keys that may be missing, as a classifier.

        Raises UnknownKeys or MissingKeys, naming published keys.
        """
        result = self._convert(state, to_ours=True)
        unknown = [key for key in result if key not in self.parameters | self.buffers]
        self._refuse(UnknownKeys, [self._published_name(key) for key in unknown], "published keys the model lacks")
        missing = self._missing(result) - optional
        self._refuse(MissingKeys, [self._published_name(key) for key in missing], "published keys are missing")
        return result

    def to_published(self, state: State) -> dict[str, Tensor]:
        """Our state dict to the published layout. Raises UnknownKeys or MissingKeys, naming our keys."""
        unknown = [k for k, t in state.items() if k not in self.parameters | self.buffers and t.is_floating_point()]
        self._refuse(UnknownKeys, unknown, "keys the model lacks")
        self._refuse(MissingKeys, self._missing(state), "keys are missing")
        return self._convert(state, to_ours=False)

    def _missing(self, state: Iterable[str]) -> frozenset[str]:
        missing = (self.parameters | self.buffers) - set(state)
        # a dict of gradients has no buffers, a state dict has all of them
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
                # integer counters of batch norm have no published name
                if to_ours or tensor.is_floating_point():
                    unknown.append(key)
                continue
            sources, targets = (rule.published, rule.ours) if to_ours else (rule.ours, rule.published)
            names = [pattern.fill(values) for pattern in sources]
            done.update(names)
            if not targets or not tensor.is_floating_point():
                continue
            missing = [n for n in names if n not in state]
            self._refuse(MissingKeys, missing, f"keys needed together with {key!r} are missing")
            tensors = tuple(state[name] for name in names)
            if rule.edit is not None:
                tensors = (rule.edit.to_ours if to_ours else rule.edit.to_published)(*tensors)
            result.update(zip((pattern.fill(values) for pattern in targets), tensors, strict=True))
        self._refuse(UnknownKeys, unknown, "keys that no rule of the key mapping matches")
        return result

    def _find(self, key: str, *, to_ours: bool) -> tuple[KeyRule | None, dict[str, str]]:
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
    """The hint ` (did you mean 'x'?)` with the closest of `words`, or an empty string."""
    close = difflib.get_close_matches(word, list(words), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
