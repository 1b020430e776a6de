"""Two source roots in one distribution; everything else stands in pyproject.toml.

``kernels/`` is a source root and not a package: a top-level package of that name would be imported
in place of Hugging Face's ``kernels``, which diffusers and transformers look up. So the wheel takes
``thg_kernels`` from inside it. Nothing here needs torch: an isolated build stays small.
"""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["thg_engine*"]) + find_packages("kernels"),
    package_dir={"thg_kernels": "kernels/thg_kernels"},
)
