"""The audit of a round: what was averaged, so that whoever has the updates can average it again.

A round that was asked for it ends with an `Audit`: which updates came, in which order, and what
became of each, with the digest of its parameters; how they were averaged; and the fingerprint of
each parameter of the model before and after. It holds no values of parameters.

    outcome = fc.Federation(model, clients, rounds=1, audit=True).run()[0]
    text = outcome.audit.to_text()  # JSON, for a file
    verdict = fc.verify(fc.Audit.from_text(text), {"site-1": params, "site-2.npz": load}, model)
    verdict.same_bits  # whether the recorded model is their mean
    verdict.lines  # what is missing, changed, surplus or different, and last the verdict

Updates are told apart by their digests (see `fedavg_core.digest`), cut down to the parameters that
were averaged, as the round did it. What they are called decides nothing; but where one that was not
in the round is named after a contributor whose update is missing, that update is said to have
changed.

What a verdict says:

* The same bits: the recorded updates with the recorded weights give the recorded model. With the
  exact accumulator that holds on any machine. With the others the updates are added in the order
  in which they were, and it holds where float64 and float32 are those of IEEE 754.
* Nothing about a refusal. It is on record, with its reason; but most reasons (the sender, the
  round, the weight) do not show in the parameters.
* Nothing about who wrote the audit. Its checksum finds damage; against forgery it takes a signature
  of the text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, TypeAlias, get_args

from fedavg_core.accumulator import Accumulator, WeightedMean
from fedavg_core.digest import Fingerprint, digest, fingerprints
from fedavg_core.errors import FedAvgError, OutOfRange, UsageError, one_line, quoted
from fedavg_core.model import ArraySpec, ModelSpec, Params, dtype_named
from fedavg_core.receipt import Receipt
from fedavg_core.update import TransferType

__all__ = ["Audit", "Verdict", "verify"]

Source: TypeAlias = "Params | Callable[[], Params]"
"""The parameters of an update, or what loads them."""

_FORMAT = 1
_LINE = 200
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
    "checksum",
}


@dataclass(frozen=True)
class Audit:
    """What a round did.

    Attributes:
        round: Its number.
        transfer: What the updates' arrays are; None if no update has said.
        accumulator: How they were added.
        min_updates: How many accepted updates it took to change the model.
        averaged: The names of the parameters that were averaged, sorted; what an update brought
            beside them was left out.
        base: The model before, by the fingerprints of its parameters; empty if there was none.
        receipts: What became of each update, in the order of arrival, with its digest.
        output: The model after, likewise.
    """

    round: int
    transfer: TransferType | None
    accumulator: Accumulator
    min_updates: int
    averaged: tuple[str, ...]
    base: Mapping[str, Fingerprint] = field(hash=False)
    receipts: tuple[Receipt, ...]
    output: Mapping[str, Fingerprint] = field(hash=False)

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
            "base": {key: one.to_json() for key, one in self.base.items()},
            "receipts": [receipt.to_json() for receipt in self.receipts],
            "output": {key: one.to_json() for key, one in self.output.items()},
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
            if type(meta["audit"]) is not int or meta["audit"] != _FORMAT:
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
        if meta["accumulator"] not in get_args(Accumulator):
            raise ValueError(f"the accumulator {quoted(meta['accumulator'])}")
        transfer = None if meta["transfer"] is None else TransferType(meta["transfer"])
        averaged = meta["averaged"]
        if not isinstance(averaged, list) or averaged != sorted({str(key) for key in averaged}):
            raise ValueError("the names of what was averaged are not sorted names")
        base, output = (
            {key: Fingerprint.from_json(one) for key, one in meta[model].items()}
            for model in ("base", "output")
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
        return cls(
            round, transfer, meta["accumulator"], least, tuple(averaged), base, receipts, output
        )


@dataclass(frozen=True)
class Verdict:
    """What a replay of a round found.

    Attributes:
        same_bits: Whether the updates that were given have, averaged as recorded, the bits of the
            recorded model.
        lines: What there is to say, one line of printable text each; the last is the verdict.
        missing: The contributors of recorded updates that are neither here nor changed.
        changed: The contributors whose update is here by its name, and is another.
        surplus: The names of other updates that were given, and of which the record has nothing.
        unread: The names of those that could not be read.
        differing: The parameters whose bits are others than those recorded; of the base, if that
            is another one, else of the mean.
    """

    same_bits: bool
    lines: tuple[str, ...]
    missing: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    surplus: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    differing: tuple[str, ...] = ()


def verify(audit: Audit, updates: Mapping[str, Source], base: Params | None = None) -> Verdict:
    """Average the updates of a round again, and compare.

    Args:
        audit: What the round recorded.
        updates: From what each is called, such as a file's path or the contributor's name, to its
            parameters, or to a function that loads them. A function is called twice, and one
            update is held at a time; what it raises of `FedAvgError` is told and not raised.
        base: The model before the round; only read. Needed where the updates are differences.
            Where it is given, it is compared; else its recorded fingerprints are believed.

    Returns:
        The verdict.

    Raises:
        RefusedUpdate: The base is no model.
    """
    search = _Search(audit)
    for name, source in updates.items():
        search.look_at(name, source)
    missing, changed, surplus = search.told_apart()
    lines = search.lines
    lines += [f"contributor {quoted(one)}: missing" for one in missing]
    lines += [
        f"contributor {quoted(one)}: changed, for {_shown(name)} is another update"
        for one, name in changed.items()
    ]
    lines += [f"{_shown(name)}: surplus, for it was not offered in that round" for name in surplus]
    differing = {} if base is None else _differing(audit.base, fingerprints(base))
    lines += [f"base, key {quoted(key)}: {what}" for key, what in differing.items()]
    same = False
    told = "not replayed"
    if not (missing or changed or differing):
        try:
            differing = _differing(audit.output, _again(audit, search, base))
        except FedAvgError as error:
            lines.append(f"the updates cannot be averaged: {one_line(error, _LINE)}")
        else:
            lines += [f"model, key {quoted(key)}: {what}" for key, what in differing.items()]
            same = not differing
            told = "the same bits" if same else f"other bits in {len(differing)} parameters"
    lines.append(
        f"round {audit.round}: {told} (updates: {len(audit.accepted)}, "
        f"digest of the model: {digest(audit.output)})"
    )
    return Verdict(
        same_bits=same,
        lines=tuple(lines),
        missing=tuple(missing),
        changed=tuple(changed),
        surplus=tuple(surplus),
        unread=tuple(search.unread),
        differing=tuple(differing),
    )


class _Search:
    """Finds, for each recorded update, the one that was given for it."""

    def __init__(self, audit: Audit) -> None:
        self._averaged = frozenset(audit.averaged)
        self._accepted = [receipt.contributor for receipt in audit.accepted]
        self._refused = {receipt.digest: receipt.reason for receipt in audit.refused}
        self._open: dict[str | None, list[str]] = {}
        for receipt in audit.accepted:
            self._open.setdefault(receipt.digest, []).append(receipt.contributor)
        self.found: dict[str, Source] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._others: list[str] = []
        self.unread: list[str] = []
        self.lines: list[str] = []

    def look_at(self, name: str, source: Source) -> None:
        """Find out which recorded update this is, if any."""
        try:
            whole = fingerprints(_loaded(source))
        except FedAvgError as error:
            self.unread.append(name)
            self.lines.append(f"{_shown(name)}: not read, {one_line(error, _LINE)}")
            return
        brought = {key: one for key, one in whole.items() if key in self._averaged}
        alike = self._open.get(digest(brought))
        if alike:
            contributor = next((one for one in _names(name) if one in alike), alike[0])
            alike.remove(contributor)
            self.found[contributor] = source
            self.shapes.update({key: one.shape for key, one in brought.items()})
        elif (sent := digest(whole)) in self._refused:
            self.lines.append(f"{_shown(name)}: was refused, as {self._refused[sent]}")
        else:
            self._others.append(name)

    def told_apart(self) -> tuple[list[str], dict[str, str], list[str]]:
        """The contributors who are missing, those whose update changed into which, what is left."""
        missing = {one: True for one in self._accepted if one not in self.found}
        changed, surplus = {}, []
        for name in self._others:
            contributor = next((one for one in _names(name) if missing.pop(one, False)), None)
            if contributor is None:
                surplus.append(name)
            else:
                changed[contributor] = name
        return list(missing), changed, surplus


def _again(audit: Audit, search: _Search, base: Params | None) -> Mapping[str, Fingerprint]:
    """What the model of the round must be, from the updates that were found."""
    accepted = audit.accepted
    if len(accepted) < audit.min_updates:
        return audit.base
    spec = None
    if audit.base:
        # Shapes are those of arrays that are here: what the audit claims asks for no memory.
        spec = ModelSpec(
            {
                key: ArraySpec(shape, dtype_named(audit.base[key].dtype))
                for key, shape in search.shapes.items()
            }
        )
    mean = WeightedMean(spec, accumulator=audit.accumulator)
    for receipt in accepted:
        params = _loaded(search.found[receipt.contributor])
        averaged = {key: params[key] for key in audit.averaged if key in params}
        mean.add(averaged, receipt.weight or 0)
    before = None
    if audit.transfer is TransferType.DIFF:
        if base is None:
            raise UsageError("they are differences, and the base is not here")
        before = {key: base[key] for key in mean.keys}
    try:
        return {**audit.base, **fingerprints(mean.mean(before))}
    except OutOfRange:
        return audit.base


def _loaded(source: Source) -> Params:
    return source() if callable(source) else source


def _differing(
    recorded: Mapping[str, Fingerprint], found: Mapping[str, Fingerprint]
) -> dict[str, str]:
    """The parameters that are not as recorded, and what is known of them."""
    return {
        key: f"recorded {recorded.get(key, 'nothing')}, found {found.get(key, 'nothing')}"
        for key in sorted({*recorded, *found})
        if recorded.get(key) != found.get(key)
    }


def _names(name: str) -> tuple[str, str]:
    """The contributors after whom an update of this name may be named."""
    return name, PurePath(name).stem


def _shown(name: str) -> str:
    return quoted(name, _LINE)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("it says something twice")
    return entries


def _checksum(body: Mapping[str, Any]) -> str:
    """The SHA-256 of what the text says, however it is laid out."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()
