"""All settings of one process that change while it runs."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ranklet.cluster.settings.setting import Content, Keeper, NoKeeper, Setting
from ranklet.cluster.settings.watched_file import WatchedFile


class Settings(Collector):
    """Creates the settings of a process, and exports whether the newest content of each is in force."""

    def __init__(self, keeper: Keeper | None = None) -> None:
        self._keeper = keeper or NoKeeper()
        self._settings: list[Setting[Any]] = []
        self._files: list[WatchedFile[Any]] = []

    def setting(self, name: str, errors: type[Exception]) -> Setting[Any]:
        made: Setting[Any] = Setting(name, errors, self._keeper)
        self._settings.append(made)
        return made

    def file(
        self, name: str, path: Path, read: Callable[[Path], Content], errors: type[Exception], interval_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> WatchedFile[Content]:  # fmt: skip
        """Read a file and watch it; see `Setting` and `WatchedFile`."""
        file = WatchedFile(path, read, self.setting(name, errors), interval_s, clock)
        self._files.append(file)
        return file

    def look(self) -> None:
        """Look at all files, so that a fault in one is noticed without a request that needs it. Blocks.

        To be called about once a second.
        """
        self._keeper.repeat()
        for file in self._files:
            file.content()

    def refused(self) -> dict[str, str]:
        """Return why the newest content of a setting is not in force, by the setting's name."""
        return {each.name: each.problem for each in self._settings if each.problem is not None}

    def collect(self) -> Iterable[Metric]:
        refused = GaugeMetricFamily(
            "ranklet_setting_refused", "1 while the newest content of a setting is refused", labels=["setting"]
        )
        refusals = CounterMetricFamily(
            "ranklet_setting_refusals", "Contents of a setting that were refused", labels=["setting"]
        )
        for each in self._settings:
            refused.add_metric([each.name], float(each.problem is not None))
            refusals.add_metric([each.name], each.refusals)
        yield refused
        yield refusals
