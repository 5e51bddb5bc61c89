#define SELFDISTILL_ISA isa_default
#include "rows.inl"
