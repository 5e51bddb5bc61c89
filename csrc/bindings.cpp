// The operators of selfdistill and their schemas. The kernels are registered in csrc/cpu/ops.cpp and csrc/cuda/ops.cpp.
//
// Tiles are raw GEMM outputs hidden @ weight.T, float32 [rows, columns], contiguous along a row, any row stride; on CUDA
// also bfloat16 or float16, whose gradients then have that type. Logits are
// softcap(logit_scale * (raw + bias)) / temperature (softcap 0: none); gradients are with respect to raw. A bias has one
// float32 for each column of the tile. divergence: 0 none, 1 KL(T||S), 2 KL(S||T), 3 JSD, 4 KL(T||m), 5 KL(S||m), where
// m = beta T + (1 - beta) S. statistics: float32 [rows, 10], state: float64 [rows, 19] (columns in csrc/divergence.h).
#include <Python.h>

#include "library.h"

SELFDISTILL_LIBRARY(m) {
  // One visit of every row while it is in the cache: transform in place, statistics, advantage gate, gradient in place.
  // Loss of a token: loss_weight * (divergence - policy_gradient * A * log p_s(y) - cross_entropy * log p_s(y) +
  // entropy * H(p_s)), A = log p_t(y) - log p_s(y) held constant. Without loss_weight: statistics only.
  // gate_sign: -2 none, 0 |A| > threshold, 1 A > threshold, -1 A < -threshold; a NaN advantage passes.
  // entry_clip: what an entry adds to the divergence at most; 0: no limit; on CUDA it must be 0 here.
  // active: in, the rows that may have a gradient; out, those that have one. The others' student rows are left as logits
  // (-inf as -1e30);
  // on CUDA tiles are not transformed: they are left as they were, and without a gate become zeros.
  // gradient_in_bfloat16: a row's gradient fills the first half of its own memory (view: stride 2 * stride(0)).
  m.def(
      "row_visit_(Tensor(a!) student, Tensor(b!)? teacher, Tensor? student_bias, Tensor? teacher_bias, "
      "Tensor? targets, Tensor? loss_weight, float logit_scale, float softcap, float temperature, int divergence, "
      "float beta, float policy_gradient, float cross_entropy, float entropy, int gate_sign, float gate_threshold, "
      "bool gradient_in_bfloat16, Tensor(c!) statistics, Tensor(d!) active, float entry_clip=0.0) -> ()");
  // Streaming over slabs of the vocabulary. The slabs are only read.
  m.def(
      "row_statistics_(Tensor student, Tensor? teacher, Tensor? student_bias, Tensor? teacher_bias, Tensor? targets, "
      "float logit_scale, float softcap, float temperature, int divergence, int column_offset, bool first, "
      "Tensor(a!) state) -> ()");
  // The second sweep, for divergences 3 to 5: once over every slab, after row_statistics_ has seen all of them.
  m.def(
      "row_mixture_(Tensor student, Tensor teacher, Tensor? student_bias, Tensor? teacher_bias, float logit_scale, "
      "float softcap, float temperature, int divergence, float beta, Tensor(a!) state) -> ()");
  // The same for the sums with clipped entries: once over every slab, after the sweeps above have seen all of them.
  m.def(
      "row_clip_(Tensor student, Tensor teacher, Tensor? student_bias, Tensor? teacher_bias, float logit_scale, "
      "float softcap, float temperature, int divergence, float beta, float entry_clip, Tensor(a!) state) -> ()");
  m.def("row_finish(Tensor state, bool has_teacher, bool has_targets, int divergence, float beta) -> Tensor");
  // Raw slab in, gradient out. term_weights: float32 [rows, 3], of the divergence, of -log p_s(y), of the entropy; a row
  // of zeros gives a gradient of zeros. The teacher is only read, and only for a divergence.
  m.def(
      "row_gradient_(Tensor(a!) student, Tensor? teacher, Tensor? student_bias, Tensor? teacher_bias, Tensor? targets, "
      "Tensor statistics, Tensor term_weights, float logit_scale, float softcap, float temperature, int divergence, "
      "float beta, int column_offset, bool gradient_in_bfloat16, float entry_clip=0.0) -> ()");
  // A gradient rounded at random to few entries, on the CPU. spread: float32 [columns], |W_j - centre|^2 of the rows of W.
  m.def("rounding_spread(Tensor weight, Tensor centre) -> Tensor");
  // Whole rows of raw scores in. Out: entries in the row's own memory, int32 columns from its start and float32 values from
  // its middle on; those of slab i lie in [starts[i], starts[i + 1]), starts int32 [rows, slabs + 1]. A row that would need
  // more than `limit` is a dense gradient, and its first start -1. keys: int64 [rows], which the random numbers follow from.
  // variance: float32 [rows, 2], predicted, summed over the elements of dH and over the entries. moments: float32 [rows, 4],
  // from all entries: the same two, and the most that the lot of one entry moves dH and an entry.
  m.def(
      "row_round_(Tensor(a!) student, Tensor? teacher, Tensor? student_bias, Tensor? teacher_bias, Tensor? targets, "
      "Tensor statistics, Tensor term_weights, float logit_scale, float softcap, float temperature, int divergence, "
      "float beta, bool gradient_in_bfloat16, Tensor weight, Tensor centre, Tensor spread, Tensor keys, float tolerance, "
      "int limit, int slab, Tensor(b!) starts, Tensor(c!) variance, Tensor(d!)? moments) -> ()");
  // The same where rows are not whole. A slab of raw scores, whose statistics `state` [rows, 19] has already, adds what may
  // be an entry to candidates [rows, 2 or with a divergence 3, capacity]: int32 columns and the models' logits. counts:
  // int32 [rows]; marks: float32 [rows, 5]; floor: log2 of the threshold for a weight of 1 below which
  // nothing is kept. When all slabs have passed, entries replace them in their own memory; the first
  // start of a row that they are not enough for is -1.
  m.def(
      "row_emit_(Tensor student, Tensor? teacher, Tensor? student_bias, Tensor? teacher_bias, Tensor? targets, "
      "float logit_scale, float softcap, float temperature, int divergence, bool entropy_term, int column_offset, "
      "Tensor state, Tensor keys, float floor, Tensor(a!) candidates, Tensor(b!) counts, Tensor(c!) marks) -> ()");
  m.def(
      "row_settle_(Tensor(a!) candidates, Tensor counts, Tensor marks, Tensor? targets, Tensor statistics, "
      "Tensor term_weights, float logit_scale, float softcap, float temperature, int divergence, float beta, Tensor weight, "
      "Tensor centre, Tensor spread, Tensor keys, float tolerance, int limit, int slab, Tensor(b!) starts, "
      "Tensor(c!) variance) -> ()");
  // out [rows, H] float32 = entries (weight - centre); of a dense row, zeros or `with_dense` its values times weight.
  m.def(
      "sparse_hidden_gradient_(Tensor tile, Tensor starts, int slab, bool with_dense, bool dense_in_bfloat16, Tensor weight, "
      "Tensor centre, Tensor(a!) out) -> ()");
  // out [columns, H] float32 or bfloat16 = entries^T hidden [rows, H] (+ add, float32, which may be out itself), and bias
  // [columns] += their sums, for whole slabs of columns from `first` on; returns the sum of the squares of out.
  m.def(
      "sparse_weight_gradient_(Tensor tile, Tensor starts, int slab, bool with_dense, bool dense_in_bfloat16, Tensor hidden, "
      "Tensor? add, Tensor(a!) out, Tensor(b!)? bias, int first, int vocabulary) -> float");
  // out float32 [columns] += the sums of the entries.
  m.def(
      "sparse_bias_gradient_(Tensor tile, Tensor starts, int slab, bool with_dense, bool dense_in_bfloat16, Tensor(a!) out) "
      "-> ()");
  // Moves the active rows of a tile of any dtype to its front; returns their original places, int64 [active rows].
  m.def("gather_active_rows_(Tensor(a!) tile, Tensor active) -> Tensor");
  // Asks for large pages before a fresh tensor is touched. Values stay undefined.
  m.def("advise_huge_pages_(Tensor tensor) -> ()");
  // bfloat16 x bfloat16 -> float32, where the processor has AMX or AVX512-BF16. Operands with contiguous rows, any row stride.
  m.def("gemm_bf16_available() -> bool");
  // out [R, V] = hidden [R, H] weight [V, H]^T
  m.def("gemm_bf16_logits_(Tensor hidden, Tensor weight, Tensor(a!) out) -> ()");
  // out [R, H] (+)= gradient [R, V] weight [V, H]
  m.def("gemm_bf16_hidden_gradient_(Tensor gradient, Tensor weight, bool accumulate, Tensor(a!) out) -> ()");
  // out [V, H] float32 or bfloat16 = gradient [R, V]^T hidden [R, H] (+ add [V, H] float32, which may be out itself)
  m.def("gemm_bf16_weight_gradient_(Tensor gradient, Tensor hidden, Tensor? add, Tensor(a!) out) -> ()");
  // The same products in float32 on any processor: parts of the large operand pass through `buffer`, float32 [any, H], shared
  // among the threads. hidden and gradient are float32, weight and the last out bfloat16.
  m.def("gemm_widened_logits_(Tensor hidden, Tensor weight, Tensor(a!) out, Tensor(b!) buffer) -> ()");
  m.def("gemm_widened_hidden_gradient_(Tensor gradient, Tensor weight, Tensor(a!) out, Tensor(b!) buffer) -> ()");
  m.def(
      "gemm_widened_weight_gradient_(Tensor gradient, Tensor hidden, Tensor? add, Tensor(a!) out, Tensor(b!) buffer) -> ()");
  // The same logits in float32, made as weight hidden^T by blocks that are turned round: faster on some processors.
  m.def("gemm_transposed_logits_(Tensor hidden, Tensor weight, Tensor(a!) out) -> ()");
  // "avx512", "avx2" or "default": chosen from the processor, lowered by SELFDISTILL_CPU_CAPABILITY or by the setter.
  m.def("cpu_capability() -> str");
  m.def("set_cpu_capability(str capability) -> ()");
}

// Torch's build command says the name: _C, but for a kernel of the hub.
SELFDISTILL_MODULE(TORCH_EXTENSION_NAME)
