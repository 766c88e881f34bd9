"""
How many cases the properties are tried on, and where that is said at the end.

`make test` tries few, the same in each run. With HYPOTHESIS_PROFILE=nightly (`make nightly`) there
are many more, and others each time; a failure then prints how to get its case again.
"""

import os
import tempfile

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.configuration import set_hypothesis_home_dir

from tests.helpers.strategies import NIGHTLY, TRIED

FEWEST_CASES = 10_000  # of all properties together, that a nightly run promises

# A whole model or file is slow to make, which is no reason to stop
COMMON = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))
settings.register_profile("short", derandomize=True, **COMMON)
settings.register_profile("nightly", derandomize=False, print_blob=True, **COMMON)
settings.load_profile("nightly" if NIGHTLY else "short")
# Else it keeps what it has learned of Python's characters and constants beside the tests
set_hypothesis_home_dir(os.path.join(tempfile.gettempdir(), "msrcnn_d2-hypothesis"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item):
    before = sum(TRIED.values())
    yield
    item.user_properties.append(("cases", sum(TRIED.values()) - before))


def cases_of(terminalreporter):
    """{property: number of its cases}, from the processes of pytest-xdist as well."""
    reports = terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", [])
    return {
        report.nodeid.split("::", 1)[1]: number
        for report in reports
        for name, number in report.user_properties
        if name == "cases" and number and report.when == "call"
    }


def pytest_terminal_summary(terminalreporter):
    cases = cases_of(terminalreporter)
    if not cases:
        return
    terminalreporter.section("cases tried for each property")
    for name, number in sorted(cases.items(), key=lambda x: -x[1]):
        terminalreporter.line(f"{number:7,}  {name.removeprefix('test_').replace('_', ' ')}")
    terminalreporter.line(f"{sum(cases.values()):7,}  in all")


def pytest_sessionfinish(session):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    chosen = session.config.getoption("keyword") or any(".py" in x for x in session.config.args)
    if NIGHTLY and reporter and not chosen and not hasattr(session.config, "workerinput"):
        total = sum(cases_of(reporter).values())
        if total < FEWEST_CASES:
            reporter.line(f"Only {total:,} cases were tried, not {FEWEST_CASES:,}.", red=True)
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
