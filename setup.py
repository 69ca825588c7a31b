"""Installs mmdit_jax, its data pipelines and its configs: `pip install -e .`"""

from setuptools import find_packages, setup

setup(
    name="mmdit-jax",
    version="0.1.0",
    description="Train Stable Diffusion 3-class models (MM-DiT + rectified flow) in JAX",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["mmdit_jax*", "data_pipelines*", "configs*"]),
    install_requires=[
        "absl-py",
        "etils[epath]",
        "flax>=0.12",
        "grain>=0.2.18",
        "jax>=0.10",
        "ml_collections>=1.1",
        "msgpack",
        "numpy>=2",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "pillow>=11",
        "safetensors",
        "tensorboard",
        "tensorflow-datasets>=4.9.9",
        "tokenizers",
        "transformers>=5",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "gpu": ["jax[cuda12]"],
        "test": ["basedpyright", "hypothesis", "pytest", "pytest-xdist", "ruff", "scipy"],
        "parity": ["diffusers", "faiss-cpu", "pyarrow", "torch==2.13.0"],
        "plot": ["matplotlib"],
        "beam": ["apache-beam"],
        "parquet": ["pyarrow"],
        "dedup": ["faiss-cpu"],
    },
)
