"""Packaging. The folders at the root become sub-packages: nothing called `kernels` or `models` is ever installed."""

from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
FOLDERS = ["kernels", "runtime", "models", "benchmarks"]


def packages() -> dict[str, str]:
    """Import name -> folder, for every folder that holds Python files."""
    found = {"tritium": "tritium"}
    for top in FOLDERS:
        for folder in [ROOT / top, *(path for path in (ROOT / top).rglob("*") if path.is_dir())]:
            if any(folder.glob("*.py")):
                relative = folder.relative_to(ROOT)
                found["tritium." + ".".join(relative.parts)] = str(relative)
    return found


setup(
    name="tritium",
    version="0.1.0",
    description="A transformer runtime for Qwen and MobileLLM models, with hand-written Triton kernels",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=list(packages()),
    package_dir=packages(),
    package_data={
        # One pattern a depth: families' YAML files, and the bundled checkpoint with its text.
        "tritium.models": ["*/*.yaml", "*/train/*.yaml", "*/*/*.json", "*/*/*.safetensors", "*/*/*.txt", "*/*/*.md"],
        "tritium.kernels": ["tuning/*.yaml"],
        "tritium.benchmarks": ["*.yaml"],
    },
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "safetensors>=0.5",
        "huggingface_hub>=0.30",
        "tokenizers>=0.21",
        "pyyaml>=6.0",
        "jinja2>=3.1.6",
        "tqdm>=4.66",
        "numpy",  # torch warns at every start without it
    ],
    extras_require={
        "dev": [
            "pytest>=8",
            "pytest-benchmark>=5",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "transformers>=5.17",
            "tiktoken>=0.8",
            "peft>=0.17",
            "matplotlib>=3.9",
            "ruff>=0.15",
            "mypy>=2.0",
            "types-PyYAML",
            "types-tqdm",
            "build",
        ],
    },
    entry_points={"console_scripts": ["tritium=tritium.runtime.cli:main"]},
)
