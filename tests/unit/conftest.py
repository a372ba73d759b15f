"""Shared by the tests without engines."""

import pytest


@pytest.fixture(scope="session")
def teacher_steps() -> int:
    """What a model has learned is of no matter here."""
    return 2
