// Who touched a byte last, so that two accesses which nothing orders are found when the second happens,
// whatever order the waves happened to run in. Two waves of a workgroup are ordered by a barrier between
// them, two workgroups by nothing.
#pragma once
#include "wave.h"

typedef union {
    struct { uint32_t written, read; } by; // stamps; 0 for nobody
    uint64_t all;
} Access;

// A stamp is a workgroup, the barriers that it had passed, and a wave.
enum { WAVE_BITS = 4, EPOCH_BITS = 16 };
#define SEVERAL_WAVES ((1u << WAVE_BITS) - 1)
#define SEVERAL_GROUPS (~0u)

static inline uint32_t stamp_of(const Wave *wave)
{
    return (uint32_t)(wave->group + 1) << (WAVE_BITS + EPOCH_BITS) | (uint32_t)wave->epoch << WAVE_BITS | wave->wave;
}

static inline int unordered(uint32_t stamp, uint32_t own)
{
    if (stamp == 0 || stamp == own) return 0;
    int other_group = stamp >> (WAVE_BITS + EPOCH_BITS) != own >> (WAVE_BITS + EPOCH_BITS);
    return other_group || stamp >> WAVE_BITS == own >> WAVE_BITS;
}

// Both return 0 for a race.
static inline int note_read(const Wave *wave, uint64_t *seen, uint64_t size)
{
    uint32_t own = stamp_of(wave);
    for (uint64_t k = 0; k < size; k++) {
        Access access = {.all = seen[k]};
        if (unordered(access.by.written, own)) return 0;
        uint32_t before = access.by.read;
        if (before == own || before == SEVERAL_GROUPS) continue;
        int same_group = before >> (WAVE_BITS + EPOCH_BITS) == own >> (WAVE_BITS + EPOCH_BITS);
        if (before != 0 && !same_group) access.by.read = SEVERAL_GROUPS;
        else access.by.read = before >> WAVE_BITS == own >> WAVE_BITS ? own | SEVERAL_WAVES : own;
        seen[k] = access.all;
    }
    return 1;
}

// Waves may write the same value to one place: replicas of a result do.
static inline int note_write(const Wave *wave, uint64_t *seen, uint64_t size, const uint8_t *old, const uint8_t *new)
{
    uint32_t own = stamp_of(wave);
    for (uint64_t k = 0; k < size; k++) {
        Access access = {.all = seen[k]};
        if (unordered(access.by.written, own) && old[k] != new[k]) return 0;
        if (unordered(access.by.read, own) && old[k] != new[k]) return 0;
        access.by.written = own;
        seen[k] = access.all;
    }
    return 1;
}

// The tensor that holds an access, or NULL. Addresses that no tensor of the launch holds are a fault.
static inline const Tensor *tensor_at(const Wave *wave, uint64_t address, uint64_t size)
{
    for (uint64_t k = 0; k < wave->tensor_count; k++) {
        const Tensor *tensor = wave->tensors + k;
        if (address >= tensor->first && address + size <= tensor->last) return tensor;
    }
    return NULL;
}

// Reads and writes of memory and LDS: 0, and the wave's state says why, where they must not happen.
static inline int fault(Wave *wave, int state, uint64_t address)
{
    wave->state = state;
    wave->fault_address = address;
    return 0;
}

static inline int access_memory(Wave *wave, uint64_t address, uint64_t size, void *into, const void *from)
{
    const Tensor *tensor = tensor_at(wave, address, size);
    if (!tensor || address % (size < 4 ? size : 4)) return fault(wave, BAD_ADDRESS, address);
    uint64_t *seen = tensor->seen + (address - tensor->first);
    void *bytes = (void *)address;
    if (from) {
        if (!note_write(wave, seen, size, bytes, from)) return fault(wave, RACE, address);
        memcpy(bytes, from, size);
    } else {
        if (!note_read(wave, seen, size)) return fault(wave, RACE, address);
        memcpy(into, bytes, size);
    }
    return 1;
}

static inline int access_lds(Wave *wave, uint64_t address, uint64_t size, void *into, const void *from)
{
    if (address + size > wave->lds_size || address % (size < 4 ? size : 4)) return fault(wave, BAD_LDS_ADDRESS, address);
    uint64_t *seen = wave->lds_seen + address;
    uint8_t *bytes = wave->lds + address;
    if (from) {
        if (!note_write(wave, seen, size, bytes, from)) return fault(wave, RACE, address);
        memcpy(bytes, from, size);
    } else {
        if (!note_read(wave, seen, size)) return fault(wave, RACE, address);
        memcpy(into, bytes, size);
    }
    return 1;
}
