"""Hypothesis strategies: models and weights that are hard on an average.

Random decimal numbers seldom find an error in arithmetic. So the arrays here are drawn as bits, and
the bits are then forced into one of several mixtures: any code whatever, numbers of ordinary size,
subnormals, the seam between them and the normal numbers, numbers next to the largest, zeros of both
signs, significands of all ones, powers of two over the whole range of exponents, and numbers that
differ in their last bit, whose means lie half-way between two numbers. Several models are drawn
together, so that they can be related: equal, opposite in sign (the sum cancels), or neighbours in
the last bits.

One array costs one draw, whatever its size, so that an example takes a fraction of a millisecond.
All numbers are finite. An example shrinks towards few models, small shapes and zeros.

Hypothesis is imported when a strategy is made, not before. The dtypes of ``ml_dtypes`` take part if
that package is there.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedavg_core.errors import UsageError
from fedavg_core.model import ArraySpec, ModelSpec, number_format
from fedavg_core.update import TransferType, Update

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

__all__ = [
    "arrays",
    "averaged_dtypes",
    "models",
    "specs",
    "updates",
    "weighted_models",
    "weights",
]

_NUMPY_DTYPES = (
    *("float16", "float32", "float64"),
    *("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
)
_EXTENSION_DTYPES = (
    *("bfloat16", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn"),
    *("float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"),
)
_FLOAT_MIXTURES = (
    *("ordinary", "any", "subnormal", "near largest", "zeros"),
    *("last bits", "all ones", "powers of two", "seam"),
)
_INTEGER_MIXTURES = ("small", "any", "extremes", "zeros")
_RELATIONS = ("unrelated", "neighbours", "opposite", "equal")
_SHAPES = ((), (1,), (3,), (2, 2), (0,), (5,), (2, 0, 3))


def _hypothesis() -> Any:
    try:
        return importlib.import_module("hypothesis.strategies")
    except ImportError:
        raise UsageError(
            "fedavg_core.testing.strategies needs Hypothesis: pip install hypothesis"
        ) from None


def averaged_dtypes() -> list[np.dtype[Any]]:
    """Every dtype whose values can be averaged, as far as it is there.

    Returns:
        NumPy's floats and integers; then, if ``ml_dtypes`` is installed, its floats.
    """
    result = [np.dtype(name) for name in _NUMPY_DTYPES]
    try:
        extension = importlib.import_module("ml_dtypes")
    except ImportError:
        return result
    there = (getattr(extension, name, None) for name in _EXTENSION_DTYPES)
    return result + [np.dtype(kind) for kind in there if kind is not None]


def arrays(dtype: npt.DTypeLike, shape: tuple[int, ...] = (3,)) -> SearchStrategy[npt.NDArray[Any]]:
    """Arrays of finite numbers of one dtype, from one of the mixtures.

    Args:
        dtype: A dtype that can be averaged.
        shape: Their shape.

    Returns:
        A strategy for new, writeable arrays in the machine's own byte order.

    Raises:
        UsageError: The dtype cannot be averaged, or Hypothesis is missing.
    """
    return _arrays(np.dtype(dtype).newbyteorder("="), shape)


@functools.lru_cache(maxsize=1024)  # to make a strategy takes longer than to draw from it
def _arrays(dtype: np.dtype[Any], shape: tuple[int, ...]) -> SearchStrategy[npt.NDArray[Any]]:
    st = _hypothesis()
    format_ = number_format(dtype)
    if format_ is None:
        raise UsageError(f"arrays of dtype {dtype} cannot be averaged")
    mixtures = _INTEGER_MIXTURES if format_.kind == "integer" else _FLOAT_MIXTURES
    size = 1 + math.prod(shape) * dtype.itemsize

    def build(raw: bytes) -> npt.NDArray[Any]:
        mixture = mixtures[raw[0] % len(mixtures)]
        bits = np.frombuffer(raw[1:], dtype=f"u{dtype.itemsize}")
        return _forced(bits, dtype, mixture).reshape(shape)

    strategy: SearchStrategy[npt.NDArray[Any]] = st.binary(min_size=size, max_size=size).map(build)
    return strategy


def _forced(bits: npt.NDArray[Any], dtype: np.dtype[Any], mixture: str) -> npt.NDArray[Any]:
    """Arbitrary bits, made into finite numbers of a mixture."""
    format_ = number_format(dtype)
    unsigned = bits.dtype.type
    if format_ is None or format_.kind == "integer":
        few = bits & unsigned(3)
        signed_few = np.where(bits & unsigned(4), ~few, few)  # ~n is -1 - n in two's complement
        top = unsigned(np.iinfo(dtype).max)
        changed = {
            "small": signed_few if dtype.kind == "i" else few,
            "extremes": np.where(bits & unsigned(4), top - few, ~top + few),
            "zeros": np.zeros_like(bits),
        }.get(mixture, bits)
        whole: npt.NDArray[Any] = changed.astype(bits.dtype).view(dtype)
        return whole
    fraction_bits = format_.precision - 1
    fraction_mask = unsigned((1 << fraction_bits) - 1)
    sign_mask = unsigned(1 << (8 * dtype.itemsize - 1))
    sign, size = bits & sign_mask, bits & ~sign_mask
    largest = np.array([format_.largest]).astype(dtype).view(bits.dtype)[0]
    ordinary = (
        unsigned(-format_.least_exponent) + (size >> unsigned(fraction_bits) & unsigned(3))
    ) << (unsigned(fraction_bits))
    changed = {
        "ordinary": ordinary | (size & fraction_mask),
        "subnormal": size & fraction_mask,
        "near largest": largest - (size & unsigned(3)),
        "zeros": np.zeros_like(size),
        "last bits": ordinary | (size & unsigned(1)),
        "all ones": size | fraction_mask,
        "powers of two": size & ~fraction_mask,
        "seam": size & ((fraction_mask << unsigned(2)) | unsigned(3)),
    }.get(mixture, size)
    finite = np.minimum(changed, largest)
    if dtype.name.endswith("fnuz"):
        sign = np.where(finite == 0, unsigned(0), sign)  # that code would be NaN
    result: npt.NDArray[Any] = (finite | sign).astype(bits.dtype).view(dtype)
    return result


def weights(kind: str = "any") -> SearchStrategy[float]:
    """Weights, at all the sizes that a weight may have.

    Args:
        kind: ``"integer"`` (1 to 2**60, and now and then up to 2**200), ``"float"`` (1e-300 to
            1e300, and subnormal numbers), or ``"any"``.

    Returns:
        A strategy for ints and floats above zero.

    Raises:
        UsageError: There is no such kind, or Hypothesis is missing.
    """
    st = _hypothesis()
    integers = [
        st.integers(1, 1000),
        st.integers(1, 2**60),
        st.integers(2**60, 2**200),
    ]
    floats = [
        st.floats(0.001, 1000.0),
        st.floats(1e-300, 1e300),
        st.integers(1, 2**52 - 1).map(lambda steps: steps * 5e-324),
    ]
    kinds = {"integer": integers, "float": floats, "any": integers + floats}
    if kind not in kinds:
        raise UsageError(f"kind of weights: expected one of {sorted(kinds)}, got {kind!r}")
    strategy: SearchStrategy[float] = st.one_of(*kinds[kind])
    return strategy


def specs(
    *, dtypes: list[np.dtype[Any]] | None = None, max_keys: int = 2
) -> SearchStrategy[ModelSpec]:
    """What a small model may look like.

    Args:
        dtypes: The dtypes to draw from; all that can be averaged if not given.
        max_keys: The most parameters.

    Returns:
        A strategy for specs of one parameter or more, zero-dimensional and empty ones among them.

    Raises:
        UsageError: Hypothesis is missing.
    """
    st = _hypothesis()
    one = st.builds(
        ArraySpec,
        shape=st.sampled_from(_SHAPES),
        dtype=st.sampled_from(dtypes if dtypes is not None else averaged_dtypes()),
    )

    def named(parts: list[ArraySpec]) -> ModelSpec:
        return ModelSpec({f"layer{i}.weight": part for i, part in enumerate(parts)})

    strategy: SearchStrategy[ModelSpec] = st.lists(one, min_size=1, max_size=max_keys).map(named)
    return strategy


def models(spec: Mapping[str, ArraySpec] | None = None) -> SearchStrategy[dict[str, Any]]:
    """Models, of one spec or of any.

    Args:
        spec: What they look like; drawn afresh for each if not given.

    Returns:
        A strategy for dicts of new, writeable arrays.

    Raises:
        UsageError: The spec has a dtype that cannot be averaged, or Hypothesis is missing.
    """
    strategy: SearchStrategy[dict[str, Any]]
    if spec is None:
        any_spec = specs()
        strategy = _hypothesis().composite(lambda draw: _model(draw, draw(any_spec)))()
    else:
        strategy = _hypothesis().composite(lambda draw: _model(draw, spec))()
    return strategy


def _model(draw: DrawFn, spec: Mapping[str, ArraySpec]) -> dict[str, Any]:
    return {key: draw(_arrays(array.dtype, array.shape)) for key, array in spec.items()}


def weighted_models(
    spec: Mapping[str, ArraySpec] | None = None,
    *,
    min_models: int = 1,
    max_models: int = 4,
    weight: SearchStrategy[float] | None = None,
    partial: bool = False,
) -> SearchStrategy[tuple[list[dict[str, Any]], list[float]]]:
    """Several models that can be averaged with each other, and a weight for each.

    Args:
        spec: What they look like; drawn afresh each time if not given.
        min_models: The fewest models.
        max_models: The most.
        weight: A strategy for one weight; `weights` if not given.
        partial: Whether some models may lack some parameters. Each parameter is in one model at
            least, and each model has one parameter at least.

    Returns:
        A strategy for pairs: models, weights. Some models are equal, opposite or neighbours.

    Raises:
        UsageError: As for `models` and `weights`.
    """
    st = _hypothesis()
    any_spec = specs() if spec is None else st.just(spec)
    one_weight = weights() if weight is None else weight
    any_relation = st.sampled_from(_RELATIONS)
    any_count = st.integers(min_models, max_models)
    any_step = st.integers(0, 3)

    def draw_all(draw: DrawFn) -> tuple[list[dict[str, Any]], list[float]]:
        inside = draw(any_spec)
        relation = draw(any_relation)
        count = draw(any_count)
        first = _model(draw, inside)
        drawn, chosen = [first], [draw(one_weight)]
        for i in range(1, count):
            if relation == "unrelated" or (relation == "opposite" and i % 2 == 0):
                drawn.append(_model(draw, inside))
            elif relation == "opposite":
                drawn.append({key: _opposite(array) for key, array in drawn[-1].items()})
            else:
                step = draw(any_step) if relation == "neighbours" else 0
                drawn.append({key: _neighbour(array, step) for key, array in first.items()})
            same_again = relation == "opposite" and i % 2 == 1
            chosen.append(chosen[-1] if same_again else draw(one_weight))
        if partial:
            for key in list(inside):
                absent = draw(st.integers(0, 2**count - 2))  # one bit a model, never all
                for i, model in enumerate(drawn):
                    if absent >> i & 1 and len(model) > 1:
                        del model[key]
        return drawn, chosen

    strategy: SearchStrategy[tuple[list[dict[str, Any]], list[float]]] = st.composite(draw_all)()
    return strategy


def _opposite(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The numbers with the other sign; for integers the mirror image of their range, -1 - n."""
    bits = np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}").reshape(array.shape)
    if array.dtype.kind in "iu":
        return np.asarray(~bits, dtype=bits.dtype).view(array.dtype)
    turned = bits ^ bits.dtype.type(1 << (8 * array.dtype.itemsize - 1))
    if array.dtype.name.endswith("fnuz"):
        turned = np.where(bits == 0, bits, turned)
    return np.asarray(turned, dtype=bits.dtype).view(array.dtype)


def _neighbour(array: npt.NDArray[Any], step: int) -> npt.NDArray[Any]:
    """The numbers with their last two bits changed, where that is a finite number still."""
    bits = np.array(array, order="C").view(f"u{array.dtype.itemsize}").reshape(array.shape)
    near = np.asarray(bits ^ bits.dtype.type(step), dtype=bits.dtype).view(array.dtype)
    if array.dtype.kind in "iu":
        return near
    with np.errstate(invalid="ignore"):
        keep = np.isfinite(near.astype(np.float64))
    return np.asarray(np.where(keep, near, array), dtype=array.dtype)


def updates(
    spec: Mapping[str, ArraySpec] | None = None,
    *,
    round: int = 0,
    transfer: TransferType = TransferType.FULL,
) -> SearchStrategy[Update]:
    """Updates that a round would accept.

    Args:
        spec: What their models look like; drawn afresh for each if not given.
        round: The round that they answer.
        transfer: Whether their arrays are a model or a difference.

    Returns:
        A strategy for updates of contributors called ``site-1`` to ``site-99``.

    Raises:
        UsageError: As for `models` and `weights`.
    """
    st = _hypothesis()
    strategy: SearchStrategy[Update] = st.builds(
        Update,
        contributor=st.integers(1, 99).map(lambda number: f"site-{number}"),
        round=st.just(round),
        params=models(spec),
        weight=weights(),
        transfer=st.just(transfer),
        metrics=st.fixed_dictionaries({"loss": st.floats(0.0, 100.0)}),
    )
    return strategy
