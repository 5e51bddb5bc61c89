#define SELFDISTILL_ISA isa_avx2
#include "rows.inl"
