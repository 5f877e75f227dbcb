"""scripts/faults.py: every fault has its place in today's source, and a test that the page of faults names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from faults import FAULTS, Fault, with_fault

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "faults.md").read_text("utf-8")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.number} {fault.file}")
def test_a_fault_can_be_put_back_and_its_test_is_on_the_page(fault: Fault) -> None:
    source = (ROOT / "src" / "starflow2" / fault.file).read_text("utf-8")
    compile(with_fault(source, fault), fault.file, "exec")
    path, _, name = fault.test.partition("::")
    assert f"{Path(path).name}:{name}" in PAGE and f"def {name}(" in (ROOT / path).read_text("utf-8")


def test_the_page_marks_the_findings_whose_faults_are_put_back() -> None:
    assert {fault.number for fault in FAULTS} == set(re.findall(r"\b([abm]\d+)\*", PAGE))


def test_a_fault_without_its_place_is_told() -> None:
    with pytest.raises(ValueError, match=r"a0: x\.py has 'b' 2 times, not once"):
        with_fault("bb", Fault("a0", "x.py", "b", "c", "tests/test_x.py::test_y"))
