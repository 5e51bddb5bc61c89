// Which entries of a gradient may be large enough to stay when it is rounded, from logits alone: part of rows.inl.
//
// A bound on an entry that takes no exponential is compared with the logarithm of a random number; rounding.inl makes
// gradients of the entries that pass.

// ---- random numbers ---------------------------------------------------------------------------------------------------

enum Purpose : uint32_t { kSampling = 0x5bd1e995u, kRounding = 0 };

// What a row's numbers follow from: its key and the purpose they serve.
struct Stream {
  uint32_t low, high;

  Stream(int64_t key, uint32_t purpose) : low((uint32_t)key ^ purpose), high((uint32_t)((uint64_t)key >> 32)) {}
};

// Uniform in (0, 1], one for each column: the steps of MurmurHash3's finaliser (A. Appleby, public domain) around the key.
template <class B>
SELFDISTILL_FN auto uniform(B column, const Stream& stream) {
  B x = column * 0x9e3779b1u + stream.low;
  x ^= x >> 16;
  x *= 0x85ebca6bu;
  x += stream.high;
  x ^= x >> 13;
  x *= 0xc2b2ae35u;
  x ^= x >> 16;
  return to_float(x >> 1) * 0x1p-31f + 0x1p-32f;
}

// log2(x) + 127 up to its mantissa's bend: too small, by at most kBend, for normal x; 0 for 0.
static constexpr float kBend = 0.0861f;
template <class R>
SELFDISTILL_FN R bent_log2(R x) {
  return to_float(bits(x)) * 0x1p-23f;
}

// ---- bounds -----------------------------------------------------------------------------------------------------------

// |gradient_element| <= exp(level) * amplitude, each from logits without an exponential.
struct Bound {
  float token, entropy, divergence;  // sizes of the weights
  float rest, pivot;                 // of the divergence's own slope: multiple of |log-ratio|, and what is added
};

Bound make_bound(Divergence divergence, const GradientTerms& t) {
  Bound b{fabsf(t.token_weight), fabsf(t.entropy_weight), fabsf(t.divergence_weight), 1.0f, fabsf(t.pivot)};
  const float rest = 1.0f - t.beta;
  if (divergence == Divergence::kForwardKL) b.rest = 0.0f, b.pivot = 1.0f;
  if (divergence == Divergence::kJSD) b.rest = rest, b.pivot = rest * fabsf(t.pivot);
  // |kappa - p_t/m| with both between 0 and 1 / beta; |r - its mean| with log(p_s/m) no larger than the log-ratio.
  if (divergence == Divergence::kSkewKL) b.rest = 0.0f, b.pivot = rest / t.beta;
  if (divergence == Divergence::kSkewReverseKL) b.pivot = 1.0f + fabsf(t.pivot);
  return b;
}

// Above log2 of |gradient_element| + 127, by a hundredth or more.
template <Divergence kDivergence, bool kEntropyTerm, class R>
SELFDISTILL_FN R log2_bound(R student, R teacher, const GradientTerms& t, const Bound& b) {
  const R s = student - t.n.student;
  R level = s, amplitude = splat<R>(b.token);
  if constexpr (kEntropyTerm) amplitude += b.entropy * absolute(s - t.n.student_low + t.entropy);
  if constexpr (kDivergence == Divergence::kForwardKL) level = larger(s, teacher - t.n.teacher);
  if constexpr (kDivergence != Divergence::kNone) {
    if constexpr (kDivergence == Divergence::kForwardKL || kDivergence == Divergence::kSkewKL) {
      amplitude += b.divergence * b.pivot;
    } else {
      amplitude += b.divergence * (b.rest * absolute(log_ratio(student, teacher, t.n.ratio)) + b.pivot);
    }
  }
  return level * 0x1.715476p+0f + (bent_log2(amplitude) + (kBend + 0.01f));
}

// ---- candidates -------------------------------------------------------------------------------------------------------

// Stores the lanes where `condition` holds, one after the other; up to kLanes elements are written.
#if defined(__AVX512F__)
SELFDISTILL_FN uint32_t mask_of(VectorInt condition) { return _mm512_movepi32_mask((__m512i)condition); }
SELFDISTILL_FN void store_lanes(uint32_t mask, Vector v, void* to) {
  _mm512_storeu_ps(to, _mm512_maskz_compress_ps((__mmask16)mask, (__m512)v));
}
#elif defined(__AVX2__)
SELFDISTILL_FN uint32_t mask_of(VectorInt condition) { return _mm256_movemask_ps((__m256)condition); }
// For each mask the places of its bits, four bits of an integer each.
struct LanesOfMask {
  uint32_t places[256];
  constexpr LanesOfMask() : places() {
    for (uint32_t mask = 0; mask < 256; ++mask) {
      int count = 0;
      for (uint32_t lane = 0; lane < 8; ++lane) {
        if (mask >> lane & 1) places[mask] |= lane << (4 * count++);
      }
    }
  }
};
static constexpr LanesOfMask kLanesOfMask;
SELFDISTILL_FN void store_lanes(uint32_t mask, Vector v, void* to) {
  const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
  const __m256i places = _mm256_srlv_epi32(_mm256_set1_epi32((int)kLanesOfMask.places[mask]), shifts);
  _mm256_storeu_ps((float*)to, _mm256_permutevar8x32_ps((__m256)v, places));  // reads the lowest three bits
}
#else
SELFDISTILL_FN uint32_t mask_of(VectorInt condition) {
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= (uint32_t)(condition[i] != 0) << i;
  return mask;
}
SELFDISTILL_FN void store_lanes(uint32_t mask, Vector v, void* to) {
  float* next = static_cast<float*>(to);
  for (; mask; mask &= mask - 1) *next++ = v[__builtin_ctz(mask)];
}
#endif

// Columns that passed the bound, in ascending order.
struct Candidates {
  static constexpr int kRoom = 2 * kBlock + kLanes;  // a vector is written past the last
  float student[kRoom], teacher[kRoom], gradient[kRoom];
  float luck[kRoom];  // the random number, or for a sample log2 of the bound over its threshold, as bent_log2
  int32_t column[kRoom];
  int count = 0;
};

// 0, 1, 2, ...: the columns of a block, from its first on.
struct Places {
  int32_t at[kBlock];
  constexpr Places() : at() {
    for (int i = 0; i < kBlock; ++i) at[i] = i;
  }
};
static constexpr Places kPlaces;

SELFDISTILL_FN VectorBits load_columns(const int32_t* from) {
  VectorBits columns;
  memcpy(&columns, from, sizeof columns);
  return columns;
}

using Screen = void (*)(const float*, const float*, const int32_t*, int64_t, int64_t, const GradientTerms&, const Bound&,
                        float, bool, const Stream&, Candidates&);

// Of n logits those whose random number lies below their bound over the threshold; `room` is log2 of the threshold. Logit i
// is that of column columns[i] + j.
template <Divergence kDivergence, bool kEntropyTerm>
void screen(const float* student, const float* teacher, const int32_t* columns, int64_t j, int64_t n,
            const GradientTerms& terms, const Bound& bound, float room, bool is_sample, const Stream& stream,
            Candidates& found) {
  const GradientTerms own_terms = terms;  // what is written below cannot change a copy
  const Bound own_bound = bound;
  const Stream own_stream = stream;
  constexpr bool kTeacher = kDivergence != Divergence::kNone;
  int count = found.count;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vector s = load(student + i), t = kTeacher ? load(teacher + i) : Vector{};
    const Vector level = log2_bound<kDivergence, kEntropyTerm>(s, t, own_terms, own_bound) - room;
    const VectorBits column = load_columns(columns + i) + (uint32_t)j;
    const Vector number = uniform(column, own_stream);
    const uint32_t mask = mask_of(bent_log2(number) <= level);
    store_lanes(mask, at_least(s, kLowest), found.student + count);
    if constexpr (kTeacher) store_lanes(mask, at_least(t, kLowest), found.teacher + count);
    store_lanes(mask, is_sample ? level : number, found.luck + count);
    store_lanes(mask, from_bits(column), found.column + count);
    count += __builtin_popcount(mask);
  }
  for (; i < n; ++i) {
    const float s = student[i], t = kTeacher ? teacher[i] : 0.0f;
    const float level = log2_bound<kDivergence, kEntropyTerm>(s, t, terms, bound) - room;
    const int32_t column = columns[i] + (int32_t)j;
    const float number = uniform((uint32_t)column, stream);
    if (!(bent_log2(number) <= level)) continue;
    found.student[count] = at_least(s, kLowest);
    found.teacher[count] = at_least(t, kLowest);
    found.luck[count] = is_sample ? level : number;
    found.column[count++] = column;
  }
  found.count = count;
}

template <bool kEntropyTerm>
Screen screen_with(Divergence divergence) {
  switch (divergence) {
    case Divergence::kForwardKL:
      return screen<Divergence::kForwardKL, kEntropyTerm>;
    case Divergence::kReverseKL:
      return screen<Divergence::kReverseKL, kEntropyTerm>;
    case Divergence::kJSD:
      return screen<Divergence::kJSD, kEntropyTerm>;
    case Divergence::kSkewKL:
      return screen<Divergence::kSkewKL, kEntropyTerm>;
    case Divergence::kSkewReverseKL:
      return screen<Divergence::kSkewReverseKL, kEntropyTerm>;
    default:
      return screen<Divergence::kNone, kEntropyTerm>;
  }
}
