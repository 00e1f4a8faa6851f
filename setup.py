"""The packages of the wheel, which pyproject.toml cannot say: ``configs/`` comes along as ``spo_jax/configs/``."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[*find_namespace_packages(include=["spo_jax*"]), "spo_jax.configs"],
    package_dir={"spo_jax.configs": "configs"},
)
