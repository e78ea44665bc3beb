"""The command ``fedavg``. It needs the extra ``cli``."""

from fedavg_core.cli.command import main

__all__ = ["main"]
