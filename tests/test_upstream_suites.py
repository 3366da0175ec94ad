"""How `scripts/upstream_suites` evaluates a run of Transformers' own tests."""

import pytest


@pytest.fixture(scope="module")
def suites(load_script):
    return load_script("upstream_suites.__main__")


KNOWN = {"*Test::test_a*": "no such thing", "ModelTest::test_b": "on purpose"}
AS_KNOWN = {"ModelTest::test_a_0": "failed", "ModelTest::test_b": "failed", "ModelTest::test_c": "passed"}


def test_a_run_that_fails_as_known_has_nothing_unexpected(suites):
    assert suites.find_unexpected(AS_KNOWN, KNOWN, is_complete=True) == []
    assert suites.find_unexpected(AS_KNOWN | {"ModelTest::test_a_1": "skipped"}, KNOWN, is_complete=True) == []


@pytest.mark.parametrize(
    "change, named",
    [
        ({"ModelTest::test_c": "failed"}, "ModelTest::test_c failed"),
        ({"ModelTest::test_a_1": "passed"}, "ModelTest::test_a_1 passed"),
    ],
)
def test_another_failure_and_a_known_one_that_passes_are_unexpected(suites, change, named):
    (message,) = suites.find_unexpected(AS_KNOWN | change, KNOWN, is_complete=True)
    assert message.startswith(named)


def test_an_entry_without_a_test_is_unexpected_where_all_tests_ran(suites):
    outcomes = {"ModelTest::test_b": "failed"}
    assert suites.find_unexpected(outcomes, KNOWN, is_complete=False) == []
    (message,) = suites.find_unexpected(outcomes, KNOWN, is_complete=True)
    assert message.startswith("*Test::test_a*")


class Report:
    def __init__(self, outcome, when="call"):
        self.nodeid, self.outcome, self.when = "tests/test_models.py::ModelTest::test_a", outcome, when


@pytest.mark.parametrize(
    "reports, outcome",
    [
        ([Report("passed", "setup"), Report("passed"), Report("passed", "teardown")], "passed"),
        ([Report("skipped", "setup"), Report("passed", "teardown")], "skipped"),
        ([Report("passed", "setup"), Report("failed"), Report("passed")], "failed"),  # of a part, then of the test
        ([Report("failed", "setup"), Report("passed", "teardown")], "failed"),
        ([Report("passed"), Report("failed", "teardown")], "failed"),
    ],
)
def test_a_test_fails_where_a_phase_or_a_part_of_it_fails(suites, reports, outcome):
    results = suites.Results()
    for report in reports:
        results.pytest_runtest_logreport(report)
    assert results.outcomes == {"ModelTest::test_a": outcome}


@pytest.mark.parametrize("release", ["5.23.0", "5.24.0"])
@pytest.mark.parametrize("subject", ["ours", "stock"])
def test_each_known_failure_has_a_reason(suites, release, subject):
    known = suites.read_known_failures(release, subject)
    assert known
    assert all(reason.endswith(".") for reason in known.values())


def test_a_failure_of_stock_is_not_expected_of_this_project(suites):
    ours, stock = (suites.read_known_failures("5.24.0", subject) for subject in ("ours", "stock"))
    assert "TextParallelTest::test_fsdp2_plan_vs_ddp_*" in stock
    assert "TextParallelTest::test_fsdp2_plan_vs_ddp_*" not in ours
