"""docs/torch.md is what its results make it."""

import json
from pathlib import Path

from tests.torchs.__main__ import RESULTS, ROOT, SUITES, page


def test_the_page_is_that_of_the_results():
    assert (ROOT / "docs/torch.md").read_text() == page(json.loads(RESULTS.read_text())), "run `make test-torch`"


def test_every_suite_is_there():
    assert all(Path(ROOT, each).exists() for files in SUITES.values() for each in files)


def test_the_newest_pin_was_run():
    pins = dict(line.split("==") for line in (ROOT / ".ci/newest.txt").read_text().splitlines() if "==" in line)
    assert any(row["torch"] == pins["torch"] for row in json.loads(RESULTS.read_text()))
