"""Time and memory of the loss beside what people use today (docs/benchmarks.md).

python -m benchmarks.compare        every contender in one process, interleaved; tables and plots
python -m benchmarks.memory_flat    peak extra memory against the number of tokens
pytest benchmarks --benchmark-only  the same contenders under pytest-benchmark
"""
