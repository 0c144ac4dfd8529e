"""Which cases of an exhaustive test every run has; `make test-slow` has them all."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from _pytest.mark.structures import ParameterSet


def always(*kept: Any, of: Iterable[Any]) -> list["ParameterSet"]:
    """Return all cases as parameters, slow unless they, or the first of their values, are kept."""
    cases = [case if isinstance(case, tuple) else (case,) for case in of]
    assert set(kept) <= {case[0] for case in cases}
    return [
        pytest.param(*case, marks=[] if case[0] in kept else [pytest.mark.slow]) for case in cases
    ]
