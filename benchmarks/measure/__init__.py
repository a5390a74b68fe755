"""What the benchmarks share: clocks, memory, errors, the machine's own description, and the one CSV schema."""
