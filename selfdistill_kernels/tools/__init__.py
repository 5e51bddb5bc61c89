"""Programs about the kernels: `doctor`, `audit`, and the clock that times a GPU."""
