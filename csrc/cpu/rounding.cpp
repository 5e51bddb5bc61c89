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

// Entries in the first half of each row's memory: `columns` from its start, values from its middle on.
SparseRows make_rows(const Tensor& tile, const Tensor& starts, int64_t slab) {
  TORCH_CHECK(tile.device().is_cpu() && tile.scalar_type() == at::kFloat && has_plain_rows(tile) && tile.size(1) >= 1,
              "tile: expected a float32 CPU tensor [rows, columns] with contiguous rows, got ", tile.scalar_type(), " ",
              tile.sizes(), " on ", tile.device());
  TORCH_CHECK(slab > 0, "slab: got ", slab, ", expected 1 or more columns");
  SparseRows rows;
  rows.rows = tile.data_ptr<float>();
  rows.stride = tile.stride(0);
  rows.capacity = tile.size(1) / 2;
  rows.slab = slab;
  rows.slabs = (tile.size(1) + slab - 1) / slab;
  check_matrix("starts", starts, tile.device(), at::kInt, tile.size(0), rows.slabs + 1);
  rows.starts = starts.data_ptr<int32_t>();
  return rows;
}

SparseRows make_rows(const Tensor& tile, const Tensor& starts, int64_t slab, bool with_dense, bool dense_in_bfloat16) {
  SparseRows rows = make_rows(tile, starts, slab);
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
  const SparseRows to = make_rows(student, starts, slab);
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

void sparse_hidden_gradient_(const Tensor& tile, const Tensor& starts, int64_t slab, bool with_dense, bool dense_in_bfloat16,
                             const Tensor& weight, const Tensor& centre, Tensor& out) {
  const RoundingHead head = make_head(weight, centre);
  const SparseRows from = make_rows(tile, starts, slab, with_dense, dense_in_bfloat16);
  TORCH_CHECK(head.columns == tile.size(1), "weight: got ", head.columns, " rows, expected one for each of ", tile.size(1),
              " columns");
  check_matrix("out", out, tile.device(), at::kFloat, tile.size(0), head.hidden);
  float* to = out.data_ptr<float>();
  // Few rows at a time, for the thread that is free: some have many entries.
  at::parallel_for(0, tile.size(0), 1, [&](int64_t begin, int64_t end) {
    kernels().rounding.hidden_gradient(head, from, to, begin, end);
  });
}

double sparse_weight_gradient_(const Tensor& tile, const Tensor& starts, int64_t slab, bool with_dense,
                               bool dense_in_bfloat16, const Tensor& hidden, const OptionalTensor& add, Tensor& out,
                               const OptionalTensor& bias) {
  const SparseRows from = make_rows(tile, starts, slab, with_dense, dense_in_bfloat16);
  const int64_t rows = tile.size(0), columns = tile.size(1);
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
  Tensor squares = at::empty({from.slabs}, tile.options().dtype(at::kDouble));
  double* squares_to = squares.data_ptr<double>();
  // A slab for the thread that is free, the first ones first: in those of byte-pair encodings are the frequent entries.
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    Tensor counts = at::empty({slab + 1}, at::TensorOptions().dtype(at::kInt));
    int32_t* places = counts.data_ptr<int32_t>();
    for (int64_t s = next++; s < from.slabs; s = next++) {
      const int64_t begin = s * slab, end = std::min(begin + slab, columns);
      std::fill(places, places + slab + 1, 0);
      const auto each = [&](const auto& f) {
        for (int64_t r = 0; r < rows; ++r) {
          each_entry(from, r, s, columns, [&](int64_t column, float value) { f(r, column - begin, value); });
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
  for (int64_t s = 0; s < from.slabs; ++s) total += squares_to[s];
  return total;
}

void sparse_bias_gradient_(const Tensor& tile, const Tensor& starts, int64_t slab, bool with_dense, bool dense_in_bfloat16,
                           Tensor& out) {
  const SparseRows from = make_rows(tile, starts, slab, with_dense, dense_in_bfloat16);
  check_vector("out", out, tile.device(), at::kFloat, tile.size(1));
  float* to = out.data_ptr<float>();
  for (int64_t r = 0; r < tile.size(0); ++r) {
    for (int64_t s = 0; s < from.slabs; ++s) {
      each_entry(from, r, s, tile.size(1), [&](int64_t column, float value) { to[column] += value; });
    }
  }
}

}  // namespace
}  // namespace selfdistill

SELFDISTILL_LIBRARY_IMPL(CPU, m) {
  m.impl("rounding_spread", selfdistill::rounding_spread);
  m.impl("row_round_", selfdistill::row_round_);
  m.impl("sparse_hidden_gradient_", selfdistill::sparse_hidden_gradient_);
  m.impl("sparse_weight_gradient_", selfdistill::sparse_weight_gradient_);
  m.impl("sparse_bias_gradient_", selfdistill::sparse_bias_gradient_);
}
