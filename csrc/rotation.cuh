// The randomised Hadamard rotation of tq_vllm/core/rotations.py on vectors held in the registers of a few lanes.
#pragma once

#include "rotation_tables.cuh"

namespace tq {

constexpr unsigned ALL_LANES = 0xffffffffu;

// How LANES consecutive lanes hold a vector: lane q has coordinates r * STRIDE + q * RUN + j, r < ROWS, j < RUN. The matrix
// is kron(base matrix of order BASE, Sylvester matrix); a row is one run of the Sylvester part where BASE > 1.
template <int HEAD_DIM>
struct VectorShape {
  static constexpr int BASE = HEAD_DIM == 80 ? 20 : HEAD_DIM == 112 ? 28 : HEAD_DIM == 96 || HEAD_DIM == 192 ? 12 : 1;
  static constexpr int LANES = HEAD_DIM >= 192 ? 8 : 4;
  static constexpr int STRIDE = BASE > 1 ? HEAD_DIM / BASE : 8 * LANES;
  static constexpr int RUN = STRIDE / LANES;
  static constexpr int ROWS = HEAD_DIM / STRIDE;
  static_assert(ROWS * RUN <= 32, "the signs of a lane's coordinates fill one word");
};

// Bit r * RUN + j set = the lane's coordinate (r, j) is negated; q: place of the lane among the LANES of its vector.
template <int HEAD_DIM>
__device__ __forceinline__ uint32_t lane_signs(int q) {
  using Shape = VectorShape<HEAD_DIM>;
  uint32_t signs = 0;
  for (int i = 0; i < Shape::ROWS * Shape::RUN; i++) {
    const int c = i / Shape::RUN * Shape::STRIDE + q * Shape::RUN + i % Shape::RUN;
    signs |= (SignTable<HEAD_DIM>::at(c / 32) >> c % 32 & 1) << i;
  }
  return signs;
}

template <int HEAD_DIM>
__device__ __forceinline__ float flip_sign(float x, uint32_t signs, int i) {
  return __uint_as_float(__float_as_uint(x) ^ (signs << (31 - i) & 0x80000000u));
}

// x <- H x, without the factor 1 / sqrt(HEAD_DIM) and without the signs; all lanes of the warp take part.
template <int HEAD_DIM>
__device__ __forceinline__ void hadamard(float (&x)[VectorShape<HEAD_DIM>::ROWS][VectorShape<HEAD_DIM>::RUN], int q) {
  using Shape = VectorShape<HEAD_DIM>;
#pragma unroll
  for (int h = 1; h < Shape::RUN; h *= 2) {
#pragma unroll
    for (int r = 0; r < Shape::ROWS; r++) {
#pragma unroll
      for (int j = 0; j < Shape::RUN; j++) {
        if (j & h) continue;
        const float a = x[r][j], b = x[r][j + h];
        x[r][j] = a + b;
        x[r][j + h] = a - b;
      }
    }
  }
#pragma unroll
  for (int m = 1; m < Shape::LANES; m *= 2) {
    const float sign = q & m ? -1.f : 1.f;
#pragma unroll
    for (int r = 0; r < Shape::ROWS; r++) {
#pragma unroll
      for (int j = 0; j < Shape::RUN; j++) x[r][j] = fmaf(x[r][j], sign, __shfl_xor_sync(ALL_LANES, x[r][j], m));
    }
  }
  if constexpr (Shape::BASE == 1) {
#pragma unroll
    for (int h = 1; h < Shape::ROWS; h *= 2) {
#pragma unroll
      for (int r = 0; r < Shape::ROWS; r++) {
        if (r & h) continue;
#pragma unroll
        for (int j = 0; j < Shape::RUN; j++) {
          const float a = x[r][j], b = x[r + h][j];
          x[r][j] = a + b;
          x[r + h][j] = a - b;
        }
      }
    }
  } else {
#pragma unroll
    for (int j = 0; j < Shape::RUN; j++) {
      float column[Shape::BASE];
#pragma unroll
      for (int r = 0; r < Shape::BASE; r++) {
        column[r] = x[0][j];  // every base matrix has +1 in column 0 or takes the sign below
        if (BaseTable<Shape::BASE>::at(r) & 1) column[r] = -column[r];
#pragma unroll
        for (int c = 1; c < Shape::BASE; c++) column[r] += BaseTable<Shape::BASE>::at(r) >> c & 1 ? -x[c][j] : x[c][j];
      }
#pragma unroll
      for (int r = 0; r < Shape::BASE; r++) x[r][j] = column[r];
    }
  }
}

// Sum or maximum over the LANES lanes of a vector.
template <int LANES>
__device__ __forceinline__ float sum_lanes(float x) {
#pragma unroll
  for (int m = 1; m < LANES; m *= 2) x += __shfl_xor_sync(ALL_LANES, x, m);
  return x;
}
template <int LANES>
__device__ __forceinline__ float max_lanes(float x) {
#pragma unroll
  for (int m = 1; m < LANES; m *= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, m));
  return x;
}

}  // namespace tq
