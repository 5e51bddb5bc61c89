// One wave of 64 lanes: its registers, how an instruction names operands, and how lanes read and write
// them. Layouts are shared with program.py (Instruction) and execute.py (Wave).
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 64
#define ALL_LANES (~0ull)
#define EACH_LANE(mask) for (int lane = 0; lane < LANES; lane++) if ((mask) >> lane & 1)

// Operand codes: 0..255 are the scalar operands of the instruction set (registers, VCC, EXEC, inline
// constants), 256..511 vector registers, 512..767 accumulation registers.
enum { VCC = 106, M0 = 124, EXEC = 126, VCC_IS_ZERO = 251, EXEC_IS_ZERO = 252, SCC = 253, LITERAL = 255 };
enum { SCALARS = 256, VECTORS = 512 };
enum { NO_OPERAND = -1 };

typedef struct {
    int32_t operation;
    int32_t to, scalar_to;       // operand code of the result, and of a mask beside it
    int32_t source[3];           // operand codes
    int32_t negate, absolute;    // bit k: of source k
    int32_t negate_high;         // packed and mixed operations: of the upper halves
    int32_t select, select_high; // op_sel and op_sel_hi, bit k: of source k
    int32_t clamp, scale;        // of a float result: to [0, 1]; scale 1, 2, 3: times 2, 4, 1/2
    int32_t part[2];             // SDWA: which part of source k; PART_WHOLE otherwise
    int32_t extend[2];           // SDWA: with its sign
    int32_t part_to, part_rest;  // SDWA: part of the result; the rest is 0 zero, 2 kept
    int32_t cross;               // DPP: index of Program.cross, or -1
    int32_t offset, offset_high; // bytes; of the second of two LDS accesses; target of a branch
    int32_t size;                // bytes of an access, of a lane or of one of two; rows of a matrix tile
    int32_t depth;               // of a matrix product
    int32_t kind;                // of a comparison, or dtype of matrix operands
    int32_t condition;           // of a comparison; truth table of V_BITOP3
    int32_t half;                // 16-bit access to half a register: 1 lower, 2 upper; 0 whole registers
    int32_t signed_load, to_lds;
    int32_t next;                // index of the instruction behind
    uint32_t literal;
} Instruction;

// Where each lane reads under one DPP control, and which lanes write.
typedef struct {
    uint64_t writes;
    int8_t from[LANES];          // -1 reads zero
} Cross;

typedef struct {
    uint64_t first, last;        // a tensor's bytes
    uint64_t *seen;              // Access of each of them (accesses.h)
} Tensor;

typedef struct {
    const Instruction *code;
    const Cross *cross;
    uint64_t *hits;              // executions of each instruction
    int32_t removed_barrier;     // index of a barrier that orders nothing, or -1
} Program;

typedef struct {
    uint32_t *vectors;           // [512, 64] vector registers, accumulation registers behind them
    uint32_t *scalars;           // [256] with the inline constants in their places
    uint8_t *lds;
    uint64_t *lds_seen;          // Access of each byte of the LDS
    const Tensor *tensors;
    uint64_t tensor_count, lds_size;
    uint64_t executed, outside;  // instructions; lanes that a buffer's bounds left out
    uint64_t fault_address;
    int32_t scc, counter;        // scalar condition; index of the next instruction
    int32_t state, fault_counter;
    int32_t group, wave, epoch;  // this wave's place, and barriers passed (accesses.h)
} Wave;

enum { RUNNING, AT_BARRIER, FINISHED, OUT_OF_BUDGET, BAD_ADDRESS, BAD_LDS_ADDRESS, BAD_OPERATION, RACE };

static inline float as_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t bits_of(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
static inline double as_double(uint64_t bits) { double x; memcpy(&x, &bits, 8); return x; }
static inline uint64_t bits_of_double(double x) { uint64_t bits; memcpy(&bits, &x, 8); return bits; }
static inline uint64_t join(uint32_t low, uint32_t high) { return (uint64_t)high << 32 | low; }

static inline uint32_t *registers(const Wave *wave, int code) { return wave->vectors + (code - SCALARS) * LANES; }
static inline uint64_t pair(const Wave *wave, int code) { return join(wave->scalars[code], wave->scalars[code + 1]); }
static inline void set_pair(Wave *wave, int code, uint64_t value)
{
    wave->scalars[code] = (uint32_t)value;
    wave->scalars[code + 1] = (uint32_t)(value >> 32);
}
static inline int is_float_constant(int code) { return code >= 240 && code <= 248; }

static inline uint32_t scalar(const Wave *wave, const Instruction *at, int k)
{
    int code = at->source[k];
    switch (code) {
    case LITERAL: return at->literal;
    case VCC_IS_ZERO: return pair(wave, VCC) == 0;
    case EXEC_IS_ZERO: return pair(wave, EXEC) == 0;
    case SCC: return wave->scc;
    default: return wave->scalars[code];
    }
}

// A 64-bit scalar operand. Integer constants carry their sign; those of floats are doubles.
static inline uint64_t scalar_pair(const Wave *wave, const Instruction *at, int k, int literal_is_high)
{
    int code = at->source[k];
    if (code == LITERAL) return literal_is_high ? join(0, at->literal) : (uint64_t)(int64_t)(int32_t)at->literal;
    if (code < 128) return pair(wave, code);
    if (is_float_constant(code)) return bits_of_double((double)as_float(wave->scalars[code]));
    return (uint64_t)(int64_t)(int32_t)scalar(wave, at, k);
}

enum { PART_WORD = 4, PART_WHOLE = 6 }; // SDWA: 0..3 bytes, 4..5 words, 6 everything

static inline uint32_t part_of(uint32_t value, int part, int extend)
{
    if (part == PART_WHOLE) return value;
    if (part < PART_WORD) {
        value = value >> 8 * part & 0xff;
        return extend ? (uint32_t)(int32_t)(int8_t)value : value;
    }
    value = value >> 16 * (part - PART_WORD) & 0xffff;
    return extend ? (uint32_t)(int32_t)(int16_t)value : value;
}

// What a lane reads as source k, before the modifiers of floats.
static inline uint32_t lane_bits(const Wave *wave, const Program *program, const Instruction *at, int k, int lane)
{
    int code = at->source[k];
    if (code < SCALARS) {
        uint32_t value = scalar(wave, at, k);
        return k < 2 ? part_of(value, at->part[k], at->extend[k]) : value;
    }
    if (k == 0 && at->cross >= 0) {
        lane = program->cross[at->cross].from[lane];
        if (lane < 0) return 0;
    }
    uint32_t value = registers(wave, code)[lane];
    return k < 2 ? part_of(value, at->part[k], at->extend[k]) : value;
}

static inline uint64_t lane_pair(const Wave *wave, const Instruction *at, int k, int lane, int literal_is_high)
{
    int code = at->source[k];
    if (code < SCALARS) return scalar_pair(wave, at, k, literal_is_high);
    const uint32_t *low = registers(wave, code);
    return join(low[lane], low[LANES + lane]);
}

static inline uint32_t modified(const Instruction *at, uint32_t bits, int k)
{
    if (at->absolute >> k & 1) bits &= 0x7fffffff;
    if (at->negate >> k & 1) bits ^= 0x80000000;
    return bits;
}

static inline uint64_t modified_pair(const Instruction *at, uint64_t bits, int k)
{
    if (at->absolute >> k & 1) bits &= ~(1ull << 63);
    if (at->negate >> k & 1) bits ^= 1ull << 63;
    return bits;
}

static inline double result_of(const Instruction *at, double value)
{
    static const double factors[] = {1.0, 2.0, 4.0, 0.5};
    value *= factors[at->scale];
    if (at->clamp) value = value != value || value < 0 ? 0 : value > 1 ? 1 : value;
    return value;
}

// All results are computed before the first is written: a lane may read what another one writes.
static inline void write_lanes(Wave *wave, const Instruction *at, uint64_t mask, const uint32_t *values)
{
    uint32_t *to = registers(wave, at->to);
    EACH_LANE(mask) {
        uint32_t value = values[lane];
        if (at->part_to != PART_WHOLE) {
            int is_byte = at->part_to < PART_WORD;
            int shift = is_byte ? 8 * at->part_to : 16 * (at->part_to - PART_WORD);
            uint32_t field = is_byte ? 0xff : 0xffff, rest = 0;
            if (at->part_rest == 2) rest = to[lane] & ~(field << shift);
            value = (value & field) << shift | rest;
        }
        to[lane] = value;
    }
}

static inline void write_lane_pairs(Wave *wave, const Instruction *at, uint64_t mask, const uint64_t *values)
{
    uint32_t *to = registers(wave, at->to);
    EACH_LANE(mask) {
        to[lane] = (uint32_t)values[lane];
        to[LANES + lane] = (uint32_t)(values[lane] >> 32);
    }
}
