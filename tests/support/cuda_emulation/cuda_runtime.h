// Stands in for CUDA's header of this name, so that the sources under csrc/cuda compile with a plain C++ compiler and
// run on the CPU: blocks one after the other, the threads of a block as fibers that change only at barriers and warp
// functions. It shows wrong results, missing barriers (fibers run in the order that EMULATED_ORDER names: forward,
// reverse or shuffled) and barriers that not all threads reach; it does not show data races within a step, nor time.
// The file that EMULATED_LAUNCHES names gets a byte for each launch.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after the other

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1) : x(x) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};

namespace emulation {

enum class Waits { no, for_warp, for_block, done };

struct Fiber {
  jmp_buf place;
  std::unique_ptr<char[]> stack;
  Waits waits;
};

struct Machine {
  static constexpr size_t stack_bytes = 64 << 10;
  std::vector<Fiber> fibers;
  jmp_buf scheduler;
  std::function<void()> kernel;
  unsigned current = 0;
  uint64_t exchange[2][1024];  // what the lanes hand to each other; alternating, so that none is overwritten too early
  std::vector<unsigned> exchanges;
  dim3 block, thread, blocks, threads;
};

inline Machine machine;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated kernel: %s\n", what);
  std::abort();
}

inline void wait(Waits reason) {
  Fiber& fiber = machine.fibers[machine.current];
  fiber.waits = reason;
  if (!_setjmp(fiber.place)) _longjmp(machine.scheduler, 1);
}

// A fiber outlives its kernel and runs the next one; contexts, which cost a system call, are only used to make it.
inline void run_fiber() {
  while (true) {
    machine.kernel();
    wait(Waits::done);
  }
}

inline void resume(unsigned i) {
  machine.current = i;
  machine.thread.x = i;
  Fiber& fiber = machine.fibers[i];
  if (_setjmp(machine.scheduler)) return;
  if (fiber.stack) _longjmp(fiber.place, 1);
  fiber.stack.reset(new char[Machine::stack_bytes]);
  ucontext_t made, left;
  getcontext(&made);
  made.uc_stack.ss_sp = fiber.stack.get();
  made.uc_stack.ss_size = Machine::stack_bytes;
  made.uc_link = nullptr;
  makecontext(&made, run_fiber, 0);
  swapcontext(&left, &made);
}

// Lets the fibers from begin on go further if all of them wait for the same.
inline bool release(unsigned begin, unsigned end, Waits reason) {
  for (unsigned i = begin; i < end; ++i) {
    if (machine.fibers[i].waits != reason) return false;
  }
  for (unsigned i = begin; i < end; ++i) machine.fibers[i].waits = Waits::no;
  return true;
}

inline void run_block(const std::vector<unsigned>& order) {
  const unsigned count = machine.threads.x;
  if (machine.fibers.size() < count) machine.fibers.resize(count);
  machine.exchanges.assign(count, 0);
  for (unsigned i = 0; i < count; ++i) machine.fibers[i].waits = Waits::no;
  while (true) {
    for (const unsigned i : order) {
      if (machine.fibers[i].waits == Waits::no) resume(i);
    }
    if (std::all_of(machine.fibers.begin(), machine.fibers.begin() + count,
                    [](const Fiber& fiber) { return fiber.waits == Waits::done; })) {
      return;
    }
    bool released = release(0, count, Waits::for_block);
    for (unsigned warp = 0; warp < count; warp += 32) {
      released |= release(warp, std::min(warp + 32, count), Waits::for_warp);
    }
    if (!released) fail("a barrier or warp function was not reached by all threads");
  }
}

inline std::vector<unsigned> order_of(unsigned count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  const char* named = std::getenv("EMULATED_ORDER");
  const std::string name = named ? named : "forward";
  if (name == "reverse") std::reverse(order.begin(), order.end());
  if (name == "shuffled") std::shuffle(order.begin(), order.end(), std::mt19937(count));
  return order;
}

inline void count_launch() {
  if (const char* path = std::getenv("EMULATED_LAUNCHES")) {
    std::FILE* file = std::fopen(path, "a");
    if (!file) fail("EMULATED_LAUNCHES cannot be written");
    std::fputc('.', file);
    std::fclose(file);
  }
}

// Every lane's value, once all lanes of the warp have given theirs.
template <class T>
T from_lane(T value, unsigned lane) {
  static_assert(sizeof(T) <= 8, "at most 64 bits");
  const unsigned thread = machine.current, first = thread / 32 * 32;
  const unsigned side = machine.exchanges[thread]++ % 2;
  if (lane >= 32) fail("no such lane");
  std::memcpy(&machine.exchange[side][thread], &value, sizeof value);
  wait(Waits::for_warp);
  T other;
  std::memcpy(&other, &machine.exchange[side][first + lane], sizeof other);
  return other;
}

}  // namespace emulation

#define threadIdx (emulation::machine.thread)
#define blockIdx (emulation::machine.block)

inline void __syncthreads() { emulation::wait(emulation::Waits::for_block); }

template <class T>
T __shfl_sync(unsigned, T value, unsigned lane) {
  return emulation::from_lane(value, lane);
}
template <class T>
T __shfl_up_sync(unsigned, T value, unsigned offset) {
  const unsigned lane = emulation::machine.current % 32;
  return emulation::from_lane(value, lane >= offset ? lane - offset : lane);
}
inline bool __any_sync(unsigned, bool mine) {
  const unsigned thread = emulation::machine.current, first = thread / 32 * 32;
  const unsigned side = emulation::machine.exchanges[thread] % 2;
  emulation::from_lane(uint64_t{mine}, 0);
  bool any = false;
  for (unsigned i = 0; i < 32; ++i) any |= emulation::machine.exchange[side][first + i] != 0;
  return any;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

template <class T>
T atomicAdd(T* at, T value) {
  const T old = *at;
  *at += value;
  return old;
}
template <class T>
T atomicMin(T* at, T value) {
  const T old = *at;
  *at = std::min(old, value);
  return old;
}

template <class To, class From>
To emulated_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline float __uint_as_float(unsigned bits) { return emulated_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return emulated_cast<unsigned>(value); }
inline double __longlong_as_double(long long bits) { return emulated_cast<double>(bits); }
inline long long __double_as_longlong(double value) { return emulated_cast<long long>(value); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __double2float_rn(double a) { return static_cast<float>(a); }
template <class T>
T __ldg(const T* from) {
  if (reinterpret_cast<uintptr_t>(from) % alignof(T)) emulation::fail("a vector is not aligned");
  return *from;
}
using std::max;
using std::min;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream = nullptr;
};

inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaSuccess"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  if (bytes) std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  if (bytes) std::memset(to, value, bytes);
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  emulation::count_launch();
  emulation::Machine& machine = emulation::machine;
  machine.kernel = [&] { kernel(arguments...); };
  machine.blocks = config->gridDim;
  machine.threads = config->blockDim;
  const auto threads = emulation::order_of(machine.threads.x);
  for (const unsigned block : emulation::order_of(machine.blocks.x)) {
    machine.block = dim3(block);
    emulation::run_block(threads);
  }
  return cudaSuccess;
}
