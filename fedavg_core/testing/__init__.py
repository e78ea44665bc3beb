"""For tests: the right answers.

* `exact_weighted_mean` is the correctly rounded weighted mean by its definition, slow and plain;
  `exact_weighted_mean_by_mantissas` is the same by another route.
* `round_fraction` rounds one rational number to a dtype, `fractions_of` goes the other way.
"""

from fedavg_core.testing.mantissa_oracle import exact_weighted_mean_by_mantissas
from fedavg_core.testing.oracle import exact_weighted_mean, fractions_of, round_fraction

__all__ = [
    "exact_weighted_mean",
    "exact_weighted_mean_by_mantissas",
    "fractions_of",
    "round_fraction",
]
