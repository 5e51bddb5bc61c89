#include "pack.h"

#include <immintrin.h>

#include "vector.h"

namespace selfdistill {
namespace {

__mmask32 first(int64_t n) { return n >= 32 ? 0xffffffffu : n <= 0 ? 0u : (1u << n) - 1u; }

// A row of 32 values, 0 outside.
__m512i load_row(const uint16_t* from, int64_t n) { return _mm512_maskz_loadu_epi16(first(n), from); }

// 16 x 16 values of 32 bits.
void transpose16(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// a0 b0 a1 b1 ...: the first and the second 16 pairs of two rows.
struct Interleave {
  __m512i low, high;

  Interleave() {
    alignas(64) uint16_t order[2][32];
    for (int i = 0; i < 32; ++i) {
      for (int half = 0; half < 2; ++half) order[half][i] = (uint16_t)(16 * half + i / 2 + 32 * (i % 2));
    }
    low = _mm512_load_si512(order[0]);
    high = _mm512_load_si512(order[1]);
  }
  __m512i first16(__m512i a, __m512i b) const { return _mm512_permutex2var_epi16(a, low, b); }
  __m512i second16(__m512i a, __m512i b) const { return _mm512_permutex2var_epi16(a, high, b); }
};

}  // namespace

void pack_pairs(const uint16_t* from, int64_t stride, int64_t depth, int64_t columns, int64_t padded_depth, int64_t width,
                uint16_t* to) {
  const Interleave interleave;
  for (int64_t k = 0; k < padded_depth; k += 2) {
    for (int64_t panel = 0; panel < columns; panel += width) {
      uint16_t* pair = to + panel * padded_depth + k * width;
      for (int64_t n = panel; n < panel + width; n += 32, pair += 64) {
        const __m512i a = k < depth ? load_row(from + k * stride + n, columns - n) : _mm512_setzero_si512();
        const __m512i b = k + 1 < depth ? load_row(from + (k + 1) * stride + n, columns - n) : _mm512_setzero_si512();
        _mm512_storeu_si512(pair, interleave.first16(a, b));
        _mm512_storeu_si512(pair + 32, interleave.second16(a, b));
      }
    }
  }
}

void pack_pairs_transposed(const uint16_t* from, int64_t stride, int64_t columns, int64_t depth, int64_t padded_depth,
                           int64_t width, uint16_t* to) {
  __m512i block[16];
  for (int64_t n = 0; n < width; n += 16) {
    for (int64_t k = 0; k < padded_depth; k += 32) {
      for (int i = 0; i < 16; ++i) {
        block[i] = n + i < columns ? load_row(from + (n + i) * stride + k, depth - k) : _mm512_setzero_si512();
      }
      transpose16(block);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + (k / 2 + i) * 2 * width + 2 * n, block[i]);
    }
  }
}

void transpose(const uint16_t* from, int64_t stride, int64_t rows, int64_t columns, int64_t padded_rows, uint16_t* to) {
  const Interleave interleave;
  __m512i low[16], high[16];
  for (int64_t c = 0; c < columns; c += 32) {
    for (int64_t r = 0; r < padded_rows; r += 32) {
      for (int i = 0; i < 16; ++i) {
        const int64_t row = r + 2 * i;
        const __m512i a = row < rows ? load_row(from + row * stride + c, columns - c) : _mm512_setzero_si512();
        const __m512i b = row + 1 < rows ? load_row(from + (row + 1) * stride + c, columns - c) : _mm512_setzero_si512();
        low[i] = interleave.first16(a, b);
        high[i] = interleave.second16(a, b);
      }
      transpose16(low);
      transpose16(high);
      for (int i = 0; i < 16 && c + i < columns; ++i) _mm512_storeu_si512(to + (c + i) * padded_rows + r, low[i]);
      for (int i = 0; i < 16 && c + 16 + i < columns; ++i) {
        _mm512_storeu_si512(to + (c + 16 + i) * padded_rows + r, high[i]);
      }
    }
  }
}

void round_to_bfloat16(const float* from, int64_t count, uint16_t* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  for (; i < count; ++i) store(to + i, from[i]);
}

}  // namespace selfdistill
