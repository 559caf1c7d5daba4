"""What this machine's processor can do, for tests that need more than every processor has."""

from __future__ import annotations

import pytest


def require_bfloat16() -> None:
    """Skip a test where OpenVINO cannot multiply in bfloat16, which ``precision=fast`` is there."""
    library = pytest.importorskip("openvino")
    if "BF16" not in library.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no bfloat16")
