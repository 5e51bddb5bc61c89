// Large pages for tiles and gradients that are allocated anew in every call.
//
// The first touch of a fresh 100 MiB tensor is 25,000 page faults, as dear as several percent of the GEMMs that fill it; with
// pages of 2 MiB it is 50. Linux hands them out on request only (transparent_hugepage/enabled = madvise).
#include <ATen/core/Tensor.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../library.h"

namespace selfdistill {
namespace {

// Advice to the whole pages inside a tensor whose memory nobody has touched; harmless where it is not taken.
void advise_huge_pages_(const at::Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  TORCH_CHECK(tensor.is_contiguous(), "advise_huge_pages_: expected a contiguous tensor, got strides ", tensor.strides());
  const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = (begin + tensor.nbytes()) / kPage * kPage;
  if (first < last) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)tensor;
#endif
}

}  // namespace
}  // namespace selfdistill

SELFDISTILL_LIBRARY_IMPL(CPU, m) { m.impl("advise_huge_pages_", selfdistill::advise_huge_pages_); }
