"""Writes data sets of the package and data sets that TFDS cannot fetch; nothing is downloaded.

    python scripts/prepare_data.py fashion_mnist --source=/usr/share/datasets/fashion-mnist --data_dir=DIR
    python scripts/prepare_data.py inat2019 --source=DIR --data_dir=DIR
    python scripts/prepare_data.py mini --source=/usr/share/datasets/fashion-mnist

`fashion_mnist` writes Fashion-MNIST in TFDS layout from its four idx files (Debian: apt
install dataset-fashion-mnist), `mini` the subset that ships with the package: the first
1,000 training and the first 200 test images of each class, in the order of the files.

`inat2019` writes iNaturalist 2019, which TFDS lacks, in TFDS layout. Its source holds
`train2019.json`, `val2019.json` and the folder `train_val2019` that `train_val2019.tar.gz`
unpacks to (https://github.com/visipedia/inat_comp). Images are copied as they are; a class
is the category's place in the order of category ids, its name the category's.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dyntoken.data import mini, tfds_source
from dyntoken.data.errors import DataError, MissingDataError
from dyntoken.data.known_datasets import FASHION_NAMES
from dyntoken.data.tf_import import tf, tfds

IDX = {"train": "train", "test": "t10k"}  # split -> prefix of its two files
PER_CLASS, CLASSES = {"train": 1000, "test": 200}, 10
INAT = {"train": "train2019.json", "validation": "val2019.json"}


def read_idx(path: str | os.PathLike) -> np.ndarray:
    """A gzipped idx file of unsigned bytes (http://yann.lecun.com/exdb/mnist), uint8 of the shape it states."""
    path = Path(path)
    try:
        data = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise MissingDataError(
            f"no file {path}: give the folder of the four idx .gz files with --source "
            "(Debian: apt install dataset-fashion-mnist, then --source=/usr/share/datasets/fashion-mnist)"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a whole gzip file ({error}): fetch it again") from None
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise DataError(f"{path} is not an idx file of unsigned bytes")
    start = 4 + 4 * data[3]
    shape = tuple(int(n) for n in np.frombuffer(data[4:start], ">u4"))
    if len(shape) != data[3] or len(data) - start != int(np.prod(shape)):
        raise DataError(f"{path} does not hold the {shape} bytes that its header states: fetch it again")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def read_idx_split(source: str | os.PathLike, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 `[n, 28, 28, 1]` and labels int32 `[n]` of "train" or "test"."""
    prefix = Path(source) / IDX[split]
    images = read_idx(f"{prefix}-images-idx3-ubyte.gz")
    labels = read_idx(f"{prefix}-labels-idx1-ubyte.gz")
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise DataError(
            f"{source}: {split} images {images.shape} and labels {labels.shape} do not belong together"
        )
    return images[..., None], labels.astype(np.int32)


def choose(labels: np.ndarray, per_class: int) -> np.ndarray:
    """Indices of the first `per_class` examples of each class, ascending."""
    picks = [np.flatnonzero(labels == c)[:per_class] for c in range(CLASSES)]
    if min(map(len, picks)) < per_class:
        raise DataError(f"a class has fewer than {per_class} images: is this the whole Fashion-MNIST?")
    return np.sort(np.concatenate(picks))


def mini_arrays(source: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of the embedded set, as they are stored (all uint8)."""
    arrays = {}
    for split, per_class in PER_CLASS.items():
        images, labels = read_idx_split(source, split)
        keep = choose(labels, per_class)
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = images[keep], labels[keep].astype(np.uint8)
    return arrays


def _write_tfds(data_dir: str, name: str, version: str, features: Any, **options: Any) -> str:
    """Writes a set in TFDS layout; returns its folder."""
    folder = os.path.join(os.path.expanduser(data_dir), name, version)
    if tf.io.gfile.exists(os.path.join(folder, "dataset_info.json")):
        raise DataError(f"{folder} exists already: delete it to write it anew")
    tfds.dataset_builders.store_as_tfds_dataset(
        name=name,
        version=version,
        features=tfds.features.FeaturesDict(features),
        data_dir=os.path.expanduser(data_dir),
        **options,
    )
    return folder


def fashion_mnist(source: str, data_dir: str) -> str:
    """Writes Fashion-MNIST in a few minutes; returns its folder.

    Raises:
      DataError: the idx files are absent or damaged, TensorFlow is not there,
        or `data_dir` holds the set already.
    """
    splits = {split: read_idx_split(source, split) for split in IDX}
    return _write_tfds(
        data_dir,
        "fashion_mnist",
        str(tfds.builder_cls("fashion_mnist").VERSION),
        {
            "image": tfds.features.Image(shape=(28, 28, 1)),
            "label": tfds.features.ClassLabel(names=list(FASHION_NAMES)),
        },
        split_datasets={
            split: tf.data.Dataset.from_tensor_slices({"image": images, "label": labels.astype("int64")})
            for split, (images, labels) in splits.items()
        },
        description="Zalando's Fashion-MNIST, written from its idx files.",
        homepage="https://github.com/zalandoresearch/fashion-mnist",
    )


class _Examples:
    """The examples of one split, read when they are written."""

    def __init__(self, source: Any, rows: list[tuple[str, int]]):
        self._source, self._rows = source, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, label in self._rows:
            yield name, {"image": os.fspath(self._source / name), "label": label, "file_name": name}


def _read_json(path: Any) -> Mapping[str, Any]:
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
    """Class names, and split -> [(file name, label)], of the official JSON files in an `epath.Path`.

    Raises:
      DataError: a file is absent or not what it should be, or an image is absent.
    """
    contents = {split: _read_json(source / name) for split, name in INAT.items()}
    categories = sorted(contents["train"]["categories"], key=lambda category: category["id"])
    number = {category["id"]: i for i, category in enumerate(categories)}
    splits = {}
    for split, content in contents.items():
        files = {image["id"]: image["file_name"] for image in content["images"]}
        try:
            rows = [(files[a["image_id"]], number[a["category_id"]]) for a in content["annotations"]]
        except KeyError as error:
            raise DataError(
                f"{source / INAT[split]} annotates an image or category {error} that it does not list"
            ) from None
        if rows and not (source / rows[0][0]).exists():
            raise MissingDataError(f"no image {source / rows[0][0]}: unpack train_val2019.tar.gz in {source}")
        splits[split] = sorted(rows)
    return [str(category["name"]) for category in categories], splits


def inat2019(source: str, data_dir: str) -> str:
    """Writes iNaturalist 2019; returns its folder.

    Raises:
      DataError: the source is incomplete, TensorFlow is not there, or `data_dir`
        holds the set already.
    """
    from etils import epath

    root = epath.Path(source).expanduser()
    names, splits = read_annotations(root)
    features = {
        "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(names=names),
        "file_name": tfds.features.Text(),
    }
    try:
        return _write_tfds(
            data_dir,
            "i_naturalist2019",
            "1.0.0",
            features,
            split_datasets={split: _Examples(root, rows) for split, rows in splits.items()},
            description="iNaturalist 2019, written from its official annotations and images.",
            homepage="https://github.com/visipedia/inat_comp",
        )
    except (FileNotFoundError, tf.errors.NotFoundError) as error:
        raise MissingDataError(f"an image is missing, unpack train_val2019.tar.gz again: {error}") from None


def main(argv: list[str] | None = None) -> int:
    """Writes a data set; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=("fashion_mnist", "inat2019", "mini"))
    parser.add_argument(
        "--source", required=True, help="folder of the idx files, or of the JSON files and images"
    )
    parser.add_argument("--data_dir", default=tfds_source.default_data_dir(), help="TFDS folder to write to")
    parser.add_argument("--out", default=str(mini.DATA), help="file of `mini` (default: the package's own)")
    flags = parser.parse_args(argv)
    try:
        if flags.name == "mini":
            np.savez_compressed(flags.out, **mini_arrays(flags.source))
        write = {"fashion_mnist": fashion_mnist, "inat2019": inat2019}.get(flags.name)
        print(f"wrote {write(flags.source, flags.data_dir) if write else flags.out}")
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
