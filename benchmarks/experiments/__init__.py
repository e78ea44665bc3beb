"""Rounds to a test accuracy: ``python -m benchmarks.experiments [--mnist FOLDER]``.

The experiment of H. B. McMahan, E. Moore, D. Ramage, S. Hampson and B. Agüera y Arcas,
"Communication-Efficient Learning of Deep Networks from Decentralized Data" (2017), section 3: how
many rounds of federated averaging a network needs, by the fraction C of clients in a round, the
size B of their batches and the number E of their passes over their data, with data that are dealt
out at random (IID) or so that most clients have two kinds of digits only (non-IID).

With the folder of the MNIST files it is the paper's: 60,000 images, 100 clients of 600, its "2NN"
(two hidden layers of 200 rectified linear units), 97%, and the figures of its table 1 beside what
was measured. Without it the digits that come with the package are learned, by a smaller network and
fewer clients, in seconds.

As in the paper a curve is the best accuracy so far, and is interpolated linearly between rounds;
where several learning rates are given, the best of them counts.

* `data`: the digits, and the reader of MNIST's files
* `split`: who gets which examples
* `network`: the networks, and how they are trained
* `play`: one setting, from the first round to the goal
* `paper`: the paper's figures
"""
