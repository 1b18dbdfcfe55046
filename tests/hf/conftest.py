"""Directories that the tests of this folder read and never change."""

from pathlib import Path

import pytest
from packed_models import FORMS, logits, write
from torch import Tensor


@pytest.fixture(scope="session")
def forms(tmp_path_factory) -> tuple[Path, dict[str, Tensor]]:
    """A folder of directories, and the logits of the models that were saved there."""
    root = tmp_path_factory.mktemp("forms")
    return root, {name: logits(write(root / name, *form)) for name, form in FORMS.items()}
