// Enough of CUDA C++ to run a kernel on a CPU, for its logic: every lane is a fiber, a warp's collective is a barrier of its
// 32 lanes, CTAs run one after another. SIMT_ORDER=n changes the order of the lanes, which finds missing barriers.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__
#define __align__(n)

struct alignas(8) float2 { float x, y; };
struct uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct Dim { unsigned x, y = 0; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace simt {

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(256 << 10);
  Dim thread;
  int warp, lane;
  bool done = false;
  uint64_t post[3];  // what the lane shows to its warp
};
struct Barrier { int arrived = 0, generation = 0; };

inline std::vector<Fiber*> fibers;
inline std::vector<Barrier> warps;
inline Barrier cta;
inline Fiber* current;
inline ucontext_t scheduler;
inline Dim block, block_size, grid_size;

inline void wait(Barrier& barrier, int count) {
  const int generation = barrier.generation;
  if (++barrier.arrived == count) {
    barrier.arrived = 0, barrier.generation++;
  } else {
    while (barrier.generation == generation) swapcontext(&current->context, &scheduler);
  }
}
inline void wait_warp() { wait(warps[current->warp], 32); }
inline Fiber& lane(int i) { return *fibers[current->warp * 32 + i]; }

// Show `value`, run `read` when all lanes have shown theirs, and go on when all have read.
template <class T, class Read> auto exchange(const T& value, Read read) {
  static_assert(sizeof(T) <= sizeof(Fiber::post));
  std::memcpy(current->post, &value, sizeof(T));
  wait_warp();
  auto result = read([](int i) {
    T x;
    std::memcpy(&x, lane(i).post, sizeof(T));
    return x;
  });
  wait_warp();
  return result;
}

inline std::function<void()> body;
inline void enter() {
  body();
  current->done = true;
  swapcontext(&current->context, &scheduler);
}

// Run kernel() for every thread of `ctas` CTAs, all in row `row` of the grid, of `num_warps` warps.
inline void launch(int ctas, int num_warps, std::function<void()> kernel, unsigned row = 0) {
  unsigned order = std::getenv("SIMT_ORDER") ? std::atoi(std::getenv("SIMT_ORDER")) : 0;
  body = kernel, grid_size = {unsigned(ctas)}, block_size = {unsigned(32 * num_warps)};
  for (unsigned b = 0; b < unsigned(ctas); b++) {
    block = {b, row}, cta = {}, warps.assign(num_warps, {});
    for (int i = 0; i < 32 * num_warps; i++) {
      Fiber* f = new Fiber;
      f->thread = {unsigned(i)}, f->warp = i / 32, f->lane = i % 32;
      getcontext(&f->context);
      f->context.uc_stack.ss_sp = f->stack.data(), f->context.uc_stack.ss_size = f->stack.size();
      f->context.uc_link = &scheduler;
      makecontext(&f->context, enter, 0);
      fibers.push_back(f);
    }
    std::vector<Fiber*> queue = fibers;
    while (!queue.empty()) {
      for (size_t i = queue.size() - 1; order && i; i--) std::swap(queue[i], queue[rand_r(&order) % (i + 1)]);
      for (Fiber* f : queue) current = f, swapcontext(&scheduler, &f->context);
      queue.erase(std::remove_if(queue.begin(), queue.end(), [](Fiber* f) { return f->done; }), queue.end());
    }
    for (Fiber* f : fibers) delete f;
    fibers.clear();
  }
}

}  // namespace simt

#define threadIdx (simt::current->thread)
#define blockIdx (simt::block)
#define blockDim (simt::block_size)
#define gridDim (simt::grid_size)

inline void __syncwarp() { simt::wait_warp(); }
inline void __syncthreads() { simt::wait(simt::cta, simt::fibers.size()); }
template <class T> T __shfl_sync(unsigned, T x, int from) {
  return simt::exchange(x, [&](auto at) { return at(from & 31); });
}
template <class T> T __shfl_xor_sync(unsigned, T x, int mask) { return __shfl_sync(~0u, x, simt::current->lane ^ mask); }
template <class T> T __shfl_up_sync(unsigned, T x, int d) {
  return __shfl_sync(~0u, x, std::max(simt::current->lane - d, 0));
}
inline unsigned __ballot_sync(unsigned, bool x) {
  return simt::exchange(x, [](auto at) {
    unsigned all = 0;
    for (int i = 0; i < 32; i++) all |= unsigned(at(i)) << i;
    return all;
  });
}
inline bool __any_sync(unsigned, bool x) { return __ballot_sync(~0u, x) != 0; }
inline int __reduce_add_sync(unsigned, int x) {
  return simt::exchange(x, [](auto at) {
    int sum = 0;
    for (int i = 0; i < 32; i++) sum += at(i);
    return sum;
  });
}
template <class To, class From> To simt_bits(From x) {
  To y;
  static_assert(sizeof x == sizeof y);
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline int __float_as_int(float x) { return simt_bits<int>(x); }
inline uint32_t __float_as_uint(float x) { return simt_bits<uint32_t>(x); }
inline float __int_as_float(int x) { return simt_bits<float>(x); }
inline float __uint_as_float(uint32_t x) { return simt_bits<float>(x); }
inline int __ffs(unsigned x) { return x ? __builtin_ctz(x) + 1 : 0; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
using std::max;
using std::min;

struct __half { _Float16 x; };
struct __half2 { _Float16 x, y; };
struct __nv_bfloat16 { uint16_t x; };
struct __nv_bfloat162 { uint16_t x, y; };
inline float __half2float(__half h) { return h.x; }
inline __half __float2half_rn(float x) { return {_Float16(x)}; }
inline __half __ushort_as_half(unsigned short x) { return simt_bits<__half>(x); }
inline __half2 __floats2half2_rn(float x, float y) { return {_Float16(x), _Float16(y)}; }
inline float __bfloat162float(__nv_bfloat16 h) { return __uint_as_float(uint32_t(h.x) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = __float_as_uint(x);
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16_rn(x).x, __float2bfloat16_rn(y).x}; }
