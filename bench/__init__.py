"""The benches. `pytest bench/` runs them; `python bench/history.py` turns their results into docs/benchmarks.md."""
