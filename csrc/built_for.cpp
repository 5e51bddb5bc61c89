// What this extension was built for. selfdistill_kernels/backends/native/extension.py finds the record in the file, so
// that an extension of another torch is refused before it is loaded: that would fail with a mangled symbol at best.
// setup.py says SELFDISTILL_BUILT_FOR.
__attribute__((used)) static const char selfdistill_built_for[] = "selfdistill_kernels was built for " SELFDISTILL_BUILT_FOR;
