// The names of CUDA on the host: csrc/cuda/*.cu compile with this header before them (g++ -x c++ -include emulation.h),
// and a block runs as one fibre a thread.
//
// A fibre runs until it reaches a barrier or a shuffle; then the next one runs, in an order shuffled anew by
// SELFDISTILL_EMULATION_SEED at every turn, so that a result that depends on the order of threads shows as other bits. A barrier opens
// when all threads of the block that still run have come, a shuffle when all lanes of the warp have: anything else (a
// barrier in a divergent branch, a shuffle without all its lanes) ends the process with a message.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <tuple>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // the threads of a block share it, and blocks run one after the other

struct Dimensions {
  unsigned x = 1;
};
inline Dimensions threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 << 10;

enum class Waits { kNo, kBlock, kWarp, kDone };

// A fibre lives as long as the process and runs one thread of every block. It is entered by setcontext once; afterwards
// _setjmp and _longjmp switch, because they make no system calls, where swapcontext makes one each time.
struct Fibre {
  ucontext_t context;  // of the entry
  jmp_buf state;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool started = false;
  Waits waits = Waits::kNo;
  int line = 0;  // of the barrier or shuffle
  uint64_t given = 0, taken = 0;  // a shuffle's value and its lane's answer
  int lane_mask = 0;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
#endif
};

struct Block {
  std::deque<Fibre> fibres;  // as many as the largest block has needed; they stay where they are
  size_t threads = 0;
  jmp_buf scheduler;
  Fibre* current = nullptr;
  std::function<void()> body;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_size = 0;
#endif
};
inline Block block;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulation: block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, what);
  std::abort();
}

// From a fibre back to the scheduler.
inline void suspend(Waits waits) {
  Fibre* const self = block.current;
  self->waits = waits;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&self->fake_stack, block.scheduler_stack, block.scheduler_size);
#endif
  if (_setjmp(self->state) == 0) _longjmp(block.scheduler, 1);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self->fake_stack, nullptr, nullptr);
#endif
}

inline void enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack, &block.scheduler_size);
#endif
  for (;;) {
    block.body();
    suspend(Waits::kDone);
  }
}

[[noreturn]] inline void start(Fibre& fibre) {
  fibre.started = true;
  getcontext(&fibre.context);
  fibre.context.uc_stack.ss_sp = fibre.stack.get();
  fibre.context.uc_stack.ss_size = kStack;
  fibre.context.uc_link = nullptr;
  makecontext(&fibre.context, enter, 0);
  setcontext(&fibre.context);
  fail("setcontext failed");
}

inline void resume(size_t thread) {
  Fibre& fibre = block.fibres[thread];
  fibre.waits = Waits::kNo;
  block.current = &fibre;
  threadIdx.x = (unsigned)thread;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&block.fake_stack, fibre.stack.get(), kStack);
#endif
  if (_setjmp(block.scheduler) == 0) {
    if (fibre.started) _longjmp(fibre.state, 1);
    start(fibre);
  }
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(block.fake_stack, nullptr, nullptr);
#endif
}

// Lets warps whose lanes have all reached one shuffle go on; then, when nobody else can run, the whole block.
inline void release() {
  std::deque<Fibre>& all = block.fibres;
  bool released = false;
  for (size_t first = 0; first < block.threads; first += kWarp) {
    bool complete = true;
    for (size_t i = first; i < first + kWarp; ++i) {
      complete &= all[i].waits == Waits::kWarp && all[i].line == all[first].line && all[i].lane_mask == all[first].lane_mask;
    }
    if (!complete) continue;
    for (size_t i = first; i < first + kWarp; ++i) {
      all[i].taken = all[first + ((i - first) ^ (size_t)all[i].lane_mask)].given;
    }
    for (size_t i = first; i < first + kWarp; ++i) all[i].waits = Waits::kNo;
    released = true;
  }
  if (released) return;
  int line = 0;
  for (size_t i = 0; i < block.threads; ++i) {
    if (all[i].waits == Waits::kDone) continue;
    if (all[i].waits == Waits::kWarp) fail("a shuffle that not all lanes of the warp reach");
    if (line && all[i].line != line) fail("threads wait at different barriers");
    line = all[i].line;
  }
  for (size_t i = 0; i < block.threads; ++i) {
    if (all[i].waits == Waits::kBlock) all[i].waits = Waits::kNo;
  }
}

inline void run_block(int threads, std::mt19937_64& random, bool shuffled) {
  std::deque<Fibre>& all = block.fibres;
  if (threads % kWarp != 0) fail("a block is made of whole warps here");
  block.threads = (size_t)threads;
  while (all.size() < block.threads) all.emplace_back();
  std::vector<size_t> order(block.threads);
  for (size_t i = 0; i < block.threads; ++i) {
    order[i] = i;
    all[i].waits = Waits::kNo;
  }
  for (;;) {
    if (shuffled) {
      for (size_t i = order.size() - 1; i > 0; --i) std::swap(order[i], order[random() % (i + 1)]);
    }
    bool ran = false, alive = false;
    for (size_t thread : order) {
      if (all[thread].waits == Waits::kNo) {
        resume(thread);
        ran = true;
      }
      alive |= all[thread].waits != Waits::kDone;
    }
    if (!alive) return;
    if (ran) release();
  }
}

template <class Kernel, class... Arguments>
void run(Kernel kernel, int64_t blocks, int threads, const Arguments&... arguments) {
  const char* const seed = std::getenv("SELFDISTILL_EMULATION_SEED");
  std::mt19937_64 random(seed ? std::strtoull(seed, nullptr, 10) : 0);
  blockDim.x = (unsigned)threads;
  gridDim.x = (unsigned)blocks;
  std::vector<int64_t> order((size_t)blocks);
  for (int64_t i = 0; i < blocks; ++i) order[(size_t)i] = i;
  if (seed) {
    for (size_t i = order.size(); i-- > 1;) std::swap(order[i], order[random() % (i + 1)]);
  }
  block.body = [&] { kernel(arguments...); };
  for (const int64_t index : order) {
    blockIdx.x = (unsigned)index;
    run_block(threads, random, seed != nullptr);
  }
}

inline uint64_t exchange(uint64_t value, int lane_mask, int line) {
  Fibre* const self = block.current;
  self->given = value;
  self->lane_mask = lane_mask;
  self->line = line;
  suspend(Waits::kWarp);
  return self->taken;
}

}  // namespace emulation

// The line tells one barrier, and one shuffle, from another.
inline void __syncthreads(int line = __builtin_LINE()) {
  emulation::block.current->line = line;
  emulation::suspend(emulation::Waits::kBlock);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int line = __builtin_LINE()) {
  if (mask != 0xffffffffu) emulation::fail("a shuffle with some lanes only");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = emulation::exchange(bits, lane_mask, line);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

namespace selfdistill::cuda {

template <class... Parameters, class... Arguments, class Stream>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, int threads, Stream, const Arguments&... arguments) {
  emulation::run(kernel, blocks, threads, arguments...);
  return nullptr;
}

}  // namespace selfdistill::cuda
