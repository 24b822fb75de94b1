"""Packages that only a part of jlt needs: imported where they are used; one that is missing is one line."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def needed(what: str, extra: str) -> Iterator[None]:
    """Make an ImportError within a ValueError: what cannot be done, why, and the extra that brings the package."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f"{what}: {error}; pip install 'jlt[{extra}]'") from None
