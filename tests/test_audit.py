"""The audit of a round: what it records, how it is read, and what a replay finds."""

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
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedavg_core as fc
import fedavg_core.audit as audit_module
import fedavg_core.round as round_module
from fedavg_core.audit import Audit
from fedavg_core.digest import digest, fingerprints
from fedavg_core.errors import CheckpointError, Reason, UsageError
from fedavg_core.gate import Limits
from fedavg_core.model import Params
from fedavg_core.replay import Verdict, verify
from fedavg_core.round import Round
from fedavg_core.update import TransferType, Update
from tests.bad_updates import BAD_UPDATES, ROUND, Bad, good, model, spoilt
from tests.conftest import THOROUGH

FULL, DIFF = TransferType.FULL, TransferType.DIFF
Models = dict[str, dict[str, npt.NDArray[Any]]]


def three(seed: int = 0) -> Models:
    """What three contributors send, for `model`."""
    rng = np.random.default_rng(seed)
    return {
        f"site-{number}": {
            key: (value.astype(np.float64) + rng.normal(size=value.shape)).astype(value.dtype)
            for key, value in model().items()
        }
        for number in (1, 2, 3)
    }


def audited(
    updates: Models, base: Params | None, transfer: TransferType = FULL, **settings: Any
) -> Audit:
    """The audit of a round of some updates, each heavier than the last."""
    round = Round(base, ROUND, audit=True, **settings)
    for number, (name, params) in enumerate(updates.items()):
        assert round.offer(Update(name, ROUND, params, 0.1 + number, transfer)).accepted
    audit = round.close().audit
    assert audit is not None
    return audit


def last(verdict: Verdict) -> str:
    """The verdict in words, without the figures."""
    return str(verdict.lines[-1]).split(" (")[0]


SAME = f"round {ROUND}: the same bits"
NOT_REPLAYED = f"round {ROUND}: not replayed"


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
        monkeypatch.setattr(round_module, "fingerprints", None)
        round = Round(model(), ROUND)
        assert round.offer(good("a")).digest is None
        assert round.offer(good("b", weight=0)).digest is None
        assert round.close().audit is None

    def test_to_ask_for_it_in_another_way_is_a_usage_error(self) -> None:
        with pytest.raises(UsageError, match="audit: expected True or False, got 'yes'"):
            Round(model(), ROUND, audit="yes")  # type: ignore[arg-type]

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


class TestTheSameBits:
    """A replay of what was recorded."""

    @pytest.mark.parametrize("kind", ["exact", "float64", "float32"])
    @pytest.mark.parametrize("transfer", [FULL, DIFF])
    @pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
    def test_they_come_out_whatever_the_order_in_which_the_updates_are_given(
        self, kind: Any, transfer: TransferType, order: tuple[int, ...]
    ) -> None:
        updates = three()
        audit = audited(updates, model(), transfer, accumulator=kind)
        names = list(updates)
        given = {names[number]: updates[names[number]] for number in order}
        verdict = verify(audit, given, model())
        assert verdict.same_bits
        assert last(verdict) == SAME
        assert len(verdict.lines) == 1
        assert digest(audit.output) in verdict.lines[0]

    def test_the_recorded_order_counts_where_the_order_shows(self) -> None:
        updates = {
            name: {"x": np.array([value], np.float32)}
            for name, value in (("a", 1e8), ("b", 1.0), ("c", -1e8))
        }
        seen = set()
        for order in itertools.permutations(updates):
            audit = audited(
                {name: updates[name] for name in order},
                {"x": np.zeros(1, np.float32)},
                accumulator="float32",
            )
            seen.add(audit.output["x"])
            assert verify(audit, updates).same_bits
        assert len(seen) > 1

    @pytest.mark.parametrize("transfer", [FULL, DIFF])
    def test_parameters_that_some_lack_nobody_sent_or_are_excluded(
        self, transfer: TransferType
    ) -> None:
        base = {**model(), "gone": np.array([7.0]), "out": np.array([math.inf])}
        extra = {"out": np.ones(1), "x": np.ones(5)}
        updates: Models = {
            "a": {"w": three()["site-1"]["w"], **extra},
            "b": {"b": three()["site-2"]["b"].astype(np.float16), **extra},
            "c": {**three()["site-3"], **extra},
        }
        limits = Limits(exclude="^out$", allow_unexpected=True)
        audit = audited(updates, base, transfer, limits=limits)
        assert verify(audit, updates, base).same_bits
        if transfer is FULL:
            assert verify(audit, updates).same_bits

    @pytest.mark.parametrize("limits", [Limits(), Limits(allow_missing=False), Limits(exclude="b")])
    def test_without_a_model(self, limits: Limits) -> None:
        updates = three()
        audit = audited(updates, None, limits=limits)
        assert audit.base == {}
        assert set(audit.averaged) == {key for key in model() if not limits.excludes(key)}
        assert verify(audit, updates).same_bits
        assert verify(audit, updates, {}).same_bits

    def test_the_first_update_says_the_dtype_where_there_is_no_model(self) -> None:
        updates = {"a": {"x": np.array([1, 2], np.int8)}, "b": {"x": np.array([0.6, 9.0])}}
        for order in itertools.permutations(updates):
            audit = audited({name: updates[name] for name in order}, None)
            assert audit.output["x"].dtype == updates[order[0]]["x"].dtype.name
            assert verify(audit, updates).same_bits

    @pytest.mark.parametrize("base", [None, model()])
    def test_too_few_updates_keep_the_model(self, base: Params | None) -> None:
        audit = audited(three(), base, min_updates=4)
        assert audit.output == audit.base
        assert verify(audit, three(), base).same_bits
        assert not verify(audit, {}, base).same_bits

    @pytest.mark.parametrize("base", [None, {"x": np.array([1], np.float16)}])
    def test_a_mean_beyond_the_dtype_keeps_the_model(self, base: Params | None) -> None:
        updates = {"a": {"x": np.array([6e4], np.float16)}, "b": {"x": np.array([1e9])}}
        audit = audited(updates, base)
        assert audit.output == audit.base
        assert verify(audit, updates).same_bits

    def test_of_two_equal_updates_both_are_needed(self) -> None:
        updates = {"a": three()["site-1"], "b": three()["site-1"], "c": three()["site-2"]}
        audit = audited(updates, model())
        assert verify(audit, updates).same_bits
        verdict = verify(audit, {name: updates[name] for name in ("b", "c")})
        assert verdict.missing == ("a",)
        verdict = verify(audit, {"y": updates["b"], "z": updates["a"], "c": updates["c"]})
        assert verdict.same_bits

    def test_an_update_is_loaded_when_it_is_wanted_and_not_kept(self) -> None:
        updates, log = three(), []

        def loader(name: str) -> Callable[[], Params]:
            def load() -> Params:
                log.append(name)
                return {key: value.copy() for key, value in updates[name].items()}

            return load

        audit = audited(updates, model())
        assert verify(audit, {f"{name}.npz": loader(name) for name in reversed(updates)}).same_bits
        assert log == [*reversed(updates), *updates]

    @given(
        st.lists(
            st.tuples(
                st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=2, max_size=2),
                st.one_of(st.integers(1, 2**70), st.floats(1e-300, 1e300)),
                st.booleans(),
            ),
            min_size=1,
            max_size=5,
        ),
        st.sampled_from(["exact", "float64", "float32"]),
        st.sampled_from([FULL, DIFF]),
        st.integers(1, 3),
    )
    def test_of_any_round(
        self, drawn: list[Any], kind: Any, transfer: TransferType, least: int
    ) -> None:
        base = {"x": np.array([0.5, -3.0], np.float32), "y": np.array([1.0])}
        round = Round(base, 0, min_updates=least, accumulator=kind, audit=True)
        updates: Models = {}
        for number, (values, weight, partial) in enumerate(drawn):
            name = f"site-{number}"
            updates[name] = {"x": np.array(values, np.float32)}
            if partial:
                updates[name]["y"] = np.array(values[:1])
            round.offer(Update(name, 0, updates[name], weight, transfer))
        outcome = round.close()
        assert outcome.audit is not None
        audit = Audit.from_text(outcome.audit.to_text())
        assert audit == outcome.audit
        assert verify(audit, updates, base).same_bits


class TestWhatIsAmiss:
    """Each thing that can be amiss is told, in a line of its own."""

    def test_an_update_that_is_missing(self) -> None:
        updates = three()
        audit = audited(updates, model())
        del updates["site-2"]
        verdict = verify(audit, updates, model())
        assert not verdict.same_bits
        assert verdict.missing == ("site-2",)
        assert verdict.lines[0] == "contributor 'site-2': missing"
        assert last(verdict) == NOT_REPLAYED
        assert len(verdict.lines) == 2

    @pytest.mark.parametrize("name", ["site-2", "site-2.npz", "/some/where/site-2.safetensors"])
    def test_an_update_that_has_changed(self, name: str) -> None:
        updates = three()
        audit = audited(updates, model())
        sent = updates.pop("site-2")
        sent["b"][1] = np.nextafter(sent["b"][1], 9)
        verdict = verify(audit, {**updates, name: sent, "x/site-2.npy": model()}, model())
        assert not verdict.same_bits
        assert (verdict.changed, verdict.missing) == (("site-2",), ())
        assert verdict.surplus == ("x/site-2.npy",)
        assert verdict.lines[0] == (
            f"contributor 'site-2': changed, for {name!r} is another update"
        )
        assert last(verdict) == NOT_REPLAYED

    def test_an_update_that_is_surplus(self) -> None:
        updates = three()
        audit = audited(updates, model())
        verdict = verify(audit, {**updates, "site-1 (2)": model()}, model())
        assert verdict.same_bits
        assert verdict.surplus == ("site-1 (2)",)
        assert verdict.lines[0] == "'site-1 (2)': surplus, for it was not offered in that round"

    def test_an_update_that_was_refused(self) -> None:
        round = Round(model(), ROUND, audit=True)
        assert round.offer(good("a")).accepted
        assert not round.offer(good("b", params=three()["site-1"], weight=-1)).accepted
        audit = round.close().audit
        assert audit is not None
        verdict = verify(audit, {"b": three()["site-1"], "a": good().params})
        assert verdict.same_bits
        assert verdict.lines[0] == "'b': was refused, as BAD_WEIGHT"
        assert verdict.surplus == ()

    def test_an_update_that_cannot_be_read(self) -> None:
        def damaged() -> Params:
            raise CheckpointError("a\nb", "damaged")

        updates: dict[str, Any] = dict(three())
        audit = audited(three(), model())
        verdict = verify(
            audit, {**updates, "site-1": damaged, "site-2": {"w": np.array([None])}}, model()
        )
        assert not verdict.same_bits
        assert verdict.unread == verdict.missing == ("site-1", "site-2")
        assert verdict.lines[0] == "'site-1': not read, CheckpointError: a\\nb: damaged"
        assert verdict.lines[1].startswith("'site-2': not read, RefusedUpdate: DTYPE (key 'w')")
        assert all(line.isprintable() and line.isascii() for line in verdict.lines)

    def test_an_update_that_can_be_read_once_only(self) -> None:
        updates: dict[str, Any] = dict(three())
        audit = audited(three(), model())
        left = [three()["site-3"]]

        def once() -> Params:
            if left:
                return left.pop()
            raise CheckpointError("site-3", "gone")

        verdict = verify(audit, {**updates, "site-3": once}, model())
        assert not verdict.same_bits
        assert verdict.lines[0] == ("it cannot be replayed: CheckpointError: site-3: gone")
        assert last(verdict) == NOT_REPLAYED

    def test_an_update_that_is_another_when_it_is_read_again(self) -> None:
        audit = audited(three(), model())
        answers = [three()["site-3"], three(1)["site-3"]]
        verdict = verify(audit, {**three(), "site-3": lambda: answers.pop(0)}, model())
        assert not verdict.same_bits
        assert verdict.differing

    @pytest.mark.parametrize("transfer", [FULL, DIFF])
    def test_another_base(self, transfer: TransferType) -> None:
        audit = audited(three(), model(), transfer)
        base = {**model(), "n": model()["n"] + 1, "x": np.ones(1)}
        del base["w"]
        verdict = verify(audit, three(), base)
        assert not verdict.same_bits
        assert verdict.differing == ("n", "w", "x")
        was, found = fingerprints(model()), fingerprints(base)
        assert verdict.lines[:-1] == (
            f"base, key 'n': recorded {was['n']}, found {found['n']}",
            f"base, key 'w': recorded {was['w']}, found nothing",
            f"base, key 'x': recorded nothing, found {found['x']}",
        )
        assert last(verdict) == NOT_REPLAYED

    def test_no_base_where_it_is_needed(self) -> None:
        verdict = verify(audited(three(), model(), DIFF), three())
        assert not verdict.same_bits
        assert verdict.lines[0].endswith("the updates are differences, and the base is not here")
        assert last(verdict) == NOT_REPLAYED

    @pytest.mark.parametrize("transfer", [FULL, DIFF])
    @pytest.mark.parametrize("key", ["w", "b", "n", "h"])
    def test_another_model_than_the_mean(self, transfer: TransferType, key: str) -> None:
        audit = audited(three(), model(), transfer)
        other = replace(audit.output[key], sha256="0" * 64)
        verdict = verify(replace(audit, output={**audit.output, key: other}), three(), model())
        assert not verdict.same_bits
        assert verdict.differing == (key,)
        assert verdict.lines[0] == (
            f"model, key '{key}': recorded {other}, found {audit.output[key]}"
        )
        assert last(verdict) == f"round {ROUND}: other bits in 1 parameters"

    def test_another_weight_than_was_recorded(self) -> None:
        audit = audited(three(), model())
        first, *others = audit.receipts
        assert first.weight is not None
        heavier = replace(first, weight=first.weight * 1.5)
        verdict = verify(replace(audit, receipts=(heavier, *others)), three(), model())
        assert not verdict.same_bits
        assert "w" in verdict.differing

    def test_another_order_does_not_matter_to_exact_sums_and_another_limit_does(self) -> None:
        audit = audited(three(), model())
        assert verify(replace(audit, receipts=audit.receipts[::-1]), three()).same_bits
        assert not verify(replace(audit, min_updates=4), three()).same_bits

    def test_a_record_of_shapes_that_the_updates_do_not_have(self) -> None:
        updates = {"a": {"x": np.ones(2)}, "b": {"x": np.ones(3)}}
        audit = audited({"a": updates["a"]}, {"x": np.ones(2)})
        forged = replace(
            audit.receipts[0], contributor="b", digest=digest(fingerprints(updates["b"]))
        )
        verdict = verify(replace(audit, receipts=(*audit.receipts, forged)), updates)
        assert not verdict.same_bits
        assert "SHAPE" in verdict.lines[0]

    def test_a_base_that_is_no_model_is_an_error(self) -> None:
        with pytest.raises(fc.RefusedUpdate, match="DTYPE"):
            verify(audited(three(), model()), three(), {"w": np.array([None])})

    @given(st.data())
    def test_any_bit_of_any_update(self, data: st.DataObject) -> None:
        updates = three()
        audit = audited(updates, model())
        sent = updates[data.draw(st.sampled_from(sorted(updates)))]
        key = data.draw(st.sampled_from(sorted(sent)))
        raw = bytearray(sent[key].tobytes())
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        sent[key] = np.frombuffer(bytes(raw), sent[key].dtype).reshape(sent[key].shape)
        verdict = verify(audit, updates, model())
        assert not verdict.same_bits
        assert len(verdict.changed) == 1


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

    def test_differences_without_a_base_are_an_error(self) -> None:
        meta = json.loads(audited(three(), None).to_text())
        with pytest.raises(UsageError, match="differences"):
            self.read({**meta, "transfer": "DIFF"})

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


class TestAFederation:
    """Each round's outcome has its audit."""

    def train(self, params: Params, context: fc.Context) -> fc.TrainResult:
        rng = np.random.default_rng(context.seed)
        step = {
            key: (value.astype(np.float64) + rng.normal(size=value.shape)).astype(value.dtype)
            for key, value in params.items()
        }
        self.sent[context.round][context.contributor] = step
        return fc.TrainResult(step, context.index + 1, {})

    @pytest.mark.parametrize("transfer", [FULL, DIFF])
    def test_and_each_can_be_replayed(self, transfer: TransferType) -> None:
        self.sent: list[Models] = [{}, {}, {}]
        clients = {f"site-{number}": self.train for number in range(3)}
        base = {key: value for key, value in model().items() if key != "n"}
        for outcome in fc.Federation(base, clients, 3, transfer=transfer, audit=True):
            assert outcome.audit is not None
            updates = self.sent[outcome.round]
            if transfer is DIFF:
                updates = {name: fc.diff(sent, base) for name, sent in updates.items()}
            assert verify(outcome.audit, updates, base).same_bits
            base = outcome.model

    def test_but_not_unasked(self) -> None:
        self.sent = [{}]
        (outcome,) = fc.Federation(model(), {"a": self.train}, 1).run()
        assert outcome.audit is None
