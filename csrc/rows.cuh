// Rows of head_dim numbers: loads and stores of any float type, and the inverse rotation of one row in a warp.
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

// Eight consecutive numbers of every 64 from `index` on, as bits that `float_of_bits` reads: nothing here waits for the
// loads if `vector` (16-byte loads are aligned).
template <int N>
__device__ __forceinline__ void load_bits(float (&x)[N][8], const void* base, int64_t index, DType dtype, bool vector,
                                          bool real) {
  if (!real) {
#pragma unroll
    for (int n = 0; n < 8 * N; n++) x[n >> 3][n & 7] = 0;
  } else if (dtype == FLOAT32) {
#pragma unroll
    for (int n = 0; n < 8 * N; n++) x[n >> 3][n & 7] = static_cast<const float*>(base)[index + 64 * (n >> 3) + (n & 7)];
  } else if (vector) {
#pragma unroll
    for (int i = 0; i < N; i++) {
      const uint4 w = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(base) + index + 64 * i);
      x[i][0] = __uint_as_float(w.x), x[i][2] = __uint_as_float(w.y);
      x[i][4] = __uint_as_float(w.z), x[i][6] = __uint_as_float(w.w);
    }
  } else {
#pragma unroll
    for (int n = 0; n < 4 * N; n++) {
      const uint16_t* at = static_cast<const uint16_t*>(base) + index + 64 * (n >> 2) + 2 * (n & 3);
      x[n >> 2][2 * (n & 3)] = __uint_as_float(at[0] | uint32_t(at[1]) << 16);
    }
  }
}
template <int N> __device__ __forceinline__ float float_of_bits(const float (&x)[N], int n, DType dtype) {
  if (dtype == FLOAT32) return x[n];
  const uint32_t pair = __float_as_uint(x[n & ~1]);
  if (dtype == BFLOAT16) return __uint_as_float(n & 1 ? pair & 0xffff0000u : pair << 16);
  return __half2float(__ushort_as_half(static_cast<unsigned short>(n & 1 ? pair >> 16 : pair)));
}

__device__ __forceinline__ void store_eight(void* base, int64_t index, DType dtype, bool vector, const float (&x)[8]) {
  if (dtype == FLOAT32) {
#pragma unroll
    for (int n = 0; n < 8; n++) static_cast<float*>(base)[index + n] = x[n];
    return;
  }
  uint32_t w[4];
#pragma unroll
  for (int n = 0; n < 4; n++) {
    const __nv_bfloat162 b = __floats2bfloat162_rn(x[2 * n], x[2 * n + 1]);
    const __half2 h = __floats2half2_rn(x[2 * n], x[2 * n + 1]);
    w[n] = dtype == BFLOAT16 ? *reinterpret_cast<const uint32_t*>(&b) : *reinterpret_cast<const uint32_t*>(&h);
  }
  uint16_t* at = static_cast<uint16_t*>(base) + index;
  if (vector) {
    *reinterpret_cast<uint4*>(at) = make_uint4(w[0], w[1], w[2], w[3]);
  } else {
#pragma unroll
    for (int n = 0; n < 8; n++) at[n] = static_cast<uint16_t>(w[n >> 1] >> 16 * (n & 1));
  }
}

__device__ __forceinline__ void store_float(void* base, int64_t index, DType dtype, float x) {
  if (dtype == BFLOAT16)
    static_cast<__nv_bfloat16*>(base)[index] = __float2bfloat16_rn(x);
  else if (dtype == FLOAT16)
    static_cast<__half*>(base)[index] = __float2half_rn(x);
  else
    static_cast<float*>(base)[index] = x;
}

// The rotation y = H (s * x), H the Sylvester matrix (core/rotations.py), not yet divided by sqrt(D), of a row whose lane l
// holds coordinates l * PER_LANE + j. Head sizes that are not powers of two have another H.
template <int D> struct Row {
  static constexpr int PER_LANE = D / 32;
  static_assert(PER_LANE * 32 == D && (D & (D - 1)) == 0);

  static __device__ __forceinline__ int element(int lane, int j) { return lane * PER_LANE + j; }

  static __device__ __forceinline__ void rotate_back(float (&v)[PER_LANE], int lane) {
#pragma unroll
    for (int h = 1; h < PER_LANE; h *= 2)
#pragma unroll
      for (int j = 0; j < PER_LANE; j++)
        if (!(j & h)) {
          const float a = v[j], b = v[j | h];
          v[j] = a + b, v[j | h] = a - b;
        }
#pragma unroll
    for (int m = 1; m < 32; m *= 2) {
      const float sign = lane & m ? -1.0f : 1.0f;
#pragma unroll
      for (int j = 0; j < PER_LANE; j++) v[j] = fmaf(v[j], sign, __shfl_xor_sync(~0u, v[j], m));
    }
    using T = SignTable<D>;
    const int word = lane * PER_LANE / 32, shift = lane * PER_LANE % 32;
    uint32_t signs = T::at(0);
#pragma unroll
    for (int i = 1; i < T::COUNT; i++) signs = word == i ? T::at(i) : signs;
#pragma unroll
    for (int j = 0; j < PER_LANE; j++)
      v[j] = __uint_as_float(__float_as_uint(v[j]) ^ (signs >> (shift + j) & 1) << 31);
  }
};

}  // namespace tq
