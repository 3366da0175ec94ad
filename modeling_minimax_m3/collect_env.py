"""Print what a bug report needs: versions, hardware, the compiled kernels, and the variables that change what runs.

    python -m modeling_minimax_m3.collect_env

Nothing is built, downloaded or sent.
"""

import os
from importlib import metadata
from pathlib import Path

from torch.utils import collect_env as torch_environment

from .msa import available_backends, extension, kernel_build
from .version import __version__

PACKAGES = (
    *("transformers", "accelerate", "peft", "datasets", "trl", "tokenizers", "safetensors", "huggingface_hub"),
    *("torchvision", "av", "torchcodec", "pillow", "numpy", "bitsandbytes", "torchao", "deepspeed"),
)
PREFIXES = ("MINIMAX_M3_", "CUDA_", "PYTORCH_", "TORCH_", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "XDG_CACHE_HOME")


def installed_version(package: str) -> str:
    """The version of a distribution, or "not installed"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _kernels() -> str:
    path, reason = extension.find_library()
    return str(path) if path is not None else f"not found: {reason}"


def _kernels_run() -> str:
    reason = extension.unavailable() or extension.load(build=False)
    return f"no: {reason}" if reason else "yes"


def _backends() -> str:
    return ", ".join(available_backends())


def _cuda_of_driver() -> str:
    version = extension.driver_version()
    return "no driver" if version is None else f"{version[0]}.{version[1]}"


def _nvcc() -> str:
    nvcc = kernel_build.find_nvcc()
    if nvcc is None:
        return "not found"
    major, minor = kernel_build.toolkit_version(nvcc)
    return f"{nvcc}, CUDA {major}.{minor}"


def describe_kernels() -> dict[str, str]:
    """The compiled kernels: which file is loaded, whether it runs, and what could build it.

    Nothing is built. What fails is reported as the error that it gives: a broken machine needs the other lines most.
    """
    parts = {
        "kernels": _kernels,
        "kernels run": _kernels_run,
        "backends": _backends,
        "CUDA of the driver": _cuda_of_driver,
        "nvcc": _nvcc,
    }
    described = {}
    for name, describe in parts.items():
        try:
            described[name] = describe()
        except Exception as error:
            described[name] = f"{type(error).__name__}: {error}"
    return described


def collect() -> str:
    """The report: our own lines, then those of `torch.utils.collect_env`, which knows the system and the GPUs."""
    ours = {
        "minimax-m3-transformers": f"{__version__} in {Path(__file__).parent}",
        **{package: installed_version(package) for package in PACKAGES},
        **describe_kernels(),
        **{name: value for name, value in sorted(os.environ.items()) if name.startswith(PREFIXES)},
    }
    width = max(map(len, ours))
    lines = [f"{name:{width}}  {value}" for name, value in ours.items()]
    return "\n".join([*lines, "", torch_environment.get_pretty_env_info()])


def main() -> None:
    """Print the report."""
    print(collect())


if __name__ == "__main__":
    main()
