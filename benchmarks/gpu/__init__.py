"""One call on a machine with a GPU: `make gpu`, or python -m benchmarks.gpu (docs/gpu-run.md).

values.py          every kernel and objective against float64, on small problems
whole.py           the same at a real size, where offsets pass 32 bits
workers.py         spreads problems over processes, because each compiles for itself
tiles.py           the fastest tiles of this GPU
losses.py          time and memory beside bare GEMMs and other libraries
training_step.py   a training step with flash or flex prefix attention
section.py         what a section found, and how much time it has left
setting.py         sizes for a GPU, and for a rehearsal on a CPU
page.py            the record of all sections, as JSON and as a page
"""
