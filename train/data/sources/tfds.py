"""`data.source=tfds`: a TensorFlow dataset prepared as array_record; TFRecord files have no random access."""

import io
from importlib import import_module

from ...errors import UserError, one_line
from ...recipe.registry import SourceSpec
from ..class_map import class_index, read_class_map
from ..external import READER_ERRORS, ExternalDataset, require_package
from .hfds import ExternalData


def open_tfds(data: ExternalData, split: str) -> ExternalDataset:
    """A split of the dataset `data.name` in `data.root` (null: ~/tensorflow_datasets).

    Raises UserError if it cannot be read at random.
    """
    require_package("data.source=tfds", "tensorflow_datasets", "tensorflow-datasets")
    image, label = data.input_key or "image", data.target_key or "label"
    name = f"split {data.split(split)} of {data.name}"
    try:
        tfds = import_module("tensorflow_datasets")
        builder = tfds.builder(data.name, data_dir=data.root)
        source = builder.as_data_source(split=data.split(split), decoders={image: tfds.decode.SkipDecoding()})
        length, names = len(source), list(builder.info.features[label].names)
    except (*READER_ERRORS, AttributeError, TypeError) as error:
        raise UserError(
            f"data.source=tfds: {name} cannot be read at random: {one_line(error)}; prepare it with "
            f"tfds build {data.name} --file_format=array_record"
        ) from error
    classes = read_class_map(data) if data.class_map else names
    index = {name: number for number, name in enumerate(classes)}
    targets = [class_index(name, index, data) for name in names]

    def fetch(number: int) -> tuple[io.BytesIO, int]:
        # the source opens its files at the first access, hence in the worker process that uses them
        example = source[number]
        return io.BytesIO(example[image]), targets[int(example[label])]

    return ExternalDataset(fetch, length, classes, name)


SPEC = SourceSpec(
    name="tfds",
    summary="a TensorFlow dataset",
    options=ExternalData,
    datasets={"labels": open_tfds},
)
