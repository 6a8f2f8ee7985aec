"""``python -m benchmarks to-likelihood``: the time to a held-out likelihood, ours and others'.

A cell is one method with one setting on one data set from one seed. Each runs in a process of its
own with nothing cached. Its clock starts before the process does, so that imports and compilation
count; it stands still while a likelihood is evaluated, for everyone alike.
"""
