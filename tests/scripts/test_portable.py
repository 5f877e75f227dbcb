"""`make portable`: one line per setting, and a failure under any of them is a failure."""

from __future__ import annotations

from helpers import script

REPORT = (
    """<testsuites><testsuite name="pytest" errors="1" failures="2" skipped="3" tests="10" time="1.5"/></testsuites>"""
)
ONE_TEST = ["tests/core/test_serialize.py", "-k", "callers_already_catch"]


def test_a_report_is_counted_with_errors_as_failures(tmp_path):
    (tmp_path / "report.xml").write_text(REPORT)
    assert script("portable").counts(tmp_path / "report.xml") == (4, 3, 3)
    assert script("portable").counts(tmp_path / "none.xml") == (0, 0, 0)


def test_every_setting_gets_a_line_and_a_suite_that_does_not_pass_fails(tmp_path, capsys):
    portable = script("portable")
    one = ["--output", str(tmp_path), "--only", "aten-default", "--"]
    assert portable.main([*one, *ONE_TEST]) == 0
    line = capsys.readouterr().out
    assert line.startswith("aten-default    ok      exit status 0       1 passed    0 failed    0 skipped")
    assert portable.main([*one, "--noconftest", "tests/none.py"]) == 1  # which imports torch before it looks for files
    assert "FAILED  exit status 4" in capsys.readouterr().out
    assert "tests/none.py" in (tmp_path / "aten-default.log").read_text()
