// What the instruction set defines about numbers: bit fields, 16-bit floats, comparisons, division.
#pragma once
#include "wave.h"

static inline uint32_t reversed(uint32_t value)
{
    uint32_t result = 0;
    for (int k = 0; k < 32; k++) result |= (value >> k & 1) << (31 - k);
    return result;
}

static inline uint32_t unsigned_field(uint32_t value, int first, int width)
{
    return width == 0 ? 0 : (uint32_t)((value >> first) & ((1ull << width) - 1));
}

static inline uint32_t signed_field(uint32_t value, int first, int width)
{
    if (width == 0) return 0;
    if (first + width >= 32) return (uint32_t)((int32_t)value >> first);
    return (uint32_t)((int32_t)(value << (32 - width - first)) >> (32 - width));
}

// Each byte of `which` names a byte of high:low, a byte of signs, or a constant.
static inline uint32_t permuted(uint32_t high, uint32_t low, uint32_t which)
{
    uint64_t bytes = join(low, high);
    uint32_t result = 0;
    for (int k = 0; k < 4; k++) {
        uint32_t name = which >> 8 * k & 0xff, byte;
        if (name < 8) byte = bytes >> 8 * name & 0xff;
        else if (name < 12) byte = bytes >> (16 * (name - 8) + 15) & 1 ? 0xff : 0;
        else byte = name == 12 ? 0 : 0xff;
        result |= byte << 8 * k;
    }
    return result;
}

static inline uint32_t truth_table(int table, uint32_t a, uint32_t b, uint32_t c)
{
    uint32_t result = 0;
    for (int k = 0; k < 8; k++)
        if (table >> k & 1) result |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
    return result;
}

static inline uint32_t half_of(uint32_t value, int upper) { return upper ? value >> 16 : value & 0xffff; }

static inline float from_float16(uint32_t bits)
{
    int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    float size = exponent == 0 ? ldexpf((float)mantissa, -24)
               : exponent < 31 ? ldexpf((float)(1024 + mantissa), exponent - 25)
               : mantissa ? NAN : INFINITY;
    return bits >> 15 & 1 ? -size : size;
}

// To nearest even; a float's exponent is 112 more than that of float16.
static inline uint32_t to_float16(float value)
{
    uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return sign | 0x7e00;
    if (size >= 0x477ff000) return sign | 0x7c00;                                       // 65520 and more
    if (size < 0x38800000) return sign | (uint32_t)lrintf(as_float(size) * 16777216.0f); // below 2^-14
    return sign | (((size + 0xfff + (size >> 13 & 1)) >> 13) - (112 << 10));
}

static inline uint32_t to_bfloat16(uint32_t bits)
{
    if ((bits & 0x7fffffff) > 0x7f800000) return bits >> 16 | 0x40;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static inline int32_t to_int32(double value)
{
    if (value != value) return 0;
    return value >= 2147483647.0 ? INT32_MAX : value <= -2147483648.0 ? INT32_MIN : (int32_t)value;
}

static inline uint32_t to_uint32(double value)
{
    if (value != value || value <= 0) return 0;
    return value >= 4294967295.0 ? UINT32_MAX : (uint32_t)value;
}

// The number where one of the two is NaN; -0 is less than +0.
static inline double larger(double a, double b)
{
    if (a != a || b != b) return a != a ? b : a;
    return a == b ? (signbit(a) ? b : a) : a > b ? a : b;
}
static inline double smaller(double a, double b) { return -larger(-a, -b); }

static inline double median(double a, double b, double c)
{
    return larger(smaller(a, b), smaller(larger(a, b), c));
}

// Conditions of V_CMP by number: bit 0 less, bit 1 equal, bit 2 greater; from 8 on their negations, which
// hold for NaN. 7 asks whether both are numbers.
static inline int compare_floats(int condition, double a, double b)
{
    int ordered = a == a && b == b;
    int relation = !ordered ? 0 : a < b ? 1 : a == b ? 2 : 4;
    return condition < 8 ? (condition & relation) != 0 : ((15 - condition) & relation) == 0;
}

static inline int compare_signed(int condition, int64_t a, int64_t b)
{
    return (condition & (a < b ? 1 : a == b ? 2 : 4)) != 0;
}
static inline int compare_unsigned(int condition, uint64_t a, uint64_t b)
{
    return (condition & (a < b ? 1 : a == b ? 2 : 4)) != 0;
}

// V_CMP_CLASS: bits of `classes` from 0: signalling NaN, NaN, -inf, -normal, -subnormal, -0, +0, ...
static inline int is_class(double value, int is_subnormal, int is_quiet, uint32_t classes)
{
    int kind;
    if (value != value) kind = is_quiet;
    else {
        int size = isinf(value) ? 3 : is_subnormal ? 1 : value == 0 ? 0 : 2;
        kind = signbit(value) ? 5 - size : 6 + size;
    }
    return classes >> kind & 1;
}

static inline int exponent_of(float value) { return bits_of(value) >> 23 & 255; }
static inline int exponent_of_double(double value) { return bits_of_double(value) >> 52 & 2047; }

// One dtype's numbers for the three steps of a division.
typedef struct { double least_normal; int near_overflow, shift, least_exponent, underflow, top_exponent; } Format;
static const Format FLOAT = {0x1p-126, 96, 64, 23, -150, 255};
static const Format DOUBLE = {0x1p-1022, 768, 128, 53, -1075, 2047};

// V_DIV_SCALE: numerator or denominator (`value` is one of them), scaled so that the steps stay in range;
// `rescale` is told when V_DIV_FMAS has to undo it. Exponents are those of the two operands' bits.
static inline double division_scaled(Format format, double value, double below, double above, int exponent_below,
                                     int exponent_above, int *rescale)
{
    *rescale = 0;
    if (below == 0 || above == 0) return NAN;
    double up = ldexp(value, format.shift), inverse = fabs(1 / below), quotient = fabs(above / below);
    if (exponent_above - exponent_below >= format.near_overflow) {
        *rescale = 1;
        return value == below ? up : value;
    }
    if (exponent_below == 0) return up;
    int inverse_small = inverse < format.least_normal, quotient_small = quotient < format.least_normal;
    if (inverse_small && quotient_small) {
        *rescale = 1;
        return value == below ? up : value;
    }
    if (inverse_small) return ldexp(value, -format.shift);
    if (quotient_small) {
        *rescale = 1;
        return value == above ? up : value;
    }
    return exponent_above <= format.least_exponent ? up : value;
}

// V_DIV_FIXUP: the quotient where it is a number, and the special cases.
static inline double division_fixed(Format format, double quotient, double below, double above, int exponent_below,
                                    int exponent_above)
{
    double sign = signbit(below) != signbit(above) ? -1.0 : 1.0;
    if (above != above) return above;
    if (below != below) return below;
    if ((below == 0 && above == 0) || (isinf(below) && isinf(above))) return NAN;
    if (below == 0 || isinf(above)) return sign * INFINITY;
    if (isinf(below) || above == 0) return sign * 0.0;
    if (exponent_above - exponent_below < format.underflow) return sign * 0.0;
    if (exponent_below == format.top_exponent || quotient != quotient) return sign * INFINITY;
    return sign * fabs(quotient);
}
