"""Packaging: `gin/` is shipped as `prompt_tuning/gin`, never as a top-level package."""

from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
ROOMS = sorted(p.parent.name for p in (ROOT / "prompt_tuning").glob("*/__init__.py"))
GIN = sorted({p.parent.as_posix() for p in (ROOT / "gin").rglob("*.gin")})
GIN_PACKAGES = {
    "prompt_tuning." + Path(folder).relative_to(ROOT).as_posix().replace("/", "."): Path(folder)
    .relative_to(ROOT)
    .as_posix()
    for folder in GIN
}

# The one place of the address: `python notebooks/build.py` takes it to the notebooks.
URL = "https://github.com/OWNER/prompt_tuning"

# T5X is not on the package index; docs/t5x.md says how to install it beside the rest.
T5X = "t5x @ git+https://github.com/google-research/t5x@cc342d419ec3e3e9c4bf1df33c82330cafdc1e16"
TEST = [
    "hypothesis",
    "pytest",
    "pytest-xdist",
    "nbclient",
    "nbformat",
    "ipykernel",
    "setuptools>=69",
]

setup(
    name="prompt-tuning",
    version="1.0.0.dev0",
    description="Prompt tuning for frozen T5 models, in JAX and Flax, with T5X's command line",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    url=URL,
    python_requires=">=3.11,<3.14",
    packages=["prompt_tuning", *(f"prompt_tuning.{room}" for room in ROOMS), *GIN_PACKAGES],
    package_dir=GIN_PACKAGES,
    package_data={
        **{package: ["*.gin"] for package in GIN_PACKAGES},
        "prompt_tuning": ["py.typed"],
        "prompt_tuning.world": ["tiny/**/*", "tiny/**/.zarray"],
    },
    install_requires=[
        "beartype>=0.18",
        "flax>=0.12",
        "gin-config>=0.5",
        "importlib_resources",  # tensorflow-datasets needs it to prepare data, undeclared
        "jax>=0.10",
        "jaxtyping>=0.3",
        "matplotlib>=3.8",
        "msgpack>=1.0",
        "numpy>=1.26",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.11.40",
        "protobuf>=7.36.1",  # sentencepiece's generated code needs it, undeclared
        "safetensors>=0.4",
        "scikit-learn>=1.4",
        "sentencepiece>=0.2.3",
        "seqio>=0.0.20",
        "tensorboard>=2.20",
        "tensorboardX>=2.6.4",
        "tensorflow-datasets>=4.9.9",
        "tensorstore>=0.1.75",
        "tqdm>=4.66",
    ],
    extras_require={
        "test": TEST,
        "dev": [*TEST, "ruff", "pyright[nodejs]", "pre-commit"],
        "t5x": [T5X],
        "bench": ["peft", "torch", "transformers"],  # what benchmarks/ compares with
        "plan": ["libtpu"],  # the TPU's compiler, for `t5x plan --topology=v5e:...`
    },
    entry_points={
        "console_scripts": [
            "t5x = prompt_tuning.cli:main",
            "prompt-tuning = prompt_tuning.cli:main",
        ]
    },
)
