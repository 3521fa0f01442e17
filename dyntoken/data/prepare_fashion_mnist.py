"""Writes Fashion-MNIST in TFDS layout from its four idx files, without a download.

    python -m dyntoken.data.prepare_fashion_mnist --idx_dir=/usr/share/datasets/fashion-mnist --data_dir=DIR

Afterwards `tfds.builder("fashion_mnist", data_dir=DIR)` and the data set
`fashion_mnist` of this package read it. Takes a few minutes.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from dyntoken.data import idx, tfds_source
from dyntoken.data.cards import FASHION_NAMES
from dyntoken.data.errors import DataError
from dyntoken.data.tf_import import tensorflow


def prepare(idx_dir: str, data_dir: str) -> Any:
    """Writes the set; returns its folder.

    Raises:
      DataError: the idx files are absent or damaged, TensorFlow is not there,
        or `data_dir` holds the set already.
    """
    splits = {split: idx.read_split(idx_dir, split) for split in idx.FILES}
    tf = tensorflow()
    import tensorflow_datasets as tfds

    data_dir = os.path.expanduser(data_dir)
    version = str(tfds.builder_cls("fashion_mnist").VERSION)
    folder = os.path.join(data_dir, "fashion_mnist", version)
    if tf.io.gfile.exists(os.path.join(folder, "dataset_info.json")):
        raise DataError(f"{folder} exists already: delete it to write it anew")
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(28, 28, 1)),
            "label": tfds.features.ClassLabel(names=list(FASHION_NAMES)),
        }
    )
    datasets = {
        split: tf.data.Dataset.from_tensor_slices({"image": images, "label": labels.astype("int64")})
        for split, (images, labels) in splits.items()
    }
    tfds.dataset_builders.store_as_tfds_dataset(
        name="fashion_mnist",
        version=version,
        features=features,
        split_datasets=datasets,
        data_dir=data_dir,
        description="Zalando's Fashion-MNIST, written from its idx files.",
        homepage="https://github.com/zalandoresearch/fashion-mnist",
    )
    return folder


def main(argv: list[str] | None = None) -> int:
    """Writes the data set; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m dyntoken.data.prepare_fashion_mnist", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--idx_dir", required=True, help="folder of the four idx .gz files")
    parser.add_argument("--data_dir", default=tfds_source.default_data_dir(), help="TFDS folder to write to")
    flags = parser.parse_args(argv)
    try:
        print(f"wrote {prepare(flags.idx_dir, flags.data_dir)}")
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
