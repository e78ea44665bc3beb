"""Replaying a round: the same bits, or what is amiss."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedavg_core as fc
import fedavg_core.audit as audit_module
from fedavg_core.audit import Audit
from fedavg_core.digest import digest, fingerprints
from fedavg_core.errors import CheckpointError, UsageError
from fedavg_core.gate import Limits
from fedavg_core.model import Params
from fedavg_core.replay import Verdict, verify
from fedavg_core.round import Round
from fedavg_core.server_optimizer import SERVER_OPTIMIZERS, ServerOptimizer
from fedavg_core.transfer import diff
from fedavg_core.update import TransferType, Update
from tests.audited_rounds import Models, audited, three
from tests.bad_updates import ROUND, good, model

FULL, DIFF = TransferType.FULL, TransferType.DIFF
GOLDEN = Path(__file__).parent / "golden" / "audit-format-1.json"


def last(verdict: Verdict) -> str:
    """The verdict in words, without the figures."""
    return str(verdict.lines[-1]).split(" (")[0]


SAME = f"round {ROUND}: the same bits"
NOT_REPLAYED = f"round {ROUND}: not replayed"


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
        more = {**good().params, "x": np.ones(1)}
        assert not round.offer(good("c", params=more)).accepted
        audit = round.close().audit
        assert audit is not None
        verdict = verify(audit, {"b": three()["site-1"], "a": good().params, "c": more})
        assert verdict.same_bits
        assert verdict.lines[:-1] == (
            "'b': was refused, as BAD_WEIGHT",
            "'c': was refused, as UNEXPECTED_KEYS",
        )
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
        assert verdict.lines[0] == "'site-1': not read, CheckpointError: a\\\\nb: damaged"
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
        assert last(verdict) == f"round {ROUND}: other bits in 1 parameter"

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


@dataclasses.dataclass(frozen=True)
class SignStep(ServerOptimizer):
    """A server optimizer of one's own."""

    sizes: tuple[float, ...] = (0.5, 0.25)

    @property
    def start(self) -> dict[str, float]:
        return {}

    def step(self, change: Any, state: Any) -> Any:
        return self.sizes[0] * np.sign(change), {}


class TestAServerOptimizer:
    """Its step is replayed as well."""

    def rounds(
        self, optimizer: ServerOptimizer, transfer: TransferType, **settings: Any
    ) -> Iterator[tuple[Audit, Models, Params, Params]]:
        """Three rounds: the audit, the updates, and the model and the state before."""
        base: Params = model()
        state: Params = {}
        for number in range(3):
            sent = three(number)
            updates = {name: diff(one, base) for name, one in sent.items()}
            round = Round(
                base,
                number,
                audit=True,
                server_optimizer=optimizer,
                optimizer_state=state,
                **settings,
            )
            given = updates if transfer is DIFF else sent
            for name, params in given.items():
                assert round.offer(Update(name, number, params, 2, transfer)).accepted
            outcome = round.close()
            assert outcome.audit is not None
            yield Audit.from_text(outcome.audit.to_text()), given, base, state
            base, state = outcome.model, outcome.optimizer_state

    @pytest.mark.parametrize("name", sorted(SERVER_OPTIMIZERS))
    @pytest.mark.parametrize("transfer", [FULL, DIFF])
    @pytest.mark.parametrize("kind", ["exact", "float32"])
    def test_of_each_kind(self, name: str, transfer: TransferType, kind: Any) -> None:
        optimizer = fc.optimizer_named(name, learning_rate=0.3)
        for audit, updates, base, state in self.rounds(optimizer, transfer, accumulator=kind):
            assert audit.optimizer == optimizer.settings()
            assert audit.state == fingerprints(state)
            verdict = verify(audit, updates, base, optimizer_state=state)
            assert verdict.lines[-1].startswith(f"round {audit.round}: the same bits")
            assert verdict.same_bits
            none = verify(audit, {}, base, optimizer_state=state)
            assert len(none.missing) == 3

    def test_a_plain_one_needs_no_base(self) -> None:
        for audit, updates, base, state in self.rounds(fc.FedAvg(), FULL):
            assert state == {}
            assert verify(audit, updates).same_bits
            assert verify(audit, updates, base, optimizer_state={}).same_bits

    def test_what_is_missing_or_changed_is_told(self) -> None:
        *_, (audit, updates, base, state) = self.rounds(fc.FedAdam(), FULL)
        needs = "steps from the base and its state; one is not here"
        for before, given_state in ((None, None), (base, None), (None, state)):
            verdict = verify(audit, updates, before, optimizer_state=given_state)
            assert not verdict.same_bits
            assert verdict.lines[0].endswith(needs)
        other = {**state, "momentum/w": state["momentum/w"] + 1}
        verdict = verify(audit, updates, base, optimizer_state=other)
        assert not verdict.same_bits
        assert verdict.differing == ("momentum/w",)
        assert verdict.lines[0].startswith("state before, key 'momentum/w': recorded float64[2, 2]")

    def test_another_step_than_was_recorded_is_told(self) -> None:
        *_, (audit, updates, base, state) = self.rounds(fc.FedAdam(), FULL)
        slower = {**(audit.optimizer or {}), "beta2": 0.5}
        verdict = verify(replace(audit, optimizer=slower), updates, base, optimizer_state=state)
        assert not verdict.same_bits
        assert {"b", "second_moment/b"} <= set(verdict.differing)
        assert any(line.startswith("state, key 'second_moment/b': ") for line in verdict.lines)
        assert any(line.startswith("model, key 'b': ") for line in verdict.lines)

    @pytest.mark.parametrize(
        "settings",
        [
            {"name": "fedadam", "beta2": 2},
            {"name": "fedadam", "beta2": [1]},
            {"name": "fedadam", "gamma": 1},
            {"name": "fedavg", "learning_rate": "x"},
            {"name": "mine"},
        ],
    )
    def test_one_that_cannot_be_made_again_is_told(self, settings: dict[str, Any]) -> None:
        *_, (audit, updates, base, state) = self.rounds(fc.FedAdam(), FULL)
        forged = Audit.from_text(replace(audit, optimizer=settings).to_text())
        verdict = verify(forged, updates, base, optimizer_state=state)
        assert not verdict.same_bits
        assert verdict.lines[0].startswith("it cannot be replayed: UsageError: ")

    def test_one_of_ones_own_has_to_be_given(self) -> None:
        for audit, updates, base, _ in self.rounds(SignStep(), FULL):
            verdict = verify(audit, updates, base)
            assert "expected one of fedavg, " in verdict.lines[0]
            assert verify(audit, updates, base, server_optimizer=SignStep()).same_bits
            verdict = verify(audit, updates, base, server_optimizer=SignStep(sizes=(1.0,)))
            assert not verdict.same_bits
            assert "expected the server optimizer " in verdict.lines[0]

    def test_without_a_model_there_is_no_step(self) -> None:
        audit = audited(three(), None, server_optimizer=fc.FedAdam())
        assert verify(audit, three()).same_bits

    @pytest.mark.parametrize("updates", [three(), {"a": {"w": np.full((2, 2), 3e38)}}])
    def test_a_round_that_keeps_its_model_keeps_the_state(self, updates: Models) -> None:
        state = {"momentum/w": np.full((2, 2), 1e308)}
        least = 4 if len(updates) == 3 else 1
        optimizer = fc.FedAvgM(learning_rate=10.0)
        settings: dict[str, Any] = {"server_optimizer": optimizer, "optimizer_state": state}
        audit = audited(updates, model(), min_updates=least, **settings)
        assert (audit.output, audit.output_state) == (audit.base, audit.state)
        assert verify(audit, updates, model(), optimizer_state=state).same_bits


class TestAnAuditOfFormat1:
    """One that is kept here, and that every later version must read and replay."""

    base: ClassVar[Params] = {
        "layer/w": np.array([[0.1, -0.0, 1e-45], [3e38, 2, 3]], np.float32),
        "h": np.array([1.5, -2.5], ml_dtypes.bfloat16),
        "n": np.array([-5, 2**40]),
        "frozen \u00fc\n": np.ones(1),
    }
    state: ClassVar[Params] = {"momentum/h": np.array([0.1, -0.3]), "second_moment/h": np.ones(2)}
    updates: ClassVar[Models] = {
        "site-1": {
            "layer/w": np.array([[0.3, 1, -1e-45], [-3e38, 0.7, 1e-20]], np.float32),
            "h": np.array([0.5, 0.0078125], ml_dtypes.bfloat16),
        },
        "site-2": {"layer/w": np.full((2, 3), 0.1), "n": np.array([3, -8])},
    }

    def audit(self) -> Audit:
        round = Round(
            self.base,
            12,
            min_updates=2,
            limits=Limits(exclude="^frozen"),
            server_optimizer=fc.FedAdam(beta2=0.9),
            optimizer_state=self.state,
            audit=True,
        )
        for (name, params), weight in zip(self.updates.items(), (600, 0.1), strict=True):
            metrics = {"loss": weight / 3, "note": "x"}
            assert round.offer(Update(name, 12, params, weight, DIFF, metrics)).accepted
        round.offer(Update("site-3", 11, {"h": np.ones(2)}, 1, DIFF))
        round.offer(Update("\n", 12, [], 1, DIFF))  # type: ignore[arg-type]
        audit = round.close().audit
        assert audit is not None
        return audit

    def test_it_is_read_and_replayed(self) -> None:
        audit = Audit.from_text(GOLDEN.read_bytes())
        verdict = verify(audit, self.updates, self.base, optimizer_state=self.state)
        assert verdict.lines == (
            "round 12: the same bits (updates: 2, digest of the model: "
            "fc8cdfa573ad2808e922bbb6c0204685946225fec7a2cbfba098a1165ea430e5)",
        )
        assert verdict.same_bits

    def test_the_same_round_has_the_same_audit_today_but_for_the_words(self) -> None:
        kept, today = (
            replace(audit, receipts=tuple(replace(one, detail="") for one in audit.receipts))
            for audit in (Audit.from_text(GOLDEN.read_bytes()), self.audit())
        )
        assert today == kept
        assert today.to_text() == kept.to_text()


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=5),
        st.sampled_from(["w", "exact", "float32", "DIFF", "krum", "fedadam", "0" * 64]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from("wxyz"), inner, max_size=3)
    ),
    max_leaves=4,
)


@given(st.data())
def test_whatever_an_audit_says_it_is_no_audit_or_gets_a_verdict(data: st.DataObject) -> None:
    round = Round(
        model(),
        ROUND,
        audit=True,
        accumulator=data.draw(st.sampled_from(["exact", "float64", fc.TrimmedMean(0.2)])),
        server_optimizer=data.draw(st.sampled_from([None, fc.FedAdam(), fc.FedAvg()])),
    )
    for name, params in three().items():
        assert round.offer(Update(name, ROUND, params, 2)).accepted
    round.offer(good(weight=-1))
    audit = round.close().audit
    assert audit is not None
    meta = json.loads(audit.to_text())
    for _ in range(data.draw(st.integers(1, 2))):
        place = meta
        while True:
            key: Any = data.draw(
                st.sampled_from(sorted(place))
                if isinstance(place, dict)
                else st.integers(0, len(place) - 1)
            )
            if not isinstance(place[key], (dict, list)) or not place[key]:
                break
            if data.draw(st.integers(0, 3)) == 0:
                break
            place = place[key]
        place[key] = data.draw(JSON)
    body = {key: value for key, value in meta.items() if key != "checksum"}
    try:
        found = Audit.from_text(json.dumps({**body, "checksum": audit_module._checksum(body)}))
    except UsageError as error:
        assert str(error).isprintable()  # noqa: PT017
        return
    again = Audit.from_text(found.to_text())
    assert (again, hash(again)) == (found, hash(found))
    for base in (None, model()):
        verdict = verify(found, three(), base)
        assert all(line.isprintable() and len(line) < 2_000 for line in verdict.lines)


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
                updates = {name: diff(sent, base) for name, sent in updates.items()}
            assert verify(outcome.audit, updates, base).same_bits
            base = outcome.model

    def test_but_not_unasked(self) -> None:
        self.sent = [{}]
        (outcome,) = fc.Federation(model(), {"a": self.train}, 1).run()
        assert outcome.audit is None


def test_what_is_no_audit_or_no_mapping_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="audit: expected an Audit"):
        verify("audit.json", {})  # type: ignore[arg-type]
    clients = {"a": lambda params, _: fc.TrainResult(params, 1)}
    (outcome,) = fc.Federation({"w": np.zeros(1)}, clients, 1, audit=True).run()
    assert outcome.audit is not None
    with pytest.raises(UsageError, match=r"updates: expected a mapping from names .* got a list"):
        verify(outcome.audit, [])  # type: ignore[arg-type]
