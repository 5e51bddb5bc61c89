// The operators of a gradient that is rounded at random to few entries (rounding.inl, sparse.inl).
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>

#include "vector.h"
// (divergence.h is written in the functions of vector.h)
#include "../checks.h"
#include "../library.h"
#include "rows.h"

namespace selfdistill {

const Kernels& kernels();  // of the instruction set in use, csrc/cpu/ops.cpp

namespace {

using at::Tensor;

RoundingHead make_head(const Tensor& weight, const Tensor& centre) {
  TORCH_CHECK(weight.device().is_cpu() && weight.dim() == 2 && weight.is_contiguous() &&
                  (weight.scalar_type() == at::kFloat || weight.scalar_type() == at::kBFloat16),
              "weight: expected a contiguous float32 or bfloat16 CPU tensor [columns, hidden], got ", weight.scalar_type(),
              " ", weight.sizes(), " on ", weight.device());
  check_vector("centre", centre, weight.device(), at::kFloat, weight.size(1));
  RoundingHead head;
  head.weight = weight.const_data_ptr();
  head.is_bfloat16 = weight.scalar_type() == at::kBFloat16;
  head.columns = weight.size(0);
  head.hidden = weight.size(1);
  head.centre = centre.const_data_ptr<float>();
  return head;
}

// Entries in each row's memory: their columns from its start, values from its middle on. They are of `columns` columns, as
// many as a dense row has elements.
SparseRows make_rows(const Tensor& tile, const Tensor& starts, int64_t slab, int64_t columns) {
  TORCH_CHECK(tile.device().is_cpu() && tile.scalar_type() == at::kFloat && has_plain_rows(tile) && tile.size(1) >= 1,
              "tile: expected a float32 CPU tensor [rows, columns] with contiguous rows, got ", tile.scalar_type(), " ",
              tile.sizes(), " on ", tile.device());
  TORCH_CHECK(slab > 0, "slab: got ", slab, ", expected 1 or more columns");
  SparseRows rows;
  rows.rows = tile.data_ptr<float>();
  rows.stride = tile.stride(0);
  rows.capacity = tile.size(1) / 2;
  rows.slab = slab;
  rows.slabs = (columns + slab - 1) / slab;
  check_matrix("starts", starts, tile.device(), at::kInt, tile.size(0), rows.slabs + 1);
  rows.starts = starts.data_ptr<int32_t>();
  return rows;
}

SparseRows make_rows(const Tensor& tile, const Tensor& starts, int64_t slab, bool with_dense, bool dense_in_bfloat16,
                     int64_t columns) {
  TORCH_CHECK(!with_dense || tile.size(1) == columns, "with_dense: True, but a row of tile has ", tile.size(1),
              " elements, not one for each of ", columns, " columns");
  SparseRows rows = make_rows(tile, starts, slab, columns);
  rows.with_dense = with_dense;
  rows.dense_is_bfloat16 = dense_in_bfloat16;
  return rows;
}

// Calls f(column, value) for the entries of row r in slab s, or those of a dense row that products take along.
template <class F>
void each_entry(const SparseRows& from, int64_t r, int64_t s, int64_t columns, const F& f) {
  const float* row = from.rows + r * from.stride;
  if (!from.is_dense(r)) {
    const int32_t* at = from.starts + r * (from.slabs + 1);
    const int32_t* entries = reinterpret_cast<const int32_t*>(row);
    for (int32_t i = at[s]; i < at[s + 1]; ++i) f(entries[i], row[from.capacity + i]);
  } else if (from.with_dense) {
    const int64_t end = std::min((s + 1) * from.slab, columns);
    for (int64_t j = s * from.slab; j < end; ++j) {
      f(j, from.dense_is_bfloat16 ? widened(reinterpret_cast<const uint16_t*>(row)[j]) : row[j]);
    }
  }
}

Tensor rounding_spread(const Tensor& weight, const Tensor& centre) {
  const RoundingHead head = make_head(weight, centre);
  Tensor spread = at::empty({head.columns}, centre.options());
  float* to = spread.data_ptr<float>();
  at::parallel_for(0, head.columns, 64, [&](int64_t begin, int64_t end) {
    kernels().rounding.spread(head, to, begin, end);
  });
  return spread;
}

void row_round_(Tensor& student, const OptionalTensor& teacher, const OptionalTensor& student_bias,
                const OptionalTensor& teacher_bias, const OptionalTensor& targets, const Tensor& statistics,
                const Tensor& term_weights, double logit_scale, double softcap, double temperature, int64_t divergence,
                double beta, bool gradient_in_bfloat16, const Tensor& weight, const Tensor& centre, const Tensor& spread,
                const Tensor& keys, double tolerance, int64_t limit, int64_t slab, Tensor& starts, Tensor& variance,
                const OptionalTensor& moments) {
  Problem p = make_problem(student, teacher, student_bias, teacher_bias, targets, logit_scale, softcap, temperature,
                           divergence, beta, 0);
  set_gradient_type(p, gradient_in_bfloat16);
  check_row_terms(student, statistics, term_weights);
  RoundingHead head = make_head(weight, centre);
  TORCH_CHECK(head.columns == p.columns, "weight: got ", head.columns, " rows, expected one for each of ", p.columns,
              " columns");
  check_vector("spread", spread, student.device(), at::kFloat, p.columns);
  head.spread = spread.const_data_ptr<float>();
  const int64_t rows = student.size(0);
  check_vector("keys", keys, student.device(), at::kLong, rows);
  check_matrix("variance", variance, student.device(), at::kFloat, rows, 2);
  const SparseRows to = make_rows(student, starts, slab, p.columns);
  TORCH_CHECK(tolerance > 0, "tolerance: got ", tolerance, ", expected more than 0");
  TORCH_CHECK(limit >= 0 && limit <= to.capacity, "limit: got ", limit, ", expected 0 to ", to.capacity);
  Rounding rounding;
  rounding.tolerance = tolerance;
  rounding.limit = limit;
  rounding.keys = keys.const_data_ptr<int64_t>();
  rounding.variance = variance.data_ptr<float>();
  if (moments) {
    check_matrix("moments", *moments, student.device(), at::kFloat, rows, 4);
    rounding.moments = moments->data_ptr<float>();
  }
  const float* from = statistics.const_data_ptr<float>();
  const float* weights = term_weights.const_data_ptr<float>();
  const RoundingKernels& k = kernels().rounding;
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    Tensor scratch = at::empty({k.scratch_bytes(limit, head.hidden)}, at::TensorOptions().dtype(at::kByte));
    k.round(p, from, weights, head, rounding, to, scratch.data_ptr(), begin, end);
  });
}

CandidateRows make_candidates(const Tensor& candidates, const Tensor& counts, const Tensor& marks, bool has_teacher) {
  const int64_t models = has_teacher ? 2 : 1;
  TORCH_CHECK(candidates.device().is_cpu() && candidates.scalar_type() == at::kFloat && candidates.is_contiguous() &&
                  candidates.dim() == 3 && candidates.size(1) == 1 + models,
              "candidates: expected a contiguous float32 CPU tensor [rows, ", 1 + models, ", capacity], got ",
              candidates.scalar_type(), " ", candidates.sizes(), " on ", candidates.device());
  const int64_t rows = candidates.size(0), capacity = candidates.size(2);
  // Room for a block of the widest vectors beside what a full row keeps.
  TORCH_CHECK(capacity >= 4096 && capacity % 16 == 0, "candidates: got a capacity of ", capacity,
              ", expected 4096 or more, a multiple of 16");
  check_vector("counts", counts, candidates.device(), at::kInt, rows);
  check_matrix("marks", marks, candidates.device(), at::kFloat, rows, CandidateRows::kMarks);
  CandidateRows made;
  made.rows = candidates.data_ptr<float>();
  made.stride = (1 + models) * capacity;
  made.capacity = capacity;
  made.counts = counts.data_ptr<int32_t>();
  made.marks = marks.data_ptr<float>();
  made.has_teacher = has_teacher;
  return made;
}

void row_emit_(const Tensor& student, const OptionalTensor& teacher, const OptionalTensor& student_bias,
               const OptionalTensor& teacher_bias, const OptionalTensor& targets, double logit_scale, double softcap,
               double temperature, int64_t divergence, bool entropy_term, int64_t column_offset, const Tensor& state,
               const Tensor& keys, double floor, Tensor& candidates, Tensor& counts, Tensor& marks) {
  // A priority does not depend on beta; any valid one passes the check.
  const Problem p = make_problem(student, teacher, student_bias, teacher_bias, targets, logit_scale, softcap, temperature,
                                 divergence, 0.5, column_offset);
  const int64_t rows = student.size(0);
  check_state(state, student.device(), rows);
  check_vector("keys", keys, student.device(), at::kLong, rows);
  CandidateRows into = make_candidates(candidates, counts, marks, divergence != 0);
  into.floor = (float)floor;
  TORCH_CHECK(candidates.size(0) == rows, "candidates: got ", candidates.size(0), " rows, expected ", rows);
  const double* found = state.const_data_ptr<double>();
  const int64_t* from = keys.const_data_ptr<int64_t>();
  const RoundingKernels& k = kernels().rounding;
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    Tensor scratch = at::empty({into.capacity}, candidates.options());
    k.emit(p, entropy_term, found, from, into, scratch.data_ptr<float>(), begin, end);
  });
}

void row_settle_(Tensor& candidates, const Tensor& counts, const Tensor& marks, const OptionalTensor& targets,
                 const Tensor& statistics, const Tensor& term_weights, double logit_scale, double softcap,
                 double temperature, int64_t divergence, double beta, const Tensor& weight, const Tensor& centre,
                 const Tensor& spread, const Tensor& keys, double tolerance, int64_t limit, int64_t slab, Tensor& starts,
                 Tensor& variance) {
  RoundingHead head = make_head(weight, centre);
  check_vector("spread", spread, candidates.device(), at::kFloat, head.columns);
  head.spread = spread.const_data_ptr<float>();
  const CandidateRows from = make_candidates(candidates, counts, marks, divergence != 0);
  const int64_t rows = candidates.size(0);
  const Tensor memory = candidates.view({rows, candidates.size(1) * candidates.size(2)});
  const SparseRows to = make_rows(memory, starts, slab, head.columns);
  check_row_terms(memory, statistics, term_weights);
  check_vector("keys", keys, candidates.device(), at::kLong, rows);
  check_matrix("variance", variance, candidates.device(), at::kFloat, rows, 2);
  TORCH_CHECK(tolerance > 0, "tolerance: got ", tolerance, ", expected more than 0");
  TORCH_CHECK(limit >= 0 && limit <= to.capacity, "limit: got ", limit, ", expected 0 to ", to.capacity);
  Problem p;
  if (targets) {
    check_vector("targets", *targets, candidates.device(), at::kLong, rows);
    p.targets = targets->const_data_ptr<int64_t>();
  }
  p.columns = head.columns;
  p.logit_scale = logit_scale;
  p.softcap = softcap;
  p.temperature = temperature;
  p.divergence = static_cast<Divergence>(divergence);
  p.beta = beta;
  Rounding rounding;
  rounding.tolerance = tolerance;
  rounding.limit = limit;
  rounding.keys = keys.const_data_ptr<int64_t>();
  rounding.variance = variance.data_ptr<float>();
  const float* found = statistics.const_data_ptr<float>();
  const float* weights = term_weights.const_data_ptr<float>();
  const RoundingKernels& k = kernels().rounding;
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    Tensor scratch = at::empty({k.scratch_bytes(limit, head.hidden)}, at::TensorOptions().dtype(at::kByte));
    k.settle(p, from, found, weights, head, rounding, to, scratch.data_ptr(), begin, end);
  });
}

void sparse_hidden_gradient_(const Tensor& tile, const Tensor& starts, int64_t slab, bool with_dense, bool dense_in_bfloat16,
                             const Tensor& weight, const Tensor& centre, Tensor& out) {
  const RoundingHead head = make_head(weight, centre);
  const SparseRows from = make_rows(tile, starts, slab, with_dense, dense_in_bfloat16, head.columns);
  check_matrix("out", out, tile.device(), at::kFloat, tile.size(0), head.hidden);
  float* to = out.data_ptr<float>();
  // Few rows at a time, for the thread that is free: some have many entries.
  at::parallel_for(0, tile.size(0), 1, [&](int64_t begin, int64_t end) {
    kernels().rounding.hidden_gradient(head, from, to, begin, end);
  });
}

double sparse_weight_gradient_(const Tensor& tile, const Tensor& starts, int64_t slab, bool with_dense,
                               bool dense_in_bfloat16, const Tensor& hidden, const OptionalTensor& add, Tensor& out,
                               const OptionalTensor& bias, int64_t first, int64_t vocabulary) {
  const SparseRows from = make_rows(tile, starts, slab, with_dense, dense_in_bfloat16, vocabulary);
  const int64_t rows = tile.size(0), columns = out.size(0);
  TORCH_CHECK(first >= 0 && first % slab == 0 && first + columns <= vocabulary &&
                  (columns % slab == 0 || first + columns == vocabulary),
              "first: got ", first, " and out for ", columns, " columns, expected whole slabs of ", slab, " of ", vocabulary,
              " columns");
  const int64_t first_slab = first / slab, slabs = (columns + slab - 1) / slab;
  TORCH_CHECK(hidden.device().is_cpu() && hidden.dim() == 2 && hidden.size(0) == rows && hidden.is_contiguous(),
              "hidden: expected a contiguous CPU tensor [", rows, ", hidden], got ", hidden.sizes(), " on ",
              hidden.device());
  const bool is_narrow = hidden.scalar_type() == at::kBFloat16;
  TORCH_CHECK(is_narrow || hidden.scalar_type() == at::kFloat, "hidden: expected float32 or bfloat16, got ",
              hidden.scalar_type());
  check_matrix("out", out, tile.device(), is_narrow && out.scalar_type() == at::kBFloat16 ? at::kBFloat16 : at::kFloat,
               columns, hidden.size(1));
  SparseProduct product;
  product.rows = rows;
  product.hidden = hidden.const_data_ptr();
  product.size = hidden.size(1);
  product.hidden_is_bfloat16 = is_narrow;
  product.out = out.data_ptr();
  product.out_is_bfloat16 = out.scalar_type() == at::kBFloat16;
  if (add) {
    check_matrix("add", *add, tile.device(), at::kFloat, columns, hidden.size(1));
    product.add = add->const_data_ptr<float>();
  }
  float* bias_to = nullptr;
  if (bias) {
    check_vector("bias", *bias, tile.device(), at::kFloat, columns);
    bias_to = bias->data_ptr<float>();
  }
  Tensor squares = at::empty({slabs}, tile.options().dtype(at::kDouble));
  double* squares_to = squares.data_ptr<double>();
  // A slab for the thread that is free, the first ones first: in those of byte-pair encodings are the frequent entries.
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    Tensor counts = at::empty({slab + 1}, at::TensorOptions().dtype(at::kInt));
    int32_t* places = counts.data_ptr<int32_t>();
    for (int64_t s = next++; s < slabs; s = next++) {
      const int64_t begin = s * slab, end = std::min(begin + slab, columns);
      std::fill(places, places + slab + 1, 0);
      const auto each = [&](const auto& f) {
        for (int64_t r = 0; r < rows; ++r) {
          each_entry(from, r, first_slab + s, vocabulary,
                     [&](int64_t column, float value) { f(r, column - first - begin, value); });
        }
      };
      // By column, and in each by row, whatever the thread.
      each([&](int64_t, int64_t column, float) { ++places[column + 1]; });
      for (int64_t j = 0; j < end - begin; ++j) places[j + 1] += places[j];
      const int64_t count = places[end - begin];
      Tensor sorted_rows = at::empty({count}, counts.options());
      Tensor sorted_values = at::empty({count}, at::TensorOptions().dtype(at::kFloat));
      int32_t* row_of = sorted_rows.data_ptr<int32_t>();
      float* value_of = sorted_values.data_ptr<float>();
      each([&](int64_t row, int64_t column, float value) {
        const int32_t to = places[column]++;
        row_of[to] = (int32_t)row;
        value_of[to] = value;
        if (bias_to) bias_to[begin + column] += value;
      });
      for (int64_t j = end - begin; j > 0; --j) places[j] = places[j - 1];
      places[0] = 0;
      squares_to[s] = kernels().rounding.weight_gradient(product, places, row_of, value_of, begin, end);
    }
  };
  at::parallel_for(0, at::get_num_threads(), 1, work);
  double total = 0.0;
  for (int64_t s = 0; s < slabs; ++s) total += squares_to[s];
  return total;
}

void sparse_bias_gradient_(const Tensor& tile, const Tensor& starts, int64_t slab, bool with_dense, bool dense_in_bfloat16,
                           Tensor& out) {
  const int64_t columns = out.size(0);
  const SparseRows from = make_rows(tile, starts, slab, with_dense, dense_in_bfloat16, columns);
  check_vector("out", out, tile.device(), at::kFloat, columns);
  float* to = out.data_ptr<float>();
  for (int64_t r = 0; r < tile.size(0); ++r) {
    for (int64_t s = 0; s < from.slabs; ++s) {
      each_entry(from, r, s, columns, [&](int64_t column, float value) { to[column] += value; });
    }
  }
}

}  // namespace
}  // namespace selfdistill

SELFDISTILL_LIBRARY_IMPL(CPU, m) {
  m.impl("rounding_spread", selfdistill::rounding_spread);
  m.impl("row_round_", selfdistill::row_round_);
  m.impl("row_emit_", selfdistill::row_emit_);
  m.impl("row_settle_", selfdistill::row_settle_);
  m.impl("sparse_hidden_gradient_", selfdistill::sparse_hidden_gradient_);
  m.impl("sparse_weight_gradient_", selfdistill::sparse_weight_gradient_);
  m.impl("sparse_bias_gradient_", selfdistill::sparse_bias_gradient_);
}
