"""Pictures of the rows that the benchmarks write."""
