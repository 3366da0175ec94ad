"""Tags a wheel that holds compiled kernels for its platform; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel

BINARIES = list(Path(__file__).parent.glob("modeling_minimax_m3/msa/kernels-*.so"))


class MaybeBinary(Distribution):
    def has_ext_modules(self):
        return bool(BINARIES)


class PlatformWheel(bdist_wheel):
    """The kernels depend on the system and the processor, but not on the version of Python."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(cmdclass={"bdist_wheel": PlatformWheel}, distclass=MaybeBinary)
