"""Error-free arithmetic on arrays, and nothing else: sums without rounding, and one at the end.

From the bottom up:

* `error_free`: what a float64 operation loses, and the halves of a float64;
* `positions`: where few elements are set apart from many;
* `products`: arrays times weights, as sums of two float64;
* `limbs`: exact numbers as whole float64 on a grid of powers of two;
* `exact_sum`: weighted arrays, added up in limbs;
* `readout`: the leading part of an exact sum as one number or two;
* `careful`: quotients by any means, for the few elements that are near a rounding boundary;
* `rounding`: the sum by its weight, rounded once, for all others.
"""
