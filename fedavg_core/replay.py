"""Replaying a round: from its audit and its updates, whether the same bits come out.

    verdict = fc.verify(audit, {"site-1": params, "updates/site-2.npz": load}, base=model)
    verdict.same_bits  # whether the recorded model is the mean of these updates
    verdict.lines  # what is missing, changed, surplus or different, and last the verdict

Updates are told apart by their digests (see `fedavg_core.digest`), cut down to the parameters that
were averaged, as the round did it. What they are called decides nothing; but where one that was not
in the round is named after a contributor whose update is missing, that update is said to have
changed.

What a verdict says:

* The same bits: the recorded updates with the recorded weights give the recorded model, by way of
  the recorded server optimizer if there is one, and its recorded new state. With the exact
  accumulator that holds on any machine. With the others the updates are added in the order in which
  they were, and it holds where float64 and float32 are those of IEEE 754.
* Nothing about a refusal. It is on record, with its reason; but most reasons (the sender, the
  round, the weight) do not show in the parameters.
* Nothing about who wrote the audit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import TypeAlias

from fedavg_core.any_accumulator import accumulator_for
from fedavg_core.audit import Audit
from fedavg_core.digest import Fingerprint, digest, fingerprints
from fedavg_core.errors import (
    FedAvgError,
    OutOfRange,
    UsageError,
    a_type,
    counted,
    one_line,
    quoted,
)
from fedavg_core.model import ArraySpec, ModelSpec, Params, dtype_named
from fedavg_core.next_model import mean_change
from fedavg_core.server_optimizer import ServerOptimizer, optimizer_named
from fedavg_core.update import TransferType

__all__ = ["Source", "Verdict", "verify"]

Source: TypeAlias = "Params | Callable[[], Params]"
"""The parameters of an update, or what loads them."""

_LINE = 200


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
        differing: The parameters, and entries of the optimizer's state, whose bits are others than
            those recorded: before the round if any are, else after it.
    """

    same_bits: bool
    lines: tuple[str, ...]
    missing: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    surplus: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    differing: tuple[str, ...] = ()


def verify(
    audit: Audit,
    updates: Mapping[str, Source],
    base: Params | None = None,
    *,
    optimizer_state: Params | None = None,
    server_optimizer: ServerOptimizer | None = None,
) -> Verdict:
    """Average the updates of a round again, and compare.

    Args:
        audit: What the round recorded.
        updates: From what each is called, such as a file's path or the contributor's name, to its
            parameters, or to a function that loads them. A function is called twice, and one
            update is held at a time; what it raises of `FedAvgError` is told and not raised.
        base: The model before the round; only read. Needed where the updates are differences, or
            a server optimizer steps from it. Where it is given, it is compared; else its recorded
            fingerprints are believed.
        optimizer_state: The server optimizer's state before the round, likewise. Needed where
            there was any.
        server_optimizer: The server optimizer, if it is none of this package's.

    Returns:
        The verdict.

    Raises:
        RefusedUpdate: The base or the state is not made of arrays of numbers.
        UsageError: This is no audit, or the updates are no mapping.
    """
    if not isinstance(audit, Audit):
        raise UsageError(
            f"audit: expected an Audit (Audit.from_text reads one), got {quoted(audit)}"
        )
    if not isinstance(updates, Mapping):
        raise UsageError(
            f"updates: expected a mapping from names to parameters, got {a_type(updates)}"
        )
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
    differing = [] if base is None else _differing("base", audit.base, fingerprints(base))
    if optimizer_state is not None:
        differing += _differing("state before", audit.state, fingerprints(optimizer_state))
    same = False
    told = "not replayed"
    if not (missing or changed or differing):
        try:
            optimizer = _optimizer(audit, server_optimizer)
            model, state = _again(audit, search, base, optimizer, optimizer_state)
        except FedAvgError as error:
            lines.append(f"it cannot be replayed: {one_line(error, _LINE)}")
        else:
            differing = _differing("model", audit.output, model)
            differing += _differing("state", audit.output_state, state)
            same = not differing
            others = counted(len(differing), "parameter")
            told = "the same bits" if same else f"other bits in {others}"
    lines += [line for _, line in differing]
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
        differing=tuple(key for key, _ in differing),
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


def _again(
    audit: Audit,
    search: _Search,
    base: Params | None,
    optimizer: ServerOptimizer | None,
    state: Params | None,
) -> tuple[Mapping[str, Fingerprint], Mapping[str, Fingerprint]]:
    """What the model and the state after the round must be, from the updates that were found."""
    before = audit.base, audit.state
    if len(audit.accepted) < audit.min_updates:
        return before
    if base is None and audit.transfer is TransferType.DIFF:
        raise UsageError("the updates are differences, and the base is not here")
    if optimizer is not None and (base is None or (audit.state and state is None)):
        raise UsageError("the server optimizer steps from the base and its state; one is not here")
    spec = None
    if audit.base:
        # Shapes are those of arrays that are here: what the audit claims asks for no memory.
        spec = ModelSpec(
            {
                key: ArraySpec(shape, dtype_named(audit.base[key].dtype))
                for key, shape in search.shapes.items()
            }
        )
    sums = accumulator_for(audit.accumulator, spec)
    for receipt in audit.accepted:
        params = _loaded(search.found[receipt.contributor])
        averaged = {key: params[key] for key in audit.averaged if key in params}
        sums.add(averaged, receipt.weight or 0)
    start = None
    if base is not None and audit.transfer is TransferType.DIFF:
        start = {key: base[key] for key in sums.keys}
    after: Params = {}
    try:
        model = sums.mean(start)
        if optimizer is not None and base is not None:
            change = mean_change(sums, base, audit.transfer)
            model, after = optimizer.update(base, model, change, state or {})
    except OutOfRange:
        return before
    return {**audit.base, **fingerprints(model)}, fingerprints(after)


def _optimizer(audit: Audit, own: ServerOptimizer | None) -> ServerOptimizer | None:
    """The server optimizer of a round, if it makes the model another one than the mean."""
    if audit.optimizer is None or not audit.base:
        return None
    optimizer = optimizer_named(**audit.optimizer) if own is None else own
    recorded, found = (
        json.dumps(settings, sort_keys=True) for settings in (audit.optimizer, optimizer.settings())
    )
    if found != recorded:
        raise UsageError(
            f"expected the server optimizer {quoted(recorded, _LINE)}, got {quoted(found, _LINE)}"
        )
    return None if optimizer.is_plain else optimizer


def _loaded(source: Source) -> Params:
    return source() if callable(source) else source


def _differing(
    what: str, recorded: Mapping[str, Fingerprint], found: Mapping[str, Fingerprint]
) -> list[tuple[str, str]]:
    """The arrays that are not as recorded, and a line about each."""
    return [
        (
            key,
            f"{what}, key {quoted(key)}: recorded {recorded.get(key, 'nothing')}, "
            f"found {found.get(key, 'nothing')}",
        )
        for key in sorted({*recorded, *found})
        if recorded.get(key) != found.get(key)
    ]


def _names(name: str) -> tuple[str, str]:
    """The contributors after whom an update of this name may be named."""
    return name, PurePath(name).stem


def _shown(name: str) -> str:
    return quoted(name, _LINE)
