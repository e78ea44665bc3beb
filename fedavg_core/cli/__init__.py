"""The command ``fedavg``. It needs the extra ``cli``; nothing else imports it."""

from fedavg_core.cli.main import main

__all__ = ["main"]
