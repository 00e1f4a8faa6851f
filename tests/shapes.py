"""Checks jaxtyping's shapes and dtypes while the tests run; ``tests/conftest.py`` puts ``check`` over the package."""

import typing
from collections.abc import Callable

import beartype
import jaxtyping


def check(function: Callable) -> Callable:
    """Checks arguments and result of a function where their annotation has a shape; the other annotations are mypy's.

    A dataclass is not checked when it is made: JAX makes them with placeholders, ShapeDtypeStructs and shardings as
    leaves. What a function is given and gives in its own annotations counts.
    """
    if function.__name__ == "__init__":
        return function
    shapes = {name: hint for name, hint in function.__annotations__.items() if _has_shape(hint)}
    function.__annotations__ = shapes
    return beartype.beartype(function) if shapes else function


def _has_shape(hint: object) -> bool:
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(_has_shape(part) for part in typing.get_args(hint))
