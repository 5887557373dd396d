"""PLACEHOLDER train/data/sources/folder.py"""

from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ...errors import UserError
from ..image_io import EXTENSIONS, decoded

LAYOUT = "data.root needs train/CLASS/*.jpg and val/CLASS/*.jpg"


class Folder(Dataset[tuple[Image.Image, int]]):
    """Images below `root/CLASS/`, classes in alphabetic order; paths in one array, so that workers share the memory."""

    def __init__(self, root: Path):
        try:
            folders = sorted(entry for entry in root.iterdir() if entry.is_dir())
            files = [sorted(f for f in folder.rglob("*") if f.suffix.lower() in EXTENSIONS) for folder in folders]
        except OSError as error:
            raise UserError(f"image folder {root} cannot be read ({error.strerror}); {LAYOUT}") from error
        if empty := [folder.name for folder, found in zip(folders, files, strict=True) if not found]:
            raise UserError(
                f"class {empty[0]} in {root} holds no images ({', '.join(sorted(EXTENSIONS))}); add some or remove it"
            )
        if not folders:
            raise UserError(f"{root} holds no class folders, hence no images; {LAYOUT}")
        self.classes = [folder.name for folder in folders]
        self.paths = np.array([str(file).encode() for found in files for file in found])
        self.targets = np.repeat(np.arange(len(folders)), [len(found) for found in files])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path = self.paths[index].decode()
        return decoded(partial(open, path, "rb"), path), int(self.targets[index])
