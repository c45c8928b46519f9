"""A pytest plugin: with RLHF_TEST_ALL=1, as .ci/run sets it, a test fails that would be skipped for want of a program or package.

CI installs whatever tests need, so what is missing there is a defect of CI, and a skip would hide it. What no installation
can bring stays a skip: see MAY_SKIP.
"""

import os

import pytest

MAY_SKIP = (  # how the reasons start
    "this is an image, which holds a part of the project",
    # what the kernel or a container around the machine does not allow
    "a cluster in namespaces needs root",
    "no namespaces here: ",
    "may not mount (no root)",
    "may not make network namespaces (no root)",
    "no Docker daemon answers, and only root can start one",
    "no base image, and only root can make one",
    "dockerd does not start here: ",
    "debootstrap can't make a Debian here: ",
    "no /proc here",
    # what is not on this machine
    "the schemas are packages, and no package index can be reached",
    "triton is a package, and no package index that can be reached has it: ",
)


def _fail_if_needed(report):
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("RLHF_TEST_ALL") == "1":
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not reason.startswith(MAY_SKIP):
            report.outcome = "failed"
            report.longrepr = f"skipped, and RLHF_TEST_ALL=1 wants every test to run: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    return _fail_if_needed((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    return _fail_if_needed((yield))
