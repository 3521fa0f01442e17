"""Writes iNaturalist 2019 in TFDS layout from the official files; TFDS itself lacks this year.

    python -m dyntoken.data.inat2019 --source=DIR --data_dir=DIR

`--source` holds `train2019.json`, `val2019.json` and the folder `train_val2019`
that `train_val2019.tar.gz` unpacks to (https://github.com/visipedia/inat_comp).
Afterwards the data set `i_naturalist2019` of this package and
`tfds.builder_from_directory` read it. Images are copied as they are; a class is
the category's place in the order of category ids, its name the category's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from dyntoken.data import tfds_source
from dyntoken.data.errors import DataError, MissingDataError
from dyntoken.data.tf_import import tensorflow

NAME, VERSION = "i_naturalist2019", "1.0.0"
FILES = {"train": "train2019.json", "validation": "val2019.json"}


class _Split:
    """The examples of one split, read when they are written."""

    def __init__(self, source: Any, rows: list[tuple[str, int]]):
        self._source, self._rows = source, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for file_name, label in self._rows:
            yield (
                file_name,
                {"image": os.fspath(self._source / file_name), "label": label, "file_name": file_name},
            )


def _read(path: Any) -> dict[str, Any]:
    if not path.exists():
        raise MissingDataError(
            f"no file {path}: give the folder of train2019.json, val2019.json and train_val2019 with --source"
        )
    try:
        content = json.loads(path.read_text())
        return {key: content[key] for key in ("images", "annotations", "categories")}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no iNaturalist annotation file ({error!r}): unpack it again") from None


def read_annotations(source: Any) -> tuple[list[str], dict[str, list[tuple[str, int]]]]:
    """Class names, and split -> [(file name, label)], of the official JSON files.

    Args:
      source: `epath.Path` of the folder.

    Raises:
      DataError: a file is absent or not what it should be, or an image is absent.
    """
    contents = {split: _read(source / name) for split, name in FILES.items()}
    categories = sorted(contents["train"]["categories"], key=lambda category: category["id"])
    number = {category["id"]: i for i, category in enumerate(categories)}
    splits = {}
    for split, content in contents.items():
        files = {image["id"]: image["file_name"] for image in content["images"]}
        try:
            rows = [(files[a["image_id"]], number[a["category_id"]]) for a in content["annotations"]]
        except KeyError as error:
            raise DataError(
                f"{source / FILES[split]} annotates an image or category {error} that it does not list"
            ) from None
        for file_name, _ in rows[:1]:
            if not (source / file_name).exists():
                raise MissingDataError(
                    f"no image {source / file_name}: unpack train_val2019.tar.gz in {source}"
                )
        splits[split] = sorted(rows)
    return [str(category["name"]) for category in categories], splits


def prepare(source: str, data_dir: str) -> str:
    """Writes the set; returns its folder.

    Raises:
      DataError: the source is incomplete, TensorFlow is not there, or `data_dir`
        holds the set already.
    """
    from etils import epath

    root = epath.Path(source).expanduser()
    names, splits = read_annotations(root)
    tf = tensorflow()
    import tensorflow_datasets as tfds

    data_dir = os.path.expanduser(data_dir)
    folder = os.path.join(data_dir, NAME, VERSION)
    if tf.io.gfile.exists(os.path.join(folder, "dataset_info.json")):
        raise DataError(f"{folder} exists already: delete it to write it anew")
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=names),
            "file_name": tfds.features.Text(),
        }
    )
    try:
        tfds.dataset_builders.store_as_tfds_dataset(
            name=NAME,
            version=VERSION,
            features=features,
            split_datasets={split: _Split(root, rows) for split, rows in splits.items()},
            data_dir=data_dir,
            description="iNaturalist 2019, written from its official annotations and images.",
            homepage="https://github.com/visipedia/inat_comp",
        )
    except (FileNotFoundError, tf.errors.NotFoundError) as error:
        raise MissingDataError(f"an image is missing, unpack train_val2019.tar.gz again: {error}") from None
    return folder


def main(argv: list[str] | None = None) -> int:
    """Writes the data set; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m dyntoken.data.inat2019", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--source", required=True, help="folder of the JSON files and train_val2019/")
    parser.add_argument("--data_dir", default=tfds_source.default_data_dir(), help="TFDS folder to write to")
    flags = parser.parse_args(argv)
    try:
        print(f"wrote {prepare(flags.source, flags.data_dir)}")
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
