"""Conversion of state dicts between published keys and ours."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import Tensor

from ._family import configuration, families, make_model
from ._keymap import KeyMap, KeyRule, MissingKeys, UnknownKeys
from ._pretrained import check_finite, check_shapes, classifier_keys
from ._resizing import resized_weights
from ._swap import specified_mixers


def from_published(name: str, state: Mapping[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Convert a published state dict of the model `name` (or a dict of its gradients) to our keys.

    `options` are the arguments of `timm.create_model` that the model is made with. Integer buffers are dropped. Raises
    ValueError naming every unknown or missing key.
    """
    name, cfg = configuration(name, options)
    return _matching_key_map(name, cfg, state).from_published(state)


def to_published(name: str, state: Mapping[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """The inverse of `from_published`: convert our state dict or gradients to the published keys."""
    name, cfg = configuration(name, options)
    return _key_maps(name, cfg)[0].to_published(state)


def from_published_dense(name: str, state: Mapping[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Convert the backbone of a published segmenter or detector to our keys, its norms to `norms.STAGE.*`.

    `state` may lack the classifier and the final norm; they are dropped. Raises ValueError naming every unknown or
    missing key.
    """
    name, cfg = configuration(name, options)
    key_map, dense = _key_maps(name, cfg)[0], families[name].dense_norm
    rule = KeyRule(dense.keys, "norms.{s}.{p}") if dense else None
    body, norms = {}, {}
    for key, tensor in state.items():
        norm_key = rule.to_ours(key) if rule else None
        if norm_key is None:
            body[key] = tensor
        else:
            norms[norm_key] = tensor
    dropped = frozenset(key for key in key_map.parameters | key_map.buffers if key.startswith(("norm.", "head.")))
    converted = key_map.from_published(body, optional=dropped)
    return {key: tensor for key, tensor in converted.items() if key not in dropped} | norms


def _matching_key_map(name: str, cfg: Any, state: Mapping[str, Tensor]) -> KeyMap:
    """The first key map of `name` that knows every key of `state`; that of the published layout if none does."""
    maps = _key_maps(name, cfg)
    return next((key_map for key_map in maps if key_map.knows(state)), maps[0])


@cache
def _key_maps(name: str, cfg: Any) -> tuple[KeyMap, ...]:
    """The key maps of `name`: that of the published layout, then those of other layouts."""
    family = families[name]
    model = make_model(family, cfg, device="meta")
    parameters = {key for key, _ in model.named_parameters()}
    floating = {key for key, value in model.state_dict().items() if value.is_floating_point()}
    return tuple(
        KeyMap(rules(cfg), name=name, parameters=parameters, buffers=floating - parameters)
        for rules in (family.key_mapping, *family.other_key_mappings)
    )


def checkpoint_filter(name: str, cfg: Any, whole: bool, state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """timm's checkpoint filter: convert a checkpoint of `name` to our keys, and check it.

    The checkpoint may have published keys, those of another known layout, or ours. With `whole` it must hold every
    weight, else it may lack the classifier where timm makes a new one. In a model with other arguments than its
    variant, weights that depend on the size of images or windows are resized. Raises ValueError for unknown and missing
    keys, other shapes, and values that are not finite.
    """
    classifier = classifier_keys(model.pretrained_cfg)
    published = _key_maps(name, cfg)[0]
    expected = published.parameters | published.buffers
    new = _new_mixers(model)
    # decided by the majority: both layouts may share a few keys, such as those of the final norm
    ours = 2 * sum(key in expected or key in new for key in state) >= len(state)
    if not ours:
        state = _matching_key_map(name, cfg, state).from_published(state, optional=classifier)
    state = {key: tensor for key, tensor in state.items() if tensor.is_floating_point()}
    if new:
        replaced = {key for key in expected if key.startswith(tuple(f"{path}." for path in specified_mixers(model)))}
        fits = ours and all(key in state and state[key].shape == tensor.shape for key, tensor in new.items())
        if not fits and replaced <= state.keys():
            # weights of the model before its mixers were swapped: the new mixers keep theirs
            state = {key: tensor for key, tensor in state.items() if key not in replaced} | new
        expected = expected - replaced | new.keys()
    if unknown := sorted(set(state) - expected):
        raise UnknownKeys(f"{name}: the checkpoint has {len(unknown)} keys the model lacks: {', '.join(unknown[:5])}")
    needed = expected
    if not whole:
        needed &= set(model.state_dict()) - (frozenset() if _needs_classifier(model) else classifier)
    if missing := sorted(needed - set(state)):
        raise MissingKeys(f"{name}: the checkpoint lacks {len(missing)} keys: {', '.join(missing[:5])}")
    if cfg != families[name].variants[name]:
        # the model was made for another image or window size than that of the weights
        state = resized_weights(model, state)
    check_shapes(name, state, model)
    check_finite(name, state)
    return state


def _new_mixers(model: Any) -> dict[str, Tensor]:
    """The weights of the mixers of `model` that were made from a specification, by their keys in the model."""
    return {
        f"{path}.{key}": tensor
        for path, mixer in specified_mixers(model).items()
        for key, tensor in mixer.state_dict().items()
        if tensor.is_floating_point()
    }


def _needs_classifier(model: Any) -> bool:
    """Whether the model has as many classes as the checkpoint: otherwise timm makes a new classifier."""
    return model.num_classes == model.pretrained_cfg["num_classes"]
