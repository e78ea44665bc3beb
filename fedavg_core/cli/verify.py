"""``fedavg verify``: average the updates of a round again, and compare with its audit."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from fedavg_core.audit import Audit
from fedavg_core.checkpoint import Checkpoint, load_checkpoint
from fedavg_core.cli.arguments import Subparsers
from fedavg_core.cli.console import print_json, print_line
from fedavg_core.cli.run_folder import base_file
from fedavg_core.errors import CheckpointError, UsageError
from fedavg_core.out_of_core.model_file import load_model
from fedavg_core.replay import verify
from fedavg_core.server_optimizer import optimizer_named
from fedavg_core.update import TransferType

__all__ = ["add_commands"]

_MOST_BYTES = 1 << 28


def add_commands(commands: Subparsers) -> None:
    """Tell a parser about this command."""
    parser = commands.add_parser(
        "verify",
        help="check a round: average its updates again, and compare",
        description="Check what a round recorded in its audit. The audit has the digests of the "
        "updates and of the model that came of them: the updates are found among the files by "
        "their digests, averaged again, and the result is compared with the recorded one. A file "
        "that is named after a contributor (site-1.npz) also shows whose update has changed. One "
        "update is held in memory at a time. fedavg run keeps the updates with --keep-updates: "
        "those of audit-00000004.json are in updates-00000004. Audits are numbered by rounds, "
        "checkpoints by how many rounds are done: the base of audit-00000004.json is "
        "round-00000004.npz, that of the first audit first-model.npz. In a round of differences "
        "(--transfer diff) the updates are those: train returns its whole model, the difference is "
        "taken for it, and --keep-updates keeps the difference; fedavg diff makes one of a "
        "client's model. Exit code 0: the same bits; 1: something differs or is missing; 2: an "
        "error.",
    )
    parser.add_argument(
        "audit",
        type=Path,
        metavar="AUDIT.json",
        help="the audit of a round, such as fedavg run --audit writes",
    )
    parser.add_argument(
        "updates",
        nargs="+",
        type=Path,
        metavar="UPDATE",
        help="a file that may hold one of its updates; one that holds none, or cannot be read, is "
        "named, and is no error if each update was found in another",
    )
    parser.add_argument(
        "--base",
        type=Path,
        help="the model before the round, or the checkpoint that has it: needed where the updates "
        "are differences, and as a checkpoint where the server optimizer has a state",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(run=_verify)


def _verify(read: argparse.Namespace) -> int:
    audit = _read_audit(read.audit)
    for path in read.updates:
        if path.is_dir():
            raise UsageError(
                f"expected the files of updates, got a folder; {path}/*.npz names some"
            )
    if read.base is None:
        _check_without_base(audit)
    base = None if read.base is None else _read_base(read.base)
    verdict = verify(
        audit,
        {str(path): partial(load_model, path) for path in read.updates},
        None if base is None else base.model,
        optimizer_state=base.arrays if base is not None and audit.state else None,
    )
    if read.json:
        print_json(
            {
                "round": audit.round,
                "same_bits": verdict.same_bits,
                "missing": verdict.missing,
                "changed": verdict.changed,
                "surplus": verdict.surplus,
                "unread": verdict.unread,
                "differing": verdict.differing,
                "lines": verdict.lines,
            }
        )
    else:
        for line in verdict.lines:
            print_line(line)
    return 0 if verdict.same_bits else 1


def _check_without_base(audit: Audit) -> None:
    """See that a round can be checked without the model before it."""
    if len(audit.accepted) < audit.min_updates:
        return
    if audit.transfer is TransferType.DIFF:
        why = "its updates are differences from it"
    elif _steps_from_base(audit):
        why = "the server optimizer steps from it"
    else:
        return
    raise UsageError(
        f"--base is needed: expected the model before round {audit.round}, for {why}, got none "
        f"(fedavg run --keep-updates keeps it as {base_file(Path(), audit.round)})"
    )


def _steps_from_base(audit: Audit) -> bool:
    """Whether a server optimizer made the model, as far as it is known here."""
    try:
        return bool(
            audit.base and audit.optimizer and not optimizer_named(**audit.optimizer).is_plain
        )
    except UsageError:  # `verify` tells of it
        return False


def _read_base(path: Path) -> Checkpoint:
    """A checkpoint, or a model without the rest of one."""
    try:
        return load_checkpoint(path)
    except CheckpointError:
        return Checkpoint(load_model(path), 0)


def _read_audit(path: Path) -> Audit:
    try:
        if not path.is_file():
            got = "got a folder" if path.is_dir() else "there is none"
            raise CheckpointError(path, f"expected the file of an audit, {got}")
        if path.stat().st_size > _MOST_BYTES:
            raise CheckpointError(path, "it is too long for an audit")
        return Audit.from_text(path.read_bytes())
    except OSError as error:
        raise CheckpointError(path, f"could not be read ({error.strerror or error})") from error
    except UsageError as error:
        raise CheckpointError(path, str(error)) from None
