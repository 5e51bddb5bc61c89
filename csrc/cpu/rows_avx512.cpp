#define SELFDISTILL_ISA isa_avx512
#include "rows.inl"
