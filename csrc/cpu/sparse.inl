// Products of a rounded gradient's entries with the head and with the hidden states: part of rows.inl.

template <class Element>
void spread_of(const RoundingHead& head, float* spread, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; ++j) {
    const Element* row = static_cast<const Element*>(head.weight) + j * head.hidden;
    Vector sums[2] = {};
    float tail = 0.0f;
    int64_t k = 0;
    for (; k + 2 * kLanes <= head.hidden; k += 2 * kLanes) {
      for (int i = 0; i < 2; ++i) {
        const Vector apart = load(row + k + i * kLanes) - load(head.centre + k + i * kLanes);
        sums[i] += apart * apart;
      }
    }
    for (; k < head.hidden; ++k) {
      const float apart = widened(row[k]) - head.centre[k];
      tail += apart * apart;
    }
    spread[j] = (float)(sum_lanes(sums[0] + sums[1]) + tail);
  }
}

void spread(const RoundingHead& head, float* to, int64_t begin, int64_t end) {
  (head.is_bfloat16 ? spread_of<uint16_t> : spread_of<float>)(head, to, begin, end);
}

// to += sum over four entries of value * row
template <class Element>
SELFDISTILL_FN void add_four(const Element* const* rows, const float* values, int64_t size, float* to) {
  int64_t k = 0;
  for (; k + kLanes <= size; k += kLanes) {
    Vector sum = load(to + k);
    for (int i = 0; i < 4; ++i) sum += values[i] * load(rows[i] + k);
    store(to + k, sum);
  }
  for (; k < size; ++k) {
    for (int i = 0; i < 4; ++i) to[k] += values[i] * widened(rows[i][k]);
  }
}

float dense_value(const SparseRows& from, int64_t r, int64_t column) {
  const float* row = from.rows + r * from.stride;
  return from.dense_is_bfloat16 ? widened(reinterpret_cast<const uint16_t*>(row)[column]) : row[column];
}

// to += sum over columns [begin, end) of a dense row's value * row of the head
template <class Element>
void add_dense(const RoundingHead& head, const SparseRows& from, int64_t r, int64_t begin, int64_t end, float* to) {
  for (int64_t j = begin; j < end; j += 4) {
    const Element* rows[4];
    float by[4];
    for (int k = 0; k < 4; ++k) {
      const bool inside = j + k < end;
      rows[k] = static_cast<const Element*>(head.weight) + (inside ? j + k : j) * head.hidden;
      by[k] = inside ? dense_value(from, r, j + k) : 0.0f;
    }
    add_four(rows, by, head.hidden, to);
  }
}

// Elements [k, k + kWide kLanes) of to += sum over entries [first, last) of value * row of the head, in registers.
template <int kWide, class Element>
SELFDISTILL_FN void add_entries_part(const RoundingHead& head, const int32_t* columns, const float* values, int32_t first,
                                     int32_t last, float* to, int64_t k) {
  Vector sums[kWide];
  for (int i = 0; i < kWide; ++i) sums[i] = load(to + k + i * kLanes);
  for (int32_t e = first; e < last; ++e) {
    const Element* row = static_cast<const Element*>(head.weight) + columns[e] * head.hidden + k;
    for (int i = 0; i < kWide; ++i) sums[i] += values[e] * load(row + i * kLanes);
  }
  for (int i = 0; i < kWide; ++i) store(to + k + i * kLanes, sums[i]);
}

template <class Element>
void add_entries(const RoundingHead& head, const int32_t* columns, const float* values, int32_t first, int32_t last,
                 float* to) {
  int64_t k = 0;
  for (; k + 12 * kLanes <= head.hidden; k += 12 * kLanes) {
    add_entries_part<12, Element>(head, columns, values, first, last, to, k);
  }
  for (; k + 4 * kLanes <= head.hidden; k += 4 * kLanes) {
    add_entries_part<4, Element>(head, columns, values, first, last, to, k);
  }
  for (; k + kLanes <= head.hidden; k += kLanes) {
    add_entries_part<1, Element>(head, columns, values, first, last, to, k);
  }
  for (; k < head.hidden; ++k) {
    for (int32_t e = first; e < last; ++e) {
      to[k] += values[e] * widened(static_cast<const Element*>(head.weight)[columns[e] * head.hidden + k]);
    }
  }
}

template <class Element>
void sparse_hidden_gradient_of(const RoundingHead& head, const SparseRows& from, float* out, int64_t begin, int64_t end) {
  memset(out + begin * head.hidden, 0, (end - begin) * head.hidden * sizeof(float));
  // Slabs outermost: their rows of the head stay in the cache.
  for (int64_t slab = 0; slab < from.slabs; ++slab) {
    for (int64_t r = begin; r < end; ++r) {
      const int32_t* starts = from.starts + r * (from.slabs + 1);
      if (from.is_dense(r)) {
        const int64_t first = slab * from.slab, last = first + from.slab < head.columns ? first + from.slab : head.columns;
        if (from.with_dense) add_dense<Element>(head, from, r, first, last, out + r * head.hidden);
        continue;
      }
      const float* row = from.rows + r * from.stride;
      add_entries<Element>(head, reinterpret_cast<const int32_t*>(row), row + from.capacity, starts[slab], starts[slab + 1],
                           out + r * head.hidden);
    }
  }
  for (int64_t r = begin; r < end; ++r) {
    const int32_t* starts = from.starts + r * (from.slabs + 1);
    if (from.is_dense(r)) continue;
    const float* values = from.rows + r * from.stride + from.capacity;
    double total = 0.0;
    for (int32_t i = 0; i < starts[from.slabs]; ++i) total += values[i];
    for (int64_t k = 0; k < head.hidden; ++k) out[r * head.hidden + k] -= (float)total * head.centre[k];
  }
}

void sparse_hidden_gradient(const RoundingHead& head, const SparseRows& from, float* out, int64_t begin, int64_t end) {
  (head.is_bfloat16 ? sparse_hidden_gradient_of<uint16_t> : sparse_hidden_gradient_of<float>)(head, from, out, begin, end);
}

// Elements [k, k + kWide kLanes) of a row of dW, in registers; returns the sum of their squares.
template <int kWide, class In, class Out>
SELFDISTILL_FN Vector weight_gradient_part(const SparseProduct& p, const int32_t* rows, const float* values, int32_t first,
                                           int32_t last, const float* add, Out* out, int64_t k) {
  Vector sums[kWide], square{};
  for (int i = 0; i < kWide; ++i) sums[i] = add ? load(add + k + i * kLanes) : Vector{};
  for (int32_t e = first; e < last; ++e) {
    const In* row = static_cast<const In*>(p.hidden) + rows[e] * p.size + k;
    for (int i = 0; i < kWide; ++i) sums[i] += values[e] * load(row + i * kLanes);
  }
  for (int i = 0; i < kWide; ++i) {
    square += sums[i] * sums[i];
    store(out + k + i * kLanes, sums[i]);
  }
  return square;
}

template <class In, class Out>
double sparse_weight_gradient_of(const SparseProduct& p, const int32_t* starts, const int32_t* rows, const float* values,
                                 int64_t begin, int64_t end) {
  double squares = 0.0;
  for (int64_t j = begin; j < end; ++j) {
    Out* out = static_cast<Out*>(p.out) + j * p.size;
    const float* add = p.add ? p.add + j * p.size : nullptr;
    const int32_t first = starts[j - begin], last = starts[j - begin + 1];
    Vector square{};
    float tail = 0.0f;
    int64_t k = 0;
    for (; k + 12 * kLanes <= p.size; k += 12 * kLanes) {
      square += weight_gradient_part<12, In>(p, rows, values, first, last, add, out, k);
    }
    for (; k + 4 * kLanes <= p.size; k += 4 * kLanes) {
      square += weight_gradient_part<4, In>(p, rows, values, first, last, add, out, k);
    }
    for (; k + kLanes <= p.size; k += kLanes) {
      square += weight_gradient_part<1, In>(p, rows, values, first, last, add, out, k);
    }
    for (; k < p.size; ++k) {
      float sum = add ? add[k] : 0.0f;
      for (int32_t e = first; e < last; ++e) {
        sum += values[e] * widened(static_cast<const In*>(p.hidden)[rows[e] * p.size + k]);
      }
      tail += sum * sum;
      store(out + k, sum);
    }
    squares += sum_lanes(square) + tail;
  }
  return squares;
}

double sparse_weight_gradient(const SparseProduct& p, const int32_t* starts, const int32_t* rows, const float* values,
                              int64_t begin, int64_t end) {
  if (p.hidden_is_bfloat16) {
    return (p.out_is_bfloat16 ? sparse_weight_gradient_of<uint16_t, uint16_t> : sparse_weight_gradient_of<uint16_t, float>)(
        p, starts, rows, values, begin, end);
  }
  return sparse_weight_gradient_of<float, float>(p, starts, rows, values, begin, end);
}
