// Runs one wave until a barrier, its end, a fault, or until a budget of instructions is spent.
// The operations are in scalar.inc, vector.inc, float.inc, memory.inc and matrix.inc; program.py reads
// their names from there and writes operations.h, one OP_<name> each.
#include "accesses.h"
#include "numbers.h"
#include "operations.h"

enum { KIND_F32, KIND_F64, KIND_I32, KIND_U32, KIND_I64, KIND_U64, KIND_I16, KIND_U16, KIND_CLASS_F32, KIND_CLASS_F64,
       KIND_BF16, KIND_F16 };

// Carries and choices: one bit a lane.
static inline uint64_t mask_operand(const Wave *wave, const Instruction *at) { return scalar_pair(wave, at, 2, 0); }

static inline uint32_t packed_source(const Wave *wave, const Instruction *at, int k, int high, int lane)
{
    int code = at->source[k];
    if (code >= SCALARS) return registers(wave, code + high)[lane];
    return code < 128 ? wave->scalars[code + high] : scalar(wave, at, k);
}

static inline double double_at(const Wave *wave, int code, int lane)
{
    return as_double(join(registers(wave, code)[lane], registers(wave, code + 1)[lane]));
}

static inline float normal_or_zero(float value) { return fabsf(value) < 0x1p-126f ? copysignf(0, value) : value; }

// Hardware gives about 27 bits; code that refines them must not rely on more.
static inline double estimate(double value)
{
    return isfinite(value) ? as_double(bits_of_double(value) & ~((1ull << 25) - 1)) : value;
}

static inline double mantissa_of(double value)
{
    int exponent;
    return isfinite(value) ? frexp(value, &exponent) : value;
}

static inline uint32_t binary_exponent(double value)
{
    int exponent = 0;
    if (isfinite(value) && value != 0) frexp(value, &exponent);
    return (uint32_t)exponent;
}

static inline void stored_words(const Wave *wave, const Instruction *at, int code, int lane, uint32_t *words)
{
    for (int k = 0; k < (at->size + 3) / 4; k++) words[k] = registers(wave, code + k)[lane];
    if (at->half == 2) words[0] >>= 16;
}

static inline void load_lanes(Wave *wave, const Instruction *at, uint64_t mask, uint32_t values[LANES][4], int words)
{
    EACH_LANE(mask) {
        uint32_t first = values[lane][0], old = registers(wave, at->to)[lane];
        if (at->signed_load) first = (uint32_t)(at->size == 1 ? (int32_t)(int8_t)first : (int32_t)(int16_t)first);
        if (at->half == 1) first = (old & 0xffff0000) | (first & 0xffff);
        if (at->half == 2) first = first << 16 | (old & 0xffff);
        registers(wave, at->to)[lane] = first;
        for (int k = 1; k < words; k++) registers(wave, at->to + k)[lane] = values[lane][k];
    }
}

void run_wave(Wave *wave, const Program *program, int64_t budget)
{
    wave->state = RUNNING;
    while (budget-- > 0) {
        const Instruction *at = program->code + wave->counter;
        int next = at->next;
        wave->fault_counter = wave->counter;
        program->hits[wave->counter]++;
        wave->executed++;
        uint64_t mask = pair(wave, EXEC);
        if (at->cross >= 0) mask &= program->cross[at->cross].writes;
        switch (at->operation) {
#define OP(name) case OP_##name:
#include "scalar.inc"
#include "vector.inc"
#include "float.inc"
#include "memory.inc"
#include "matrix.inc"
#undef OP
        default: wave->state = BAD_OPERATION; return;
        }
        wave->counter = next;
    }
    wave->state = OUT_OF_BUDGET;
}

// Layouts that program.py and execute.py repeat.
const int32_t sizes[] = {sizeof(Instruction), sizeof(Cross), sizeof(Tensor), sizeof(Program), sizeof(Wave)};
