"""Hugging Face data sets on disk: the folder of `Dataset.save_to_disk`, or a folder of Parquet files.

timm's `ReaderHfds` opens by name and split through `load_dataset`, which refuses the folders of `save_to_disk`; the
`datasets` library itself gives the encoded bytes at any place. A file beside the data set is never executed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sovit.data.sources import Images, LeftOut, fingerprint, labels_of

IMAGE_KEY, LABEL_KEY, SPLIT = "image", "label", "train"


class SavedImages(Images):
    """Rows of a data set that lies on disk as Arrow tables."""

    def __init__(
        self,
        where: str,
        rows: Any,
        kept: NDArray[np.int64],
        classes: Sequence[str],
        labels: NDArray[np.int32],
        left_out: LeftOut,
        mark: str,
    ) -> None:
        super().__init__(where, classes, labels, left_out, mark)
        self._rows, self._kept = rows, kept

    def read(self, index: int) -> bytes:
        image = next(iter(self._rows[int(self._kept[index])].values())) or {}
        if image.get("bytes") is not None:
            return image["bytes"]
        if not image.get("path"):
            return b""
        with open(image["path"], "rb") as file:
            return file.read()

    def name(self, index: int) -> str:
        row = int(self._kept[index])
        path = (next(iter(self._rows[row].values())) or {}).get("path")
        return f"row {row}" + (f" ({os.path.basename(path)})" if path else "")


def list_saved(
    root: str, split: str | None, class_list: Sequence[str] | None, image_key: str | None, label_key: str | None
) -> SavedImages:
    """The rows of a split. Raises ValueError if there is no such data set, split or column."""
    import datasets

    where = f"{root} ({split or SPLIT})"
    rows = _opened(root, split or SPLIT)
    image_key, label_key = image_key or IMAGE_KEY, label_key or LABEL_KEY
    for name, key in (("image", image_key), ("label", label_key)):
        if key not in rows.column_names:
            raise ValueError(
                f"{where} has no column {key!r} but {', '.join(rows.column_names)}; write data.{name}_key=COLUMN."
            )
    feature = rows.features[label_key]
    column = rows.select_columns([label_key]).with_format("arrow")[:][label_key].to_pylist()
    names = getattr(feature, "names", None)
    if names is not None:  # numbers that stand for names
        column = [names[value] if value is not None and 0 <= value < len(names) else None for value in column]
    numbered = names is None and all(isinstance(value, int) for value in column if value is not None)
    values = np.array(["" if value is None else str(value) for value in column], np.str_)
    left_out = LeftOut()
    listed = class_list if class_list is not None or names is None else tuple(names)
    classes, labels, keep = labels_of(values, lambda k: f"row {k}", listed, left_out, numbered=numbered)
    images = rows.select_columns([image_key]).cast_column(image_key, datasets.Image(decode=False))
    files = [
        (str(path.relative_to(root)), path.stat().st_size)
        for path in sorted(Path(root).rglob("*"))
        if path.suffix in (".arrow", ".parquet")
    ]
    mark = fingerprint("hf", [(split or SPLIT, len(rows)), *files], classes)
    return SavedImages(where, images, np.flatnonzero(keep), classes, labels, left_out, mark)


def _opened(root: str, split: str) -> Any:
    import datasets
    from datasets.utils.logging import disable_progress_bar

    folder = Path(root)
    if not folder.is_dir():
        raise ValueError(f"{root} is no folder; give data.root as it is on disk.")
    disable_progress_bar()
    try:
        if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
            found = datasets.load_from_disk(str(folder))
        elif any(folder.rglob("*.parquet")):
            found = datasets.load_dataset(str(folder))
        else:
            raise ValueError(f"{root} holds neither a saved data set nor .parquet files; save one with save_to_disk.")
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{root} cannot be read as a data set ({' '.join(str(error).split())[:200]}).") from None
    if not isinstance(found, dict):
        if split != SPLIT:
            raise ValueError(f"{root} has no parts; write data.split=null.")
        return found
    if split not in found:
        raise ValueError(f"{root} has no part {split!r} but {', '.join(found)}; write data.split=PART.")
    return found[split]
