"""What is known of the common data sets without reading them.

`info` answers from here for a set that is not prepared, so that a dry run of
an ImageNet recipe needs no ImageNet. Mean and standard deviation are those the
published recipes use.
"""

from __future__ import annotations

from dyntoken.data.info import DataInfo

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FASHION_NAMES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
_IMAGENET = IMAGENET_MEAN, IMAGENET_STD
# Of the 60,000 training images. The embedded subset uses the same numbers, so
# that weights trained on the full set fit it.
_FASHION = (0.2860,), (0.3530,), FASHION_NAMES
_CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), CIFAR10_NAMES
_CIFAR100 = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)

KNOWN_DATASETS = {
    row[0]: DataInfo(*row)
    for row in (
        ("fashion_mnist_mini", 10, (28, 28, 1), {"train": 10_000, "test": 2_000}, *_FASHION),
        ("fashion_mnist", 10, (28, 28, 1), {"train": 60_000, "test": 10_000}, *_FASHION),
        ("cifar10", 10, (32, 32, 3), {"train": 50_000, "test": 10_000}, *_CIFAR10),
        ("cifar100", 100, (32, 32, 3), {"train": 50_000, "test": 10_000}, *_CIFAR100),
        ("imagenet2012", 1000, None, {"train": 1_281_167, "validation": 50_000}, *_IMAGENET),
        ("imagenet2012_real", 1000, None, {"validation": 50_000}, *_IMAGENET, (), True),
        ("imagenet_v2", 1000, None, {"test": 10_000}, *_IMAGENET),
        ("i_naturalist2019", 1010, None, {"train": 265_213, "validation": 3_030}, *_IMAGENET),
    )
}


def default_moments(name: str, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std): the published ones, ImageNet's for other colour sets, else 0.5."""
    known = KNOWN_DATASETS.get(name)
    if known is not None and known.channels == channels:
        return known.mean, known.std
    return _IMAGENET if channels == 3 else ((0.5,) * channels, (0.5,) * channels)
