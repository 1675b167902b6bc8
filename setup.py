"""Only the package list: `kernels/` at the top of the tree is installed as `minires.kernels` (see pyproject.toml)."""

from setuptools import find_packages, setup

setup(
    packages=find_packages(".", include=["minires", "minires.*"])
    + ["minires." + package for package in find_packages(".", include=["kernels", "kernels.*"])]
)
