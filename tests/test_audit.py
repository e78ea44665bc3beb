"""The audit of a round: what it records, and how its text is read."""

from __future__ import annotations

import itertools
import json
import math
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fedavg_core.audit as audit_module
import fedavg_core.round as round_module
from fedavg_core.audit import Audit
from fedavg_core.comparison import same_bits
from fedavg_core.digest import digest, fingerprints
from fedavg_core.errors import Reason, UsageError
from fedavg_core.gate import Limits
from fedavg_core.replay import verify
from fedavg_core.round import Round
from fedavg_core.server_optimizer import FedAdam
from fedavg_core.update import TransferType, Update
from tests.audited_rounds import audited, three
from tests.bad_updates import BAD_UPDATES, ROUND, Bad, good, model, spoilt
from tests.conftest import THOROUGH

FULL, DIFF = TransferType.FULL, TransferType.DIFF


class TestTheRecord:
    """What a round writes down."""

    def test_it_has_what_came_and_what_came_out(self) -> None:
        round = Round(model(), ROUND, min_updates=2, audit=True, limits=Limits(exclude="^h$"))
        sent = three()
        assert round.offer(Update("a", ROUND, sent["site-1"], 600)).accepted
        assert round.offer(Update("a", ROUND, sent["site-2"], 1)).reason is Reason.DUPLICATE
        assert round.offer(Update("b", ROUND, {"w": sent["site-2"]["w"]}, 0.1)).accepted
        outcome = round.close()
        audit = outcome.audit
        assert audit is not None
        assert (audit.round, audit.transfer, audit.accumulator) == (ROUND, FULL, "exact")
        assert (audit.min_updates, audit.averaged) == (2, ("b", "n", "w"))
        assert audit.base == fingerprints(model())
        assert audit.output == fingerprints(outcome.model)
        assert (audit.accepted, audit.refused) == (outcome.accepted, outcome.refused)
        assert [receipt.contributor for receipt in audit.receipts] == ["a", "a", "b"]
        assert [receipt.weight for receipt in audit.accepted] == [600, 0.1]
        without = {key: value for key, value in sent["site-1"].items() if key != "h"}
        assert [receipt.digest for receipt in audit.receipts] == [
            digest(fingerprints(without)),
            digest(fingerprints(sent["site-2"])),
            digest(fingerprints({"w": sent["site-2"]["w"]})),
        ]

    @pytest.mark.parametrize("bad", BAD_UPDATES[:: 1 if THOROUGH else 3], ids=lambda bad: None)
    def test_a_refused_update_is_there_with_its_reason(self, bad: Bad) -> None:
        round = Round(model(), ROUND, limits=bad.limits, transfer=bad.transfer, audit=True)
        update = bad.update()
        assert not round.offer(update).accepted
        audit = round.close().audit
        assert audit is not None
        (receipt,) = audit.receipts
        assert (receipt.accepted, receipt.reason) == (False, bad.reason)
        if bad.reason in (Reason.DTYPE, Reason.BAD_NAME) and receipt.digest is None:
            with pytest.raises(Exception):  # noqa: B017, PT011  (a mapping may fail in any way)
                fingerprints(update.params)
        else:
            assert receipt.digest == digest(fingerprints(update.params))
        assert Audit.from_text(audit.to_text()) == audit
        assert verify(audit, {}, model()).same_bits

    def test_an_update_refused_while_it_was_added_is_there_with_all_it_brought(self) -> None:
        round = Round(model(), ROUND, limits=Limits(exclude="b"), audit=True)
        sent = spoilt(w=np.full((2, 2), math.nan, np.float32))
        receipt = round.offer(good(params=sent))
        assert receipt.reason is Reason.NON_FINITE
        assert receipt.digest == digest(fingerprints(sent))

    def test_without_it_nothing_is_hashed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        hashed: list[Any] = []
        monkeypatch.setattr(round_module, "fingerprints", hashed.append)
        round = Round(model(), ROUND)
        assert round.offer(good("a")).digest is None
        assert round.offer(good("b", weight=0)).digest is None
        assert round.close().audit is None
        assert not hashed

    @pytest.mark.parametrize("transfer", [FULL, DIFF])
    def test_it_changes_nothing_else(self, transfer: TransferType) -> None:
        outcomes = []
        for audit in (False, True):
            round = Round(model(), ROUND, audit=audit)
            for name, params in three().items():
                assert round.offer(Update(name, ROUND, params, 0.1, transfer, {"m": 1})).accepted
            round.offer(good(weight=0, transfer=transfer))
            outcomes.append(round.close())
        without, outcome = outcomes
        assert same_bits(without.model, outcome.model)
        for receipts, others in (
            (without.accepted, outcome.accepted),
            (without.refused, outcome.refused),
        ):
            assert receipts == tuple(replace(one, digest=None) for one in others)
            assert all(one.digest for one in others)
        assert (without.metrics, without.problem) == (outcome.metrics, outcome.problem)

    def test_to_ask_for_it_in_another_way_is_a_usage_error(self) -> None:
        with pytest.raises(UsageError, match="audit: expected True or False, got 'yes'"):
            Round(model(), ROUND, audit="yes")  # type: ignore[arg-type]

    def test_what_nobody_sent_was_to_be_averaged_all_the_same(self) -> None:
        sent = {"a": {"w": model()["w"]}}
        assert audited(sent, model()).averaged == ("b", "h", "n", "w")
        assert audited(sent, None).averaged == ("w",)

    def test_it_is_a_value(self) -> None:
        audit = audited(three(), model())
        assert hash(audit) == hash(audited(three(), model()))
        assert audit == audited(three(), model())
        assert audit != audited(three(1), model())


class TestAcrossARestart:
    """A round that is taken up again ends with the audit that it would have had."""

    @pytest.mark.parametrize("cut", range(4))
    def test_nothing_of_it_is_lost(self, cut: int) -> None:
        offers = [good("a"), good("b", weight=-1), good("c", params={"b": np.ones(3)})]
        audits = []
        for restart in (False, True):
            round = Round(model(), ROUND, audit=True)
            for number in range(4):
                if restart and number == cut:
                    meta, arrays = round.state()
                    round = Round.from_state(json.loads(json.dumps(meta)), arrays, model())
                if number < 3:
                    round.offer(offers[number])
            audits.append(round.close().audit)
        assert audits[0] is not None
        assert audits[0] == audits[1]

    def test_a_state_without_it_goes_on_without_it(self) -> None:
        round = Round(model(), ROUND)
        round.offer(good("a"))
        meta, arrays = round.state()
        assert meta.pop("audit") is False
        assert meta["receipts"][0].pop("digest") is None
        assert Round.from_state(meta, arrays, model()).close().audit is None

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda meta: meta["receipts"][0].update(digest=None), "without its digest"),
            (lambda meta: meta["receipts"][0].update(digest=""), "a receipt with the digest ''"),
            (lambda meta: meta["receipts"][0].update(digest=5), "a receipt with the digest 5"),
            (lambda meta: meta.update(audit=1), "audit: expected True or False, got 1"),
        ],
    )
    def test_a_state_whose_digests_are_none_is_a_usage_error(
        self, spoil: Callable[[dict[str, Any]], Any], message: str
    ) -> None:
        round = Round(model(), ROUND, audit=True)
        round.offer(good("a"))
        meta, arrays = round.state()
        spoil(meta)
        with pytest.raises(UsageError, match=message):
            Round.from_state(meta, arrays, model())


def audit_of_all_sorts() -> Audit:
    """An audit with something in every field."""
    round = Round(
        {"w": np.ones((2, 2), ml_dtypes.bfloat16), "\ud800\n": np.array(1)}, 7, audit=True
    )
    round.offer(Update("site-1", 7, {"w": np.ones((2, 2))}, 0.1, metrics={"loss": 0.5, "x": "y"}))
    round.offer(Update("\n", 7, {}, 1))
    round.offer(Update("\u00fc", 7, {"w": np.ones((2, 2))}, 2**70))
    audit = round.close().audit
    assert audit is not None
    return audit


OTHER_ROUNDS: list[tuple[str, Any]] = [
    ("round", 0),
    ("round", 2),
    ("min_updates", 2),
    ("averaged", []),
    ("receipts", []),
    ("base", {}),
]
"""What makes the audit that of another round that could have been."""


class TestTheText:
    """`to_text` and `from_text`: the same audit, or one clear error."""

    def read(self, meta: dict[str, Any]) -> Audit:
        """Read fields whose checksum is right."""
        body = {key: value for key, value in meta.items() if key != "checksum"}
        try:
            meta = {**body, "checksum": audit_module._checksum(body)}
        except ValueError:  # NaN is not JSON, and has no checksum
            meta = {**body, "checksum": "0" * 64}
        return Audit.from_text(json.dumps(meta))

    def test_it_comes_back_equal(self) -> None:
        for audit in (
            audit_of_all_sorts(),
            audited(three(), model(), DIFF, accumulator="float32"),
            audited({}, None),
        ):
            text = audit.to_text()
            assert text.isascii()
            assert text.endswith("}\n")
            assert Audit.from_text(text) == audit
            assert Audit.from_text(text.encode()) == audit
            assert Audit.from_text(text).to_text() == text

    def test_how_it_is_laid_out_does_not_matter(self) -> None:
        audit = audit_of_all_sorts()
        meta = json.loads(audit.to_text())
        assert Audit.from_text(json.dumps(meta, sort_keys=True, ensure_ascii=True)) == audit

    def test_every_part_of_it_is_an_error_and_every_flipped_bit_is_found(self) -> None:
        audit = audit_of_all_sorts()
        text = audit.to_text().encode()
        whole = len(text.rstrip())
        for length in range(0, whole, 1 if THOROUGH else 3):
            with pytest.raises(UsageError, match="this is no audit of a round: "):
                Audit.from_text(text[:length])
        for place, bit in itertools.product(range(whole), range(8) if THOROUGH else (0,)):
            flipped = bytearray(text)
            flipped[place] ^= 1 << bit
            try:
                found = Audit.from_text(bytes(flipped))
            except UsageError as error:
                told = str(error)
                assert (told.isprintable(), len(told) < 300) == (True, True)
            else:  # white space that became other white space, a digit that became upper-case
                assert found == audit

    @pytest.mark.parametrize(
        "text",
        [
            "",
            b"",
            "x",
            b"\xff\xfe",
            b"PK\x03\x04",
            "null",
            "5",
            "[]",
            "{}",
            '"audit"',
            '{"audit": 1}',
            '{"audit": 1, "audit": 1}',
            "[" * 100_000,
            '{"audit":' * 100_000,
            '{"audit": ' + "9" * 10_000 + "}",
            '{"audit": NaN}',
            '{"audit": 1e999}',
            "\ufeff{}",
        ],
        ids=lambda text: ascii(text[:20]),
    )
    def test_what_is_no_audit_is_one_clear_error(self, text: str | bytes) -> None:
        with pytest.raises(UsageError, match=r"^this is no audit of a round: ") as error:
            Audit.from_text(text)
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 300

    @pytest.mark.parametrize("name", sorted(audit_module._FIELDS))
    @pytest.mark.parametrize(
        "value",
        [None, True, -1, 0, 2, 0.5, math.nan, "x", "", [], {}, [1], [[]], {"w": 1}, {"w": []}],
        ids=repr,
    )
    def test_a_field_of_another_kind_is_an_error(self, name: str, value: Any) -> None:
        meta = json.loads(audited(three(), model()).to_text())
        if name in ("audit", "checksum"):
            with pytest.raises(UsageError, match="this is no audit of a round: "):
                Audit.from_text(json.dumps({**meta, name: value}))
            return
        if meta[name] == value and value is not True:
            return
        if (name, value) in OTHER_ROUNDS:
            verdict = verify(self.read({**meta, name: value}), three(), model())
            assert verdict.same_bits == (name == "round" or value == 2)
            return
        with pytest.raises(UsageError, match="this is no audit of a round: "):
            self.read({**meta, name: value})

    @pytest.mark.parametrize("name", sorted(audit_module._FIELDS))
    def test_a_field_that_is_not_there_or_is_strange_is_an_error(self, name: str) -> None:
        meta = json.loads(audited(three(), model()).to_text())
        with pytest.raises(UsageError, match="this is no audit of a round: "):
            self.read({key: value for key, value in meta.items() if key != name} | {"x": 1})
        del meta[name]
        with pytest.raises(UsageError, match="this is no audit of a round: "):
            Audit.from_text(json.dumps(meta))

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda m: m.update(audit=2), "expected format 1, got 2"),
            (lambda m: m.update(accumulator="float16"), "the accumulator 'float16'"),
            (lambda m: m.update(transfer="HALF"), "'HALF' is not a valid TransferType"),
            (lambda m: m.update(transfer=None), "no transfer type"),
            (lambda m: m.update(averaged=["w", "b", "h", "n"]), "not sorted names"),
            (lambda m: m.update(averaged=["b", "b"]), "not sorted names"),
            (lambda m: m.update(averaged=["b", "z"]), "other parameters"),
            (lambda m: m["base"].pop("w"), "other parameters"),
            (lambda m: m["output"].pop("w"), "other parameters"),
            (lambda m: m["output"].update(x=m["output"]["w"]), "other parameters"),
            (lambda m: m["output"]["w"].__setitem__(1, [4]), "other parameters"),
            (lambda m: m["output"]["w"].__setitem__(0, "int32"), "other parameters"),
            (lambda m: m["receipts"].append(m["receipts"][0]), "two receipts"),
            (lambda m: m["receipts"][0].update(digest=None), "without its digest"),
            (lambda m: m["receipts"][0].pop("digest"), "says more"),
            (lambda m: m["receipts"][0].update(extra=1), "says more"),
            (lambda m: m["receipts"][0].update(weight=0), "a receipt for the weight 0"),
            (lambda m: m["receipts"][0].update(weight=True), "expected a finite number"),
            (lambda m: m["receipts"][0].update(contributor="a\nb"), "no name"),
            (lambda m: m["receipts"][0].update(reason="SHAPE"), "neither accepts nor refuses"),
        ],
    )
    def test_fields_that_do_not_tell_of_one_round_are_an_error(
        self, spoil: Callable[[dict[str, Any]], Any], message: str
    ) -> None:
        meta = json.loads(audited(three(), model()).to_text())
        spoil(meta)
        with pytest.raises(UsageError, match=message):
            self.read(meta)

    def test_a_state_without_a_server_optimizer_is_an_error(self) -> None:
        audit = audited(three(), model(), server_optimizer=FedAdam())
        assert set(audit.output_state) == {
            f"{moment}/{key}" for moment in ("momentum", "second_moment") for key in ("w", "b", "h")
        }
        meta = json.loads(audit.to_text())
        assert self.read(meta) == audit
        for change, message in (
            ({"optimizer": None}, "a state, and no server optimizer"),
            (
                {"optimizer": None, "state": meta["output_state"], "output_state": {}},
                "a state, and",
            ),
            ({"optimizer": {}}, "a server optimizer without a name"),
            ({"optimizer": {"name": 5}}, "a server optimizer without a name"),
            ({"optimizer": ["name"]}, "a server optimizer without a name"),
        ):
            with pytest.raises(UsageError, match=message):
                self.read({**meta, **change})

    def test_differences_without_a_base_are_an_error(self) -> None:
        meta = json.loads(audited(three(), None).to_text())
        with pytest.raises(UsageError, match="differences"):
            self.read({**meta, "transfer": "DIFF"})

    def test_what_is_said_twice_is_an_error(self) -> None:
        text = audited(three(), model()).to_text()
        for line in (f' "round": {ROUND},', ' "min_updates": 1,'):
            assert text.count(line) == 1
            with pytest.raises(UsageError, match="it says something twice"):
                Audit.from_text(text.replace(line, line + line))

    def test_what_was_edited_by_hand_is_told(self) -> None:
        text = audited(three(), model()).to_text()
        with pytest.raises(UsageError, match="its checksum is that of another text"):
            Audit.from_text(text.replace('"weight": 0.1', '"weight": 0.2'))

    def test_a_record_of_enormous_parameters_takes_no_memory(self) -> None:
        audit = audited({"a": {"x": np.ones(2)}}, {"x": np.ones(2), "y": np.ones(2)})
        enormous = {key: replace(one, shape=(2**40, 2**20)) for key, one in audit.base.items()}
        forged = Audit.from_text(replace(audit, base=enormous, output=enormous).to_text())
        tracemalloc.start()
        verdict = verify(forged, {"a": {"x": np.ones(2)}})
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert not verdict.same_bits
        assert peak < 64 << 20
