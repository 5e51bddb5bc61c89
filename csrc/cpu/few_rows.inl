// y = x W^T for a few rows x: part of rows.inl.
//
// Libraries pack W before they multiply, which pays for many rows. Here W is read once, a value at a time, and multiplied
// with vectors along the rows of x, whose sums stay in registers. An element is summed from the first product to the last:
// its bits hang neither on the threads nor on the rows beside it.

// Vectors of sums, and vectors along the rows at most: what 32 registers hold beside the operands, or 16.
#if defined(__AVX512F__) || defined(__aarch64__)
static constexpr int kSums = 24, kVectors = 4;
#else
static constexpr int kSums = 12, kVectors = 2;
#endif
static constexpr int kMostColumns = 12;  // of a tile: more rows of W are more streams than memory follows
static constexpr int kLine = 16;  // elements of a cache line

// sums [C, V vectors] += w [C, depth] x [depth, V vectors]
template <int V, int C>
SELFDISTILL_FN void add_products(const float* x, int64_t width, const float* w, int64_t w_stride, int64_t depth,
                                 Vector (&sums)[C][V]) {
  constexpr int kDeep = V == 1 ? 2 : 1;  // products that one look at an address serves
  int64_t k = 0;
  for (; k + kDeep <= depth; k += kDeep) {
    if (k % kLine == 0) {
      // The next tile, line after line, which memory has the time of this one to send.
      for (int c = 0; c < C; ++c) __builtin_prefetch(w + C * w_stride + C * k + c * kLine, 0, 2);
    }
    Vector rows[kDeep][V];
    for (int j = 0; j < kDeep; ++j) {
      for (int v = 0; v < V; ++v) rows[j][v] = load(x + (k + j) * width + v * kLanes);
    }
    for (int c = 0; c < C; ++c) {
      for (int j = 0; j < kDeep; ++j) {
        const float value = w[c * w_stride + k + j];
        for (int v = 0; v < V; ++v) sums[c][v] += value * rows[j][v];
      }
    }
  }
  for (; k < depth; ++k) {
    for (int c = 0; c < C; ++c) {
      for (int v = 0; v < V; ++v) sums[c][v] += w[c * w_stride + k] * load(x + k * width + v * kLanes);
    }
  }
}

template <int V, int C>
void few_rows_tile(const FewRows& p, int64_t row, int64_t column) {
  Vector sums[C][V] = {};
  add_products<V, C>(p.x + row, p.width, p.weight + column * p.weight_stride, p.weight_stride, p.depth, sums);
  if (p.rank > 0) add_products<V, C>(p.inner + row, p.width, p.up + column * p.up_stride, p.up_stride, p.rank, sums);
  float values[C][V * kLanes];
  memcpy(values, sums, sizeof values);
  const int64_t rows = p.rows - row < V * kLanes ? p.rows - row : V * kLanes;
  for (int64_t r = 0; r < rows; ++r) {
    float* to = p.out + (row + r) * p.row_stride + column * p.column_stride;
    for (int c = 0; c < C; ++c) to[c * p.column_stride] = p.scaling * values[c][r] + (p.bias ? p.bias[column + c] : 0.0f);
  }
}

// Rows from `row` on, by as many vectors as they need.
template <int V>
int64_t few_rows_from(const FewRows& p, int64_t row, int64_t begin, int64_t end) {
  if constexpr (V > 1) {
    if (p.rows - row <= V / 2 * kLanes) return few_rows_from<V / 2>(p, row, begin, end);
  }
  constexpr int kColumns = kSums / V < kMostColumns ? kSums / V : kMostColumns;
  int64_t column = begin;
  for (; column + kColumns <= end; column += kColumns) few_rows_tile<V, kColumns>(p, row, column);
  for (; column < end; ++column) few_rows_tile<V, 1>(p, row, column);
  return row + V * kLanes;
}

// The columns [begin, end).
void few_rows(const FewRows& p, int64_t begin, int64_t end) {
  for (int64_t row = 0; row < p.rows;) row = few_rows_from<kVectors>(p, row, begin, end);
}
