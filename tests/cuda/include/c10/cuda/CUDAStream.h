// In place of torch's header on a machine without CUDA (see tests/cuda/emulation.h): there are no streams.
#pragma once

struct CUstream_st;

namespace c10::cuda {

struct CUDAStream {
  CUstream_st* stream() const { return nullptr; }
};
inline CUDAStream getCurrentCUDAStream() { return {}; }

}  // namespace c10::cuda
