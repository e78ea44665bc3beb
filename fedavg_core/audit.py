"""The audit of a round: what was averaged, so that whoever has the updates can average it again.

A round that was asked for it ends with an `Audit`: which updates came, in which order, and what
became of each, with the digest of its parameters; how they were averaged; and the fingerprint of
each parameter of the model before and after, and of the server optimizer's state where there is
one. It holds no values of parameters. `fedavg_core.replay` says what can be done with it.

    outcome = fc.Round(model, number, audit=True).close()
    text = outcome.audit.to_text()  # JSON, for a file
    audit = fc.Audit.from_text(text)

The text has a checksum, which finds damage. It does not say who wrote the text; for that it takes a
signature of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from fedavg_core.accumulator import Accumulator
from fedavg_core.digest import Fingerprint
from fedavg_core.errors import UsageError, quoted
from fedavg_core.receipt import Receipt
from fedavg_core.update import TransferType

__all__ = ["Audit"]

_FORMAT = 1
_FIELDS = {
    "audit",
    "round",
    "transfer",
    "accumulator",
    "min_updates",
    "averaged",
    "base",
    "receipts",
    "output",
    "optimizer",
    "state",
    "output_state",
    "checksum",
}


@dataclass(frozen=True)
class Audit:
    """What a round did.

    Attributes:
        round: Its number.
        transfer: What the updates' arrays are; None if no update has said.
        accumulator: How they were added; the settings of a robust mean.
        min_updates: How many accepted updates it took to change the model.
        averaged: The names of the parameters that were averaged, sorted; what an update brought
            beside them was left out.
        base: The model before, by the fingerprints of its parameters; empty if there was none.
        receipts: What became of each update, in the order of arrival, with its digest.
        output: The model after, likewise.
        optimizer: The settings of the server optimizer; None if the mean is the model after.
        state: The optimizer's state before, like the models.
        output_state: Its state after.
    """

    round: int
    transfer: TransferType | None
    accumulator: Accumulator | Mapping[str, Any] = field(hash=False)
    min_updates: int
    averaged: tuple[str, ...]
    base: Mapping[str, Fingerprint] = field(hash=False)
    receipts: tuple[Receipt, ...]
    output: Mapping[str, Fingerprint] = field(hash=False)
    optimizer: Mapping[str, Any] | None = field(default=None, hash=False)
    state: Mapping[str, Fingerprint] = field(default_factory=dict, hash=False)
    output_state: Mapping[str, Fingerprint] = field(default_factory=dict, hash=False)

    @property
    def accepted(self) -> tuple[Receipt, ...]:
        """The receipts of the updates that were averaged, in the order of arrival."""
        return tuple(receipt for receipt in self.receipts if receipt.accepted)

    @property
    def refused(self) -> tuple[Receipt, ...]:
        """The receipts of all others, in the order of arrival."""
        return tuple(receipt for receipt in self.receipts if not receipt.accepted)

    def to_text(self) -> str:
        """The audit as text, to be kept.

        Returns:
            JSON, in ASCII, with a checksum.
        """
        body = {
            "audit": _FORMAT,
            "round": self.round,
            "transfer": None if self.transfer is None else str(self.transfer),
            "accumulator": self.accumulator,
            "min_updates": self.min_updates,
            "averaged": list(self.averaged),
            "base": _to_json(self.base),
            "receipts": [receipt.to_json() for receipt in self.receipts],
            "output": _to_json(self.output),
            "optimizer": None if self.optimizer is None else dict(self.optimizer),
            "state": _to_json(self.state),
            "output_state": _to_json(self.output_state),
        }
        return json.dumps({**body, "checksum": _checksum(body)}, indent=1) + "\n"

    @classmethod
    def from_text(cls, text: str | bytes) -> Audit:
        """The audit that `to_text` was asked of.

        Args:
            text: What it gave, as text or as the bytes of a file. Nothing in it is believed.

        Returns:
            An equal audit.

        Raises:
            UsageError: The text is no audit, or was damaged.
        """
        try:
            if isinstance(text, bytes):
                text = text.decode("utf-8")
            meta = json.loads(text, object_pairs_hook=_without_duplicates)
            if not isinstance(meta, dict) or "audit" not in meta:
                raise ValueError("it does not say that it is one")
            if type(meta["audit"]) is not int:
                raise ValueError("it does not say of which format it is")
            if meta["audit"] != _FORMAT:
                raise ValueError(f"expected format {_FORMAT}, got {quoted(meta['audit'])}")
            if meta.keys() != _FIELDS:
                odd = sorted(meta.keys() ^ _FIELDS)
                raise ValueError(f"its fields are others: {quoted(odd)}")
            if meta.pop("checksum") != _checksum(meta):
                raise ValueError("its checksum is that of another text")
            return cls._read(meta)
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            raise UsageError(f"this is no audit of a round: {quoted(str(error), 200)}") from None

    @classmethod
    def _read(cls, meta: dict[str, Any]) -> Audit:
        """See that each field is of its kind, and that together they tell of one round."""
        round, least = meta["round"], meta["min_updates"]
        if type(round) is not int or round < 0 or type(least) is not int or least < 1:
            raise ValueError("its number or how many updates it took is no such number")
        kind = meta["accumulator"]
        if not isinstance(kind.get("name") if isinstance(kind, dict) else None, str) and (
            kind not in get_args(Accumulator)
        ):
            raise ValueError(f"the accumulator {quoted(kind)}")
        transfer = None if meta["transfer"] is None else TransferType(meta["transfer"])
        averaged = meta["averaged"]
        if not isinstance(averaged, list) or averaged != sorted({str(key) for key in averaged}):
            raise ValueError("the names of what was averaged are not sorted names")
        base, output, state, output_state = (
            {key: Fingerprint.from_json(one) for key, one in meta[arrays].items()}
            for arrays in ("base", "output", "state", "output_state")
        )
        receipts = tuple(Receipt.from_json(entry, round) for entry in meta["receipts"])
        if [receipt.to_json() for receipt in receipts] != meta["receipts"]:
            raise ValueError("a receipt that says more than one can say")
        accepted = [receipt for receipt in receipts if receipt.accepted]
        if not all(receipt.digest for receipt in accepted):
            raise ValueError("a receipt for an update that was added, without its digest")
        if len({receipt.contributor for receipt in accepted}) != len(accepted):
            raise ValueError("a contributor has two receipts for an update that was added")
        if accepted and transfer is None:
            raise ValueError("updates that were added, and no transfer type")
        if transfer is TransferType.DIFF and not base:
            raise ValueError("differences, and no model that they are taken from")
        if base and (
            not base.keys() >= set(averaged)
            or {key: (one.dtype, one.shape) for key, one in base.items()}
            != {key: (one.dtype, one.shape) for key, one in output.items()}
        ):
            raise ValueError("the models before and after have other parameters")
        optimizer = meta["optimizer"]
        if optimizer is None:
            if state or output_state:
                raise ValueError("a state, and no server optimizer whose state it could be")
        elif not isinstance(optimizer, dict) or not isinstance(optimizer.get("name"), str):
            raise ValueError("a server optimizer without a name")
        return cls(
            round,
            transfer,
            meta["accumulator"],
            least,
            tuple(averaged),
            base,
            receipts,
            output,
            optimizer,
            state,
            output_state,
        )


def _to_json(found: Mapping[str, Fingerprint]) -> dict[str, Any]:
    return {key: one.to_json() for key, one in found.items()}


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("it says something twice")
    return entries


def _checksum(body: Mapping[str, Any]) -> str:
    """The SHA-256 of what the text says, however it is laid out."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()
