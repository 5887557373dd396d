"""Report sections of a run with several labels per image: metrics and thresholds by label, hardest images."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ..data.bands import viewable
from ..errors import UserError
from .classify import MAX_IMAGES, hardest_card
from .dense import classes, headline
from .page import Section, gallery
from .runs import RunRecord

__all__ = ["headline", "sections"]


def sections(run: RunRecord, folder: Path) -> dict[str, Section]:
    return {
        "Labels": lambda: labels(run, folder),
        "Hardest images": lambda: hardest(run),
    }


def labels(run: RunRecord, folder: Path) -> tuple[str, str]:
    """The metrics by label, and below them the threshold of each."""
    text, html = classes(run, folder)
    text += " A label is predicted from its threshold on, which has the highest F1 on these images."
    return text, html + threshold_table(run.require_evaluation())


def threshold_table(evaluation: Mapping[str, Any]) -> str:
    """HTML: one row per label."""
    rows = ["<tr><th>label<th>images<th>average precision, %<th>threshold<th>F1 at the threshold, %</tr>"]
    by_class = evaluation["classes"]
    for name, threshold in evaluation["thresholds"].items():
        precision, f1 = (
            "none" if by_class[key][name] is None else f"{by_class[key][name]:.1f}"
            for key in ("average_precision", "best_f1")
        )
        images = evaluation["images"][name]
        rows.append(f"<tr><td>{escape(name)}<td>{images:,}<td>{precision}<td>{threshold:.3f}<td>{f1}</tr>")
    return f"<details><summary>Thresholds</summary><table>{''.join(rows)}</table></details>"


def hardest(run: RunRecord) -> tuple[str, str]:
    """The images with the highest loss, with their true and their predicted labels."""
    target, probability = run.require_predictions("target", "probability")
    thresholds = np.array(list(run.require_evaluation()["thresholds"].values()))
    data, wrong = run.held_out, np.abs(target - probability)
    chosen = np.argsort(np.log(np.maximum(1 - wrong, 1e-7)).mean(1), kind="stable")[:MAX_IMAGES]
    samples = [data[int(i)] for i in chosen] if len(data) == len(target) else []
    if not samples or (np.stack([hot for _, hot in samples]) != target[chosen]).any():
        raise UserError("the evaluation was made on other data than that of the recipe")

    def named(hot: np.ndarray) -> str:
        return ", ".join(data.classes[k] for k in np.flatnonzero(hot)) or "none"

    cards = [
        hardest_card(viewable(image), named(target[i]), named(probability[i] >= thresholds), float(1 - wrong[i].max()))
        for i, (image, _) in zip(chosen, samples, strict=True)
    ]
    text = (
        "The images with the highest loss, as true → predicted labels. Below each image: the probability that the "
        "model gave to the truth of its worst label."
    )
    return text, gallery(cards, least=140)
