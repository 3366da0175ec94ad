"""Compile the CUDA kernels into the package, or check that they compile. Needs nvcc and torch's headers, but no GPU.

python scripts/build_kernels.py            # writes the binary to modeling_minimax_m3/msa/, for the package and wheels
python scripts/build_kernels.py --check    # compiles one instantiation of each kernel; skipped without nvcc
"""

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
MSA = ROOT / "modeling_minimax_m3" / "msa"


def load_kernel_build() -> ModuleType:
    """Loads the package's build module by its path, without the package or Transformers installed."""
    spec = importlib.util.spec_from_file_location("kernel_build", MSA / "kernel_build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compile one instantiation of each kernel and stop")
    parser.add_argument("--jobs", type=int, help="compilers to run at a time; default: one per core")
    parser.add_argument("--output", type=Path, default=MSA, help="folder of the binary; default: the package")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "kernels", help="folder of objects to reuse")
    parser.add_argument("--allow-spills", action="store_true", help="build even if a kernel spills registers")
    options = parser.parse_args(arguments)
    kernel_build = load_kernel_build()

    def say(line: str) -> None:
        print(line, flush=True)

    try:
        if not options.check:
            library = kernel_build.build(options.output, options.cache, options.jobs, say, options.allow_spills)
            for stale in set(options.output.glob("kernels-*.so")) - {library}:  # a wheel would contain all of them
                stale.unlink()
            say(f"built {library}")
        elif kernel_build.check(options.cache, options.jobs, say):
            say("the kernels compile, and no kernel spills registers except where its file allows it")
        else:
            say("skipped: nvcc was not found, so the kernels were not compiled")
    except kernel_build.BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
