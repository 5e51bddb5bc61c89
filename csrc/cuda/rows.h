// The row kernels on a GPU, without torch: the boundary between csrc/cuda/ops.cpp and the .cu files.
//
// Everything is queued on `stream` and nothing waits. Each function returns nullptr, or what went wrong with a launch.
#pragma once

#include "device.h"
// (problem.h is written in the functions of device.h)
#include "../problem.h"

struct CUstream_st;

namespace selfdistill {
namespace cuda {

using Stream = CUstream_st*;  // cudaStream_t

constexpr int64_t kMostColumns = int64_t{1} << 30;  // of a tile; its rows times its columns may be more than 2^31

// Statistics, gate and gradient of whole rows (csrc/bindings.cpp: row_visit_). The raw scores stay as they are in rows
// without a gradient; without a gate such a row becomes zeros, so that a GEMM may take all rows.
const char* visit(const Problem& p, const VisitTerms& v, int64_t rows, Stream stream);

const char* statistics(const Problem& p, bool first, double* state, int64_t rows, Stream stream);

const char* mixture(const Problem& p, double* state, int64_t rows, Stream stream);

// Of the entries of a divergence that p.entry_clip > 0 clips.
const char* clip(const Problem& p, double* state, int64_t rows, Stream stream);

const char* finish(const double* state, bool has_teacher, bool has_targets, Divergence divergence, double beta,
                   float* statistics, int64_t rows, Stream stream);

const char* gradient(const Problem& p, const float* statistics, const float* term_weights, int64_t rows, Stream stream);

// order [rows], holes [rows], count [1]: where the first `count` rows of a compacted tile come from.
const char* plan_gather(const bool* active, int64_t rows, int64_t* order, int64_t* holes, int64_t* count, Stream stream);

// Row order[r] moves to row r, for r < count. Both sizes in bytes.
const char* gather(void* tile, int64_t row_bytes, int64_t stride_bytes, const int64_t* order, const int64_t* count,
                   int64_t rows, Stream stream);

}  // namespace cuda
}  // namespace selfdistill
