"""``python -m benchmarks tpu``: the programs' own steps, compiled for TPUs that are not there.

The package libtpu holds the compiler. What it makes is counted, not run: FLOPs, bytes, collectives,
memory, and from the chip's published rates a lower bound on the time of a step.
"""
