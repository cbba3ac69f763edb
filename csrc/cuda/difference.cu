// The difference of two ascending lists: each value is looked up in the other list, and what is not there is moved
// together in order.
#include <cub/device/device_select.cuh>

#include "launch.cuh"
#include "operations.h"

namespace fastprune::cuda {
namespace {

constexpr size_t kCounter = 256;  // bytes in front of CUB's part of the workspace

struct NotAmong {
  const int64_t* values;
  int64_t size;

  __device__ __forceinline__ bool operator()(int64_t value) const {
    int64_t low = 0, high = size;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (values[middle] < value) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low == size || values[low] != value;
  }
};

void select(void* temporary, size_t& bytes, const int64_t* a, int64_t a_size, NotAmong not_among, int64_t* out,
            int64_t* count, cudaStream_t stream) {
  check(cub::DeviceSelect::If(temporary, bytes, a, out, count, a_size, not_among, stream),
        "difference: cub::DeviceSelect");
}

}  // namespace

size_t difference_workspace(int64_t a_size, int device) {
  check(cudaSetDevice(device), "difference: cudaSetDevice");
  size_t bytes = 0;
  select(nullptr, bytes, nullptr, a_size, {}, nullptr, nullptr, nullptr);
  return kCounter + bytes;
}

int64_t difference(const int64_t* a, int64_t a_size, const int64_t* b, int64_t b_size, int64_t* out,
                   Workspace workspace, int device, void* stream_address) {
  const auto stream = static_cast<cudaStream_t>(stream_address);
  workspace.require(difference_workspace(a_size, device));
  if (a_size == 0) return 0;
  int64_t count = 0;
  auto* counter = static_cast<int64_t*>(workspace.address);
  size_t bytes = workspace.bytes - kCounter;
  select(static_cast<char*>(workspace.address) + kCounter, bytes, a, a_size, {b, b_size}, out, counter, stream);
  check(cudaMemcpyAsync(&count, counter, sizeof count, cudaMemcpyDeviceToHost, stream),
        "difference: copy of the count");
  check(cudaStreamSynchronize(stream), "difference: cudaStreamSynchronize");
  return count;
}

}  // namespace fastprune::cuda
