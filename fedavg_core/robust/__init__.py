"""Means that a minority of wrong updates cannot move at will.

* `robust_mean`: what all of them have in common;
* `kept_updates`: those that keep updates: coordinate by coordinate, or whole vectors;
* `clipped_mean`: the one that keeps none;
* `rules`: the rules by their names.
"""
