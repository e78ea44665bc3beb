"""Measures the engine beside its peers: ``python -m benchmarks [NAMES...] [--save DIR] [--quick]``.

Times on a shared machine drift by more than the differences that matter. So nothing here is a time
to be compared with one from another run. Contestants take turns in one process, lap by lap, in an
order that is drawn anew for each lap, on the same inputs, and what is reported is how they stand to
each other: the ratio of the medians, and the quartiles of the ratios of the single laps as its
spread. A plain copy of the same bytes runs along as the floor.

* `workloads`: the models, in one table
* `peers`: who averages them, in one table
* `timing`, `growth`: the two ways of measuring
* `averaging`: contestants on one workload
* `suite`: the benchmarks, in one table
* `goals`: what the engine is held to, in one table
* `tables`, `plots`, `machine`: how it is shown
* `nvflare_job`, `out_of_core`: jobs on NVFlare, and files larger than memory; run by themselves
* `experiments`: what federated learning gives, and not how fast

To have every peer at hand: ``pip install -e ".[nvflare,flower,bench]"``.
"""
