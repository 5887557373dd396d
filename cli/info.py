"""`tessel info MODEL`: everything that is known of a model."""

from typing import Any

import click

from .completion import complete_models
from .output import json_option, nearest, print_facts


@click.command(short_help="Show what is known of a model: paper, cost, input, weights.")
@click.argument("model", shell_complete=complete_models)
@json_option
def info(model: str, as_json: bool) -> None:
    """Show a model of tessel: paper, row of its table, cost, input, normalization, weights and their license.

    With --json, memory is in bytes and multiply-adds are a number. Memory is that of float32.

    \b
    tessel info cswin_tiny
    tessel info cswin_large.in22k --json
    """
    import timm

    from .. import zoo
    from .facts import configuration, family_name, paper, weights

    name = model.partition(".")[0]
    if name not in zoo.list_models():
        hint = nearest(name, zoo.list_models()) or "`tessel list` lists the models"
        raise click.ClickException(f"no model of tessel is named {name!r}; {hint}")
    rows = weights(model)
    if model != name and not rows:
        tags = ", ".join(weight.tag for weight in weights(name)) or "none"
        raise click.ClickException(f"{name} has no weights {model.partition('.')[2]!r}; its tags are {tags}")
    cfg, cost = timm.get_pretrained_cfg(rows[0].name if rows else name), zoo.model_cost(model)
    assert cfg is not None
    channels, height, width = cost.input_size
    facts: dict[str, Any] = {
        "model": model,
        "family": family_name(name),
        "paper": paper(name),
        "table row": configuration(name),
        "parameters": cost.parameters,
        "multiply-adds": cost.macs,
        "memory of the weights": cost.weight_bytes,
        "memory of one image": cost.activation_bytes,
        "input": [channels, height, width],
        "resize": {"crop_pct": cfg.crop_pct, "crop_mode": cfg.crop_mode, "interpolation": cfg.interpolation},
        "mean": list(cfg.mean),
        "std": list(cfg.std),
        "weights": [weight_facts(weight) for weight in rows],
    }
    if as_json:
        print_facts(facts, as_json=True)
        return
    resize = facts["resize"]
    print_facts(
        facts
        | {
            "table row": "\n".join(f"{key} = {value}" for key, value in facts["table row"].items()),
            "parameters": f"{cost.parameters / 1e6:.2f} M",
            "multiply-adds": f"{cost.macs / 1e9:.2f} G, for one image of {height} x {width}",
            "memory of the weights": f"{cost.weight_bytes / 1e6:.1f} MB in float32",
            "memory of one image": f"{cost.activation_bytes / 1e6:.1f} MB of activations at most, in inference",
            "input": f"{channels} x {height} x {width}; other sizes work as well",
            "resize": f"{resize['interpolation']}, {resize['crop_mode']} crop of {resize['crop_pct']:g}",
            "mean": ", ".join(f"{value:g}" for value in cfg.mean),
            "std": ", ".join(f"{value:g}" for value in cfg.std),
            "weights": "\n".join(weight_line(row) for row in facts["weights"]) or "none were published",
        }
    )


def weight_facts(weight: Any) -> dict[str, Any]:
    from ..checkpoints import find_local

    local = find_local(weight)
    return {
        "name": weight.name,
        "top1": weight.published_top1,
        "reproduced_top1": weight.reproduced_top1,
        "classes": weight.num_classes,
        "license": weight.license,
        "source": weight.source,
        "url": weight.url or None,
        "why_no_url": weight.why_no_url or None,
        "file": str(local) if local else None,
    }


def weight_line(row: dict[str, Any]) -> str:
    accuracy = "" if row["top1"] is None else f", top-1 {row['top1']:.1f}"
    where = f"in the cache: {row['file']}" if row["file"] else "can be downloaded"
    if not row["file"] and not row["url"]:
        where = f"`tessel weights import {row['name']} FILE` after a download by hand: {row['why_no_url']}"
    return f"{row['name']}{accuracy}, {row['license']}, {row['source']}; {where}"
