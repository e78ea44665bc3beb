"""For tests: the right answers, hard inputs, and a kit that any aggregator can be put through.

* `exact_weighted_mean` is the correctly rounded weighted mean by its definition, slow and plain;
  `exact_weighted_mean_by_mantissas` is the same by another route. `round_fraction` rounds one
  rational number to a dtype, `fractions_of` goes the other way.
* `weighted_models`, `models`, `arrays`, `weights`, `specs` and `updates` are strategies for
  Hypothesis, which is imported when one of them is called.
* `check_aggregator` finds out which properties an aggregator has. From the command line:
  ``python -m fedavg_core.testing exact float32``.
"""

from fedavg_core.testing.conformance import (
    Aggregator,
    ConformanceTable,
    PropertyResult,
    check_aggregator,
    compare_tables,
)
from fedavg_core.testing.mantissa_oracle import exact_weighted_mean_by_mantissas
from fedavg_core.testing.oracle import exact_weighted_mean, fractions_of, round_fraction
from fedavg_core.testing.strategies import (
    arrays,
    averaged_dtypes,
    models,
    specs,
    updates,
    weighted_models,
    weights,
)

__all__ = [
    "Aggregator",
    "ConformanceTable",
    "PropertyResult",
    "arrays",
    "averaged_dtypes",
    "check_aggregator",
    "compare_tables",
    "exact_weighted_mean",
    "exact_weighted_mean_by_mantissas",
    "fractions_of",
    "models",
    "round_fraction",
    "specs",
    "updates",
    "weighted_models",
    "weights",
]
