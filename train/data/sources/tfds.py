"""PLACEHOLDER train/data/sources/tfds.py"""

import io
from importlib import import_module

from ...errors import UserError, one_line
from ...recipe.schema import Data
from ..class_map import _mapped, _number
from ..external import REFUSALS, ExternalDataset


def open_tfds(data: Data, split: str) -> ExternalDataset:
    """A prepared TensorFlow dataset: `data.name` below `data.root` (null: ~/tensorflow_datasets)."""
    image, label, name = data.input_key or "image", data.target_key or "label", f"split {split} of {data.name}"
    try:
        tfds = import_module("tensorflow_datasets")
        builder = tfds.builder(data.name, data_dir=data.root)
        source = builder.as_data_source(split=split, decoders={image: tfds.decode.SkipDecoding()})
        length, names = len(source), list(builder.info.features[label].names)
    except (*REFUSALS, AttributeError, TypeError) as error:
        raise UserError(
            f"data.source=tfds: {name} cannot be read at random: {one_line(error)}; prepare it with "
            f"tfds build {data.name} --file_format=array_record"
        ) from error
    classes = _mapped(data) if data.class_map else names
    number = {key: index for index, key in enumerate(classes)}
    targets = [_number(key, number, data) for key in names]

    def fetch(index: int) -> tuple[io.BytesIO, int]:
        # opens its files here, so after the fork of a loader process, which they do not survive
        example = source[index]
        return io.BytesIO(example[image]), targets[int(example[label])]

    return ExternalDataset(fetch, length, classes, name)
