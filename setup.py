"""Packaging of bossnas: the library, its kernels (from kernels/bossnas_kernels) and the embedded sample."""

import re
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).resolve().parent
version = re.search(r'^__version__ = "(.+)"$', (root / "bossnas/__init__.py").read_text("utf-8"), re.M)

setup(
    name="bossnas",
    version=version[1],
    description="Block-wise self-supervised neural architecture search for hybrid CNN-transformers",
    long_description=(root / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=[*find_packages(include=["bossnas", "bossnas.*"]), "bossnas_kernels"],
    package_dir={"bossnas_kernels": "kernels/bossnas_kernels"},
    package_data={
        "bossnas": ["py.typed"],
        "bossnas_kernels": ["py.typed"],
        "bossnas.report": ["page.html", "page.css", "page.js"],
        "bossnas.data.sample": ["*.tar.gz", "README.md", "LICENSE"],
    },
    entry_points={"console_scripts": ["bossnas = bossnas.cli:main"]},
    python_requires=">=3.10,<3.14",
    install_requires=[
        "torch>=2.11",
        "torchvision",
        "deepspeed",
        "triton>=3.6; platform_system == 'Linux' and platform_machine == 'x86_64'",
        "webdataset",
        "fsspec",
        "simplejpeg",
        "opencv-python-headless",
        "timm",
        "matplotlib",
        "jinja2",
        "torchmetrics",
        "pyyaml",
        "numpy",
        "scipy",
        "pydantic>=2",
        "rich",
        "safetensors",
        "typer",
        "pillow",
    ],
    extras_require={
        "http": ["aiohttp"],  # shards on web servers; object stores:
        "s3": ["s3fs"],
        "gs": ["gcsfs"],
        "gpu": ["nvidia-ml-py"],  # what torch.cuda.utilization and temperature need
        "export": ["onnx", "onnxruntime", "onnxscript"],  # bossnas export --formats onnx
        "report": ["tensorboard"],
        "dev": [
            "aiohttp",
            "fvcore",
            "import-linter",
            "mypy",
            "onnx",
            "onnxruntime",
            "onnxscript",
            "pytest",
            "pytest-timeout",
            "ruff",
            "selenium",
            "types-PyYAML",
        ],
    },
)
