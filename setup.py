"""Installs dyntoken; `pip install .` or `pip install ".[viz]"`."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "dyntoken" / "__init__.py").read_text()).group(1)

CORE = [
    "jax>=0.10.0,<0.12",  # 0.12.0 cannot differentiate erf inside shard_map: findings/
    "flax>=0.12.0",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.0",
    "chex>=0.1.91",
    "ml-collections>=1.1.0",
    "numpy>=2.0",
    "scipy>=1.15",
    "safetensors>=0.5",
    "etils[epath]>=1.12",
    "absl-py>=2.1",
    "tensorflow-datasets>=4.9.9",
    "flatbuffers>=24.3",  # jax.export reads and writes with it, without asking for it
    "tqdm>=4.66",  # live lines; tensorflow-datasets brings it
    "importlib_resources>=6.0",  # tensorflow-datasets imports it without asking for it
]
# A Colab or TPU image keeps its own TensorFlow; the CPU build is enough to read data.
DATA = [
    'tensorflow-cpu>=2.18; sys_platform == "linux" and platform_machine == "x86_64"',
    'tensorflow>=2.18; sys_platform != "linux" or platform_machine != "x86_64"',
    "pillow>=11.0",  # reads what TensorFlow does not: WebP, TIFF, ...
]
TENSORBOARD = ["tensorboardX>=2.6"]
VIZ = ["matplotlib>=3.9", "pillow>=11.0"]
EXPORT = ["onnx>=1.17", "onnxruntime>=1.20"]  # jax2onnx asks for an older orbax-checkpoint: findings/
DOCS = [
    "mkdocs>=1.6,<2",
    "mkdocs-material>=9.5,<10",
    "mkdocstrings[python]>=1.0,<2",
]  # majors that break sites
EXTRAS = {
    "data": DATA,
    "viz": VIZ,
    "tensorboard": TENSORBOARD,
    "wandb": ["wandb>=0.31"],
    "torch": ["torch>=2.6"],
    "export": EXPORT,
    "ray": ["ray[data]>=2.51", "pillow>=11.0"],
    "hub": ["huggingface_hub>=0.30"],
    "cuda": ["jax[cuda12]"],
    "tpu": ["jax[tpu]"],
    "aot": ["libtpu"],
    "docs": DOCS,
    "dev": [
        *DATA,
        *VIZ,
        *TENSORBOARD,
        *EXPORT,
        *DOCS,
        "openvino>=2025.0",  # what ONNX files are run with besides
        "pytest>=8.3",
        "pytest-xdist>=3.6",
        "hypothesis>=6.120",
        "nbclient>=0.10",
        "nbformat>=5.10",
        "ipykernel>=6.29",
        "ruff>=0.9",
        "mypy>=1.15",
        "scikit-image>=0.25",  # photographs to time the input with
        "scikit-learn>=1.6",  # likewise
    ],
}

setup(
    name="dyntoken",
    version=VERSION,
    description="Adaptive-token vision transformers in JAX: DynamicViT, TPS, EViT, one parameter tree, static shapes",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["dyntoken", "dyntoken.*"]), "dyntoken.configs"],
    package_dir={"dyntoken.configs": "configs"},
    package_data={
        "dyntoken": ["py.typed", "data/fashion_mnist_mini/*", "weights/pretrained/*", "analysis/*.html"],
        "dyntoken.configs": ["*.py"],
    },
    entry_points={"console_scripts": ["dyntoken = dyntoken.__main__:main"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Typing :: Typed",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
