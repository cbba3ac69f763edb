// What differs between compilers and machines: run-time dispatch, forced inlining, and threads with or without OpenMP.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <exception>

#ifdef _OPENMP
#include <omp.h>
#endif

// The inner loops are compiled for AVX-512, AVX2 and the baseline, and the loader picks one: a build moved to another
// machine still runs. It needs an ifunc-capable C library (glibc, defined by <cstdlib>); elsewhere, aarch64 and macOS
// included, there is one version, which is vectorised for the baseline of the platform.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define FASTPRUNE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTPRUNE_CLONES
#endif

// Inlined into a FASTPRUNE_CLONES function, so that templates are compiled for each of its targets as well.
#if defined(__GNUC__)
#define FASTPRUNE_INLINE inline __attribute__((always_inline))
#else
#define FASTPRUNE_INLINE inline
#endif

namespace fastprune {

// Calls body(part, begin, end) for at most `threads` contiguous ranges that cover [0, n), part 0 being the first range.
// An exception in a body (no memory, as a rule) is thrown again on the calling thread.
template <class Body>
void parallel_ranges(int64_t n, int threads, Body body) {
#ifdef _OPENMP
  if (threads > 1) {
    std::exception_ptr failure;
#pragma omp parallel num_threads(threads)
    {
      const int64_t part = omp_get_thread_num(), parts = omp_get_num_threads();
      try {
        body(static_cast<int>(part), n / parts * part + n % parts * part / parts,
             n / parts * (part + 1) + n % parts * (part + 1) / parts);
      } catch (...) {
#pragma omp critical(fastprune_failure)
        failure = std::current_exception();
      }
    }
    if (failure) std::rethrow_exception(failure);
    return;
  }
#else
  (void)threads;
#endif
  body(0, int64_t{0}, n);
}

// Calls body(item) for each item of [0, n), on at most `threads` threads, each of which takes another one when it is done.
// An exception in a body is thrown again on the calling thread.
template <class Body>
void parallel_items(int64_t n, int threads, Body body) {
#ifdef _OPENMP
  if (threads > 1 && n > 1) {
    std::exception_ptr failure;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t item = 0; item < n; ++item) {
      try {
        body(item);
      } catch (...) {
#pragma omp critical(fastprune_failure)
        failure = std::current_exception();
      }
    }
    if (failure) std::rethrow_exception(failure);
    return;
  }
#else
  (void)threads;
#endif
  for (int64_t item = 0; item < n; ++item) body(item);
}

}  // namespace fastprune
