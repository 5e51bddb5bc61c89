// A gradient of logits that is rounded at random to few entries: what the kernels of rounding.inl take and do, without torch.
#pragma once

#include "../problem.h"

namespace selfdistill {

// The lm_head of a rounded gradient.
struct RoundingHead {
  const void* weight = nullptr;  // W [columns, hidden], contiguous, float32 or bfloat16
  bool is_bfloat16 = false;
  int64_t columns = 0, hidden = 0;
  const float* centre = nullptr;  // c [hidden]: W_j - c stands for W_j
  const float* spread = nullptr;  // [columns] |W_j - c|^2
};

// The entries of row r lie in memory that starts at `rows` + r * `stride`: int32 columns, ascending from slab to slab, then
// from `capacity` elements on their float32 values.
struct SparseRows {
  float* rows = nullptr;
  int64_t stride = 0, capacity = 0;
  int64_t slab = 0, slabs = 0;  // columns of a slab, and how many there are
  int32_t* starts = nullptr;    // [rows, slabs + 1]: entries of slab i are [starts[i], starts[i + 1]); -1: a dense row
  // Whether products take the dense rows along, and whether those are bfloat16.
  bool with_dense = false, dense_is_bfloat16 = false;

  bool is_dense(int64_t r) const { return starts[r * (slabs + 1)] < 0; }
};

// What one sweep over the vocabulary keeps of rows until their log-sum-exp is known. The memory of row r starts at `rows` +
// r * `stride`: `capacity` int32 columns, ascending, then as many logits of the student, and of the teacher where a
// divergence needs them.
struct CandidateRows {
  static constexpr int kMarks = 5;
  float* rows = nullptr;
  int64_t stride = 0, capacity = 0;
  int32_t* counts = nullptr;  // [rows]
  float* marks = nullptr;     // [rows, kMarks]: floor, log-sum-exps and target's logits of RowLogits in rounding.inl
  bool has_teacher = false;
  float floor = 0.0f;  // of a row before its first slab, log2; -infinity to keep all there is room for
};

struct Rounding {
  double tolerance = 0.0;         // the relative standard error that dH of a row may have
  int64_t limit = 0;              // a row that needs more entries becomes dense
  const int64_t* keys = nullptr;  // [rows], what a row's random numbers follow from
  float* variance = nullptr;      // [rows, 2]: predicted, summed over the elements of dH and over the entries
  float* moments = nullptr;       // [rows, 4] or nullptr: what moments_of() in rounding.inl says of all entries
};

// What dW is made from and where it goes.
struct SparseProduct {
  int64_t rows = 0;
  const void* hidden = nullptr;  // h [rows, size], contiguous, float32 or bfloat16
  int64_t size = 0;
  const float* add = nullptr;  // [columns, size] float32, or nullptr
  void* out = nullptr;         // [columns, size], float32 or bfloat16
  bool hidden_is_bfloat16 = false, out_is_bfloat16 = false;
};

struct RoundingKernels {
  // For columns [begin, end): |W_j - c|^2.
  void (*spread)(const RoundingHead&, float* spread, int64_t begin, int64_t end);
  // Rows [begin, end) of raw scores become sparse, or dense gradients; `scratch` has room for scratch_bytes().
  void (*round)(const Problem&, const float* statistics, const float* term_weights, const RoundingHead&, const Rounding&,
                const SparseRows&, void* scratch, int64_t begin, int64_t end);
  int64_t (*scratch_bytes)(int64_t limit, int64_t hidden);
  // A slab of raw scores adds to the candidates of rows [begin, end), whose `state` has seen it; the columns so far are
  // those of its first slab where p.column_offset is 0. `scratch` has room for `capacity` floats.
  void (*emit)(const Problem&, bool entropy_term, const double* state, const int64_t* keys, const CandidateRows&,
               float* scratch, int64_t begin, int64_t end);
  // Candidates of rows [begin, end) become sparse in their own memory; the first start of a row that cannot is -1.
  void (*settle)(const Problem&, const CandidateRows&, const float* statistics, const float* term_weights,
                 const RoundingHead&, const Rounding&, const SparseRows&, void* scratch, int64_t begin, int64_t end);
  // dH [rows, hidden] float32 of rows [begin, end); zeros for a dense row.
  void (*hidden_gradient)(const RoundingHead&, const SparseRows&, float* out, int64_t begin, int64_t end);
  // dW of the columns of one slab from entries by column: those of column j of the slab are [starts[j], starts[j + 1]).
  double (*weight_gradient)(const SparseProduct&, const int32_t* starts, const int32_t* rows, const float* values,
                            int64_t begin, int64_t end);
};

}  // namespace selfdistill
