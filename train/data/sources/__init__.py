"""The data sources, one file each. Importing this package registers them; it imports no torch."""

from ...recipe.registry import register_source
from . import (
    ade20k,
    archives,
    cityscapes,
    coco,
    coco_panoptic,
    csv,
    digit_scenes,
    digits,
    folder,
    hfds,
    masks,
    tfds,
    voc,
    voc_xml,
    yolo,
)

for spec in (
    digits.SPEC,
    digit_scenes.SPEC,
    folder.SPEC,
    archives.TAR,
    archives.WEBDATASET,
    hfds.SPEC,
    tfds.SPEC,
    csv.SPEC,
    ade20k.SPEC,
    cityscapes.SPEC,
    voc.SPEC,
    voc.AUGMENTED,
    coco.SPEC,
    coco_panoptic.SPEC,
    masks.SPEC,
    yolo.SPEC,
    voc_xml.SPEC,
):
    register_source(spec)
