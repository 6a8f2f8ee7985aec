"""``python -m benchmarks accelerator``: one machine with one accelerator, measured in one command.

Every measurement runs in a process of its own, most important first, and writes each figure as soon
as it is known. What an interruption or a missing package left out, the same command adds later.
"""
