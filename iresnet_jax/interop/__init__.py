"""Adapters to what others use: one file for each optional package, none imported by the library.

Import the file that you need, such as :mod:`iresnet_jax.interop.numpyro`. :mod:`.densities` needs
no other package: it is for samplers of any kind. The packages come with
``pip install 'iresnet_jax[interop]'``; docs/INTEROP.md says which versions work together.
"""
