"""What several unit tests share."""

from __future__ import annotations

import pytest
from scheduler_driver import Driver


@pytest.fixture
def drive(scheduler_module):
    def make(**options):
        return Driver(scheduler_module, **options)

    return make
