"""Shapes stated in signatures are checked in every test (not in `nn`, whose network is also compiled)."""

from pathlib import Path

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

install_import_hook(["jlt.flow", "jlt.data", "jlt.sampling", "jlt.evaluation"], "beartype.beartype")

settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def golden() -> Path:
    """The reference vectors computed with the authors' code; tests fail where they are absent."""
    folder = Path(__file__).parent / "golden"
    assert (folder / "jlt_p1" / "vectors.safetensors").is_file(), f"the reference vectors are missing in {folder}"
    return folder
