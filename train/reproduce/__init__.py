"""``python -m train reproduce``: every figure and table of the paper.

Behrmann, Grathwohl, Chen, Duvenaud, Jacobsen: Invertible Residual Networks, ICML 2019,
arXiv:1811.00995. One file a figure or table, each with a function ``run(context) -> Result``;
:mod:`~train.reproduce.pieces` lists them, :mod:`~train.reproduce.program` runs them.
"""
