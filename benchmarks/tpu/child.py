"""``python -m benchmarks.tpu.child ROW OUT SIZE``: compile one row of the table, and count it."""

import importlib.metadata
import sys
import time
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from benchmarks.accelerator.records import Record
from benchmarks.tpu.chips import CHIPS, roofline
from benchmarks.tpu.counting import costs
from benchmarks.tpu.hlo import Module
from benchmarks.tpu.programs import lower, taking_part
from benchmarks.tpu.rows import RECORD, Row, rows


def main(name: str, out: Path, size: str) -> None:
    """Add the row's figures to the record."""
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are cold ones
    Record(out / RECORD).add(name, **measure(rows(size)[name]))


def measure(row: Row) -> dict[str, Any]:
    """Compile a row's program for its topology; return what it costs a chip."""
    found = topologies.get_topology_desc(platform="tpu", topology_name=row.topology)
    devices = taking_part(row.program, list[Any](found.devices))
    started = time.perf_counter()
    lowered = lower(row.program, row.spec, devices, num_terms=row.num_terms)
    traced = time.perf_counter()
    compiled = lowered.compile()
    ended = time.perf_counter()
    memory, stated = compiled.memory_analysis(), compiled.cost_analysis()
    counted = costs(Module(compiled.as_text()))
    flops = counted.matrix_flops + counted.elementwise_flops
    return {
        "chips": len(devices),
        "hosts": len({device.process_index for device in devices}),
        "batch": row.spec.batch,
        "lower_seconds": traced - started,
        "compile_seconds": ended - traced,
        "compilers_flops": stated["flops"],
        "compilers_bytes": stated["bytes accessed"],
        "flops": flops,
        "float32_share": counted.float32_flops / max(counted.matrix_flops, 1.0),
        "matrix_share": counted.matrix_flops / max(flops, 1.0),
        "hbm_bytes": counted.hbm_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "collective_bytes": counted.collectives,
        "collective_calls": counted.collective_calls,
        "host_transfers": counted.host_transfers,
        "open_loops": counted.open_loops,
        "compiled_by": f"jax {jax.__version__}, libtpu {importlib.metadata.version('libtpu')}",
        **roofline(CHIPS[row.chip], counted, len(devices)),
    }


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
