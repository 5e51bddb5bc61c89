// What the row kernels take and do, without torch: the boundary between csrc/cpu/ops.cpp and the code that is compiled
// once per instruction set. A function handles the rows [begin, end), or the `count` elements of a row.
#pragma once

#include "../clip.h"
#include "../problem.h"
#include "rounding.h"

namespace selfdistill {

struct Kernels {
  void (*visit)(const Problem&, const VisitTerms&, int64_t begin, int64_t end);
  void (*statistics)(const Problem&, bool first, double* state, int64_t begin, int64_t end);
  void (*mixture)(const Problem&, double* state, int64_t begin, int64_t end);
  void (*clip)(const Problem&, double* state, int64_t begin, int64_t end);
  void (*gradient)(const Problem&, const float* statistics, const float* term_weights, int64_t begin, int64_t end);
  void (*widen)(const uint16_t* bfloat16, int64_t count, float* to);
  void (*narrow)(const float* from, int64_t count, uint16_t* bfloat16);  // to nearest even
  RoundingKernels rounding;
};

namespace isa_default {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace isa_avx2 {
extern const Kernels kernels;
}
namespace isa_avx512 {
extern const Kernels kernels;
}
#endif

}  // namespace selfdistill
