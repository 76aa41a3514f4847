"""Checks that come before the dispatcher, whose own message for a wrong Python type names no argument."""

from __future__ import annotations

import torch


def require_tensors(**arguments: object) -> None:
    """Raise TypeError unless every argument is a tensor."""
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def require_optional_tensors(**arguments: object) -> None:
    """Raise TypeError unless every argument is a tensor or None."""
    require_tensors(**{name: value for name, value in arguments.items() if value is not None})


def require_strings(**arguments: object) -> None:
    """Raise TypeError unless every argument is a string."""
    for name, value in arguments.items():
        if not isinstance(value, str):
            raise TypeError(f"{name}: expected a string, got {type(value).__name__}")


def require_flags(**arguments: object) -> None:
    """Raise TypeError unless every argument is a bool."""
    for name, value in arguments.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def require_integers(**arguments: object) -> None:
    """Raise TypeError unless every argument is an integer (a symbolic one counts)."""
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")


def require_numbers(**arguments: object) -> None:
    """Raise TypeError unless every argument is an integer or a float."""
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
