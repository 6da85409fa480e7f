"""One module a framework; see benchmarks/contender.py."""
