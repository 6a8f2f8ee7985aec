"""``python -m train reproduce``: every figure and table of the paper.

Behrmann, Grathwohl, Chen, Duvenaud, Jacobsen: Invertible Residual Networks, ICML 2019,
arXiv:1811.00995. Each figure or table is a function ``(context) -> Result``;
:mod:`~paper.program` lists them and runs them.
"""
