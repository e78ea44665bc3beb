"""The inside of an accumulator: the sums of a model's parameters, and their weights.

* `blocks`: how parameters are cut, and small ones gathered, into blocks of elements;
* `books`: which parameters there are, and the weight of each;
* `results`: the memory of means, which is used again when nobody has them any more;
* `threads`: blocks shared out to several threads;
* `sums`: what sums of any arithmetic have in common; `exact_sums` and `plain_sums` are the two.
"""
