"""How near sets of pictures are to each other, by their features; nothing here knows a model or a run.

    chosen.py      which samples stand for a set
    frechet.py     mean and covariance of a stream of features, merged over processes; the Frechet distance
    kernel.py      the kernel distance, over subsets
    gaussian_kernel.py  the mean discrepancy of points; classes among neighbours
    neighbours.py  precision, recall, density, coverage
    blindness.py   which metrics tell a teacher's single step from its many
    inception.py   the network of the FID, for weights that are at hand

Why not torchmetrics, which the tests hold these to: it adds up features and their products without a centre
(1.9), draws subsets from the global random numbers, keeps a matrix of all features for the kernel distance,
and knows no neighbours.
"""
