import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from .compare import check
from .draw import THEMES, cases

@pytest.mark.parametrize("theme", THEMES)
def test_fuzz(theme):
    figures = []
    @settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
    @given(cases(theme))
    def run(case):
        figures.append(check(case))
    try:
        run()
    finally:
        tot = figures[0] if figures else None
        for f in figures[1:]: tot.add(f)
        print(tot)
