"""PLACEHOLDER train/data/sources/hfds.py"""

from typing import Any

from timm.data import create_reader

from ...errors import UserError, one_line
from ...recipe.schema import Data
from ..class_map import _mapped
from ..external import REFUSALS, ExternalDataset


def open_hfds(data: Data, split: str) -> ExternalDataset:
    """A Hugging Face dataset: `data.name` on the hub or a local folder, `data.root` its cache."""
    keys = {"input_key": data.input_key, "target_key": data.target_key}
    mapping = {name: index for index, name in enumerate(_mapped(data))} if data.class_map else None
    name = f"split {split} of {data.name}"
    try:
        reader: Any = create_reader(f"hfds/{data.name}", root=data.root, split=split, class_map=mapping, **keys)
        named = sorted(reader.class_to_idx, key=reader.class_to_idx.get)
        classes = named or [str(number) for number in range(1 + max(map(int, reader.iter_targets())))]
    except REFUSALS as error:
        raise UserError(f"data.source=hfds: {name} cannot be read: {one_line(error)}") from error
    return ExternalDataset(reader.__getitem__, len(reader), classes, name)
