"""Which way requests take into this cluster. Ray decides it by environment variables of its own processes."""

import os
from dataclasses import dataclass
from importlib import metadata
from typing import Any

# What the recommended path needs in the environment of `ray start` on every node.
FAST_PATH = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
_PACKAGES = ("ranklet", "ray", "torch", "triton", "transformers")


@dataclass(frozen=True)
class DataPath:
    """The ingress, and whether Serve runs without its extra threads."""

    ingress: str  # haproxy, serve-proxy
    throughput_optimized: bool

    @classmethod
    def current(cls) -> "DataPath":
        """The data path of the process this runs in."""
        haproxy, optimized = (os.environ.get(name) == "1" for name in FAST_PATH)
        return cls("haproxy" if haproxy else "serve-proxy", optimized)

    def summary(self) -> str:
        """One line for the log."""
        if self.ingress == "haproxy" and self.throughput_optimized:
            return "data path: HAProxy, throughput optimized"
        settings = " ".join(f"{name}={value}" for name, value in FAST_PATH.items())
        return (
            f"data path: {self.ingress}, throughput optimized: {str(self.throughput_optimized).lower()}. "
            f"Several times more requests per second with {settings} in the environment of `ray start` on every node; "
            "`ranklet up` sets it"
        )


def versions() -> dict[str, Any]:
    """Installed versions and the data path, for `GET /version`."""
    path = DataPath.current()
    return {
        **{name: version_of(name) for name in _PACKAGES},
        "data_path": path.ingress,
        "throughput_optimized": path.throughput_optimized,
    }


def version_of(package: str) -> str | None:
    """The installed version of a package; None if there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
