"""Compile the CUDA kernels into the package, or check that they compile. Needs nvcc and torch's headers, but no GPU.

python scripts/build_kernels.py            # into modeling_minimax_m3/msa/, where the package and wheels find it
python scripts/build_kernels.py --check    # one instantiation of each kernel, no binary; skipped without nvcc
"""

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
MSA = ROOT / "modeling_minimax_m3" / "msa"


def load_kernel_build() -> ModuleType:
    """The package's build module by its path, so that neither the package nor Transformers has to be installed."""
    spec = importlib.util.spec_from_file_location("kernel_build", MSA / "kernel_build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compile one instantiation of each kernel and stop")
    parser.add_argument("--jobs", type=int, help="compilers that run at a time; default: one per core")
    parser.add_argument("--output", type=Path, default=MSA, help="folder of the binary; default: the package")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "kernels", help="folder of objects to reuse")
    parser.add_argument("--allow-spills", action="store_true", help="build also where a kernel spills registers")
    options = parser.parse_args(arguments)
    kernel_build = load_kernel_build()

    def say(line: str) -> None:
        print(line, flush=True)

    try:
        if not options.check:
            library = kernel_build.build(options.output, options.cache, options.jobs, say, options.allow_spills)
            for stale in set(options.output.glob("kernels-*.so")) - {library}:  # a wheel would take them all
                stale.unlink()
            say(f"built {library}")
        elif kernel_build.check(options.cache, options.jobs, say):
            say("the kernels compile, and none spills registers without saying why")
        else:
            say("skipped: the kernels were not compiled, because nvcc was not found")
    except kernel_build.BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
