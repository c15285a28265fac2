"""The former place of the `ranklet` command, for scripts that still import it from here."""

from ranklet.cluster.command.cli import main

__all__ = ["main"]
