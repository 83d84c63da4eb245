// One row of head_dim numbers spread over a warp: loads and stores of any float type, the rotation and its inverse.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "rotation_tables.cuh"
#include "store_kv.h"

namespace tq {

__device__ __forceinline__ float load_float(const void* base, int64_t index, DType dtype) {
  if (dtype == BFLOAT16) return __bfloat162float(static_cast<const __nv_bfloat16*>(base)[index]);
  if (dtype == FLOAT16) return __half2float(static_cast<const __half*>(base)[index]);
  return static_cast<const float*>(base)[index];
}

__device__ __forceinline__ void store_float(void* base, int64_t index, DType dtype, float x) {
  if (dtype == BFLOAT16)
    static_cast<__nv_bfloat16*>(base)[index] = __float2bfloat16_rn(x);
  else if (dtype == FLOAT16)
    static_cast<__half*>(base)[index] = __float2half_rn(x);
  else
    static_cast<float*>(base)[index] = x;
}

// y = H (s * x) with H = kron(base matrix, Sylvester matrix), not yet divided by sqrt(D) (core/rotations.py).
template <int D> struct Row {
  static constexpr int BASE = D % 28 == 0 ? 28 : D % 20 == 0 ? 20 : D % 12 == 0 ? 12 : 1;
  static constexpr int SYLVESTER = D / BASE;
  static constexpr bool POWER_OF_TWO = BASE == 1;
  static constexpr int PER_LANE = (D + 31) / 32;
  static constexpr int SCRATCH_FLOATS = POWER_OF_TWO ? 0 : D;

  static __device__ __forceinline__ int element(int lane, int j) { return POWER_OF_TWO ? lane * PER_LANE + j : j * 32 + lane; }
  static __device__ __forceinline__ bool valid(int lane, int j) { return D % 32 == 0 || element(lane, j) < D; }

  static __device__ __forceinline__ void flip_signs(float (&v)[PER_LANE], int lane) {
    using T = SignTable<D>;
    if constexpr (POWER_OF_TWO) {
      const int word = lane * PER_LANE / 32, shift = lane * PER_LANE % 32;
      uint32_t signs = T::at(0);
#pragma unroll
      for (int i = 1; i < T::COUNT; i++) signs = word == i ? T::at(i) : signs;
#pragma unroll
      for (int j = 0; j < PER_LANE; j++)
        v[j] = __uint_as_float(__float_as_uint(v[j]) ^ (signs >> (shift + j) & 1) << 31);
    } else {
#pragma unroll
      for (int j = 0; j < PER_LANE; j++) v[j] = __uint_as_float(__float_as_uint(v[j]) ^ (T::at(j) >> lane & 1) << 31);
    }
  }

  static __device__ __forceinline__ void across(float (&v)[PER_LANE], int lane, int distance) {
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
      const float other = __shfl_xor_sync(~0u, v[j], distance);
      v[j] = lane & distance ? other - v[j] : v[j] + other;
    }
  }

  // Multiply by kron(base, I) or its transpose; scratch: D floats of this warp.
  template <bool TRANSPOSED>
  static __device__ __forceinline__ void mix(float (&v)[PER_LANE], int lane, float* scratch) {
    __syncwarp();
#pragma unroll
    for (int j = 0; j < PER_LANE; j++)
      if (valid(lane, j)) scratch[element(lane, j)] = v[j];
    __syncwarp();
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) v[j] = 0;
#pragma unroll
    for (int b = 0; b < BASE; b++) {
      uint32_t column = 0, row = BaseTable<BASE>::at(b);  // signs of entries (i, b) in `column`, of (b, i) in `row`
      if constexpr (!TRANSPOSED) {
#pragma unroll
        for (int i = 0; i < BASE; i++) column |= (BaseTable<BASE>::at(i) >> b & 1) << i;
      }
      const uint32_t signs = TRANSPOSED ? row : column;
#pragma unroll
      for (int j = 0; j < PER_LANE; j++) {
        const int e = element(lane, j);
        if (valid(lane, j)) {
          const float x = scratch[b * SYLVESTER + e % SYLVESTER];
          v[j] += __uint_as_float(__float_as_uint(x) ^ (signs >> e / SYLVESTER & 1) << 31);
        }
      }
    }
  }

  static __device__ __forceinline__ void butterflies(float (&v)[PER_LANE], int lane) {
    if constexpr (POWER_OF_TWO) {
#pragma unroll
      for (int h = 1; h < PER_LANE; h *= 2)
#pragma unroll
        for (int j = 0; j < PER_LANE; j++)
          if (!(j & h)) {
            const float a = v[j], b = v[j | h];
            v[j] = a + b, v[j | h] = a - b;
          }
#pragma unroll
      for (int h = 1; h < 32; h *= 2) across(v, lane, h);
    } else {
#pragma unroll
      for (int h = 1; h < SYLVESTER; h *= 2) across(v, lane, h);
    }
  }

  static __device__ __forceinline__ void rotate(float (&v)[PER_LANE], int lane, float* scratch) {
    flip_signs(v, lane);
    butterflies(v, lane);
    if constexpr (!POWER_OF_TWO) mix<false>(v, lane, scratch);
  }

  static __device__ __forceinline__ void rotate_back(float (&v)[PER_LANE], int lane, float* scratch) {
    butterflies(v, lane);
    if constexpr (!POWER_OF_TWO) mix<true>(v, lane, scratch);
    flip_signs(v, lane);
  }
};

}  // namespace tq
