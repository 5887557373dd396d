"""`data.source=coco_panoptic`: a JSON file of segments, and a PNG for each image whose colors are their ids."""

import json
from pathlib import Path

from pydantic.dataclasses import dataclass

from ...errors import UserError
from ...recipe.registry import SourceSpec
from ...recipe.schema import STRICT, FilePath, Source
from ..panoptic import PanopticDataset, PanopticImage, Segment

Part = tuple[FilePath, FilePath, FilePath]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class COCOPanoptic(Source):
    root: FilePath
    """folder of the annotation files, the images and the PNG files"""
    train: Part = ("annotations/panoptic_train2017.json", "train2017", "annotations/panoptic_train2017")
    """annotation file, image folder and folder of PNG files of the training split, absolute or below root"""
    val: Part = ("annotations/panoptic_val2017.json", "val2017", "annotations/panoptic_val2017")
    """annotation file, image folder and folder of PNG files of the validation split, absolute or below root"""


def open_panoptic(data: COCOPanoptic, split: str) -> PanopticDataset:
    """Raises UserError if the annotation file is invalid."""
    file, images, segments = (Path(data.root, part) for part in (data.val if split == "val" else data.train))
    try:
        content = json.loads(file.read_bytes())
        categories = sorted(content["categories"], key=lambda one: one["id"])
        labels = {category["id"]: number for number, category in enumerate(categories)}
        described = {image["id"]: image for image in content["images"]}
        found = []
        for one in sorted(content["annotations"], key=lambda one: one["image_id"]):
            if one["image_id"] not in described:
                raise UserError(f"{file}: an annotation has the image_id {one['image_id']!r}, which no image has")
            image = described[one["image_id"]]
            parts = []
            for part in one["segments_info"]:
                if part["category_id"] not in labels:
                    raise UserError(
                        f"{file}: {one['file_name']} has a segment of category {part['category_id']!r}, which the file "
                        "does not list; add the category"
                    )
                parts.append(Segment(int(part["id"]), labels[part["category_id"]], int(part.get("iscrowd", 0))))
            size = int(image.get("width", 0)), int(image.get("height", 0))
            found.append(PanopticImage(str(images / image["file_name"]), str(segments / one["file_name"]), size, parts))
        names = [str(category["name"]) for category in categories]
        things = [bool(category["isthing"]) for category in categories]
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror}); data.train=[FILE.json, IMAGES, PNGS] and data.val name others"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not a panoptic file of COCO ({type(error).__name__}: {error})") from error
    return PanopticDataset(str(file), found, names, things)


SPEC = SourceSpec(
    name="coco_panoptic",
    summary="COCO's panoptic segments, ADE20K's and others in this format",
    options=COCOPanoptic,
    datasets={"panoptic masks": open_panoptic},
)
