"""The outcome of a client's checks, read from a JUnit report."""

import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_REFUSED = re.compile(r"refused_by_name\[([\w -]+)\]")  # in the name of a check of what ranklet does not serve


@dataclass(frozen=True)
class Outcome:
    """The outcome of one client's checks.

    Attributes:
        version: version of the client.
        failed: names of the checks that failed.
        skipped: number of the client's own checks that do not apply.
        refused: what the client asked for and ranklet refused by name, as expected.
        measured: what the checks recorded, and the largest value of each.
        error: why the checks did not run; else empty.
    """

    client: str
    version: str
    passed: int = 0
    failed: tuple[str, ...] = ()
    skipped: int = 0
    refused: tuple[str, ...] = ()
    measured: tuple[tuple[str, float], ...] = ()
    seconds: float = 0.0
    error: str = ""

    @property
    def is_good(self) -> bool:
        return bool(self.passed) and not self.failed and not self.error

    def row(self) -> dict[str, Any]:
        """Return a row of the result file."""
        return {
            "client": self.client,
            "version": self.version,
            "passed": self.passed,
            "failed": len(self.failed) + bool(self.error),
            "not applicable": self.skipped,
            "refused by name": ", ".join(self.refused),
            "measured": ", ".join(f"{name} {value:.1e}" for name, value in self.measured),
            "seconds": round(self.seconds, 1),
        }


def read_report(report: Path, client: str, version: str, seconds: float) -> Outcome:
    """Read a report that pytest or Node wrote."""
    passed: list[str] = []
    failed: list[str] = []
    measured: dict[str, float] = {}
    skipped = 0
    for case in ET.parse(report).iter("testcase"):
        name = case.get("name", "?")
        for each in case.iter("property"):
            what, value = each.attrib["name"], float(each.attrib["value"])
            measured[what] = max(value, measured.get(what, value))
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(name)
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed.append(name)
    refused = [found[1] for name in passed if (found := _REFUSED.search(name))]
    return Outcome(
        client, version, len(passed), tuple(failed), skipped, tuple(refused), tuple(measured.items()), seconds
    )
