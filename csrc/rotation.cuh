// The randomised Hadamard rotation of tq_vllm/core/rotations.py on vectors held in the registers of a few lanes.
#pragma once

#include "rotation_tables.cuh"

namespace tq {

constexpr unsigned ALL_LANES = 0xffffffffu;

// How LANES consecutive lanes hold a vector: lane q has coordinates r * STRIDE + q * RUN + j, r < ROWS, j < RUN. The matrix
// is kron(base matrix of order BASE, Sylvester matrix); a row is one run of the Sylvester part where BASE > 1. Few lanes
// a vector make the least work, WIDE (where BASE is 1) the shortest way through a single vector; BLOCKS: a lane holds one
// trellis block, with its j-th group in row j.
enum Spread { NARROW, WIDE, BLOCKS };
template <int HEAD_DIM_, Spread SPREAD>
struct VectorShape {
  static constexpr int HEAD_DIM = HEAD_DIM_;
  static constexpr int BASE = HEAD_DIM == 80 ? 20 : HEAD_DIM == 112 ? 28 : HEAD_DIM == 96 || HEAD_DIM == 192 ? 12 : 1;
  static constexpr int LANES = SPREAD == BLOCKS              ? HEAD_DIM / 32
                               : SPREAD == WIDE && BASE == 1 ? HEAD_DIM / 8
                               : HEAD_DIM >= 192             ? 8
                                                             : 4;
  static constexpr int STRIDE = BASE > 1 ? HEAD_DIM / BASE : 8 * LANES;
  static constexpr int RUN = STRIDE / LANES;
  static constexpr int ROWS = HEAD_DIM / STRIDE;
  static constexpr int VECTORS = 32 / LANES;  // of a warp
  static_assert(ROWS * RUN <= 32, "the signs of a lane's coordinates fill one word");
};

// The random signs of a lane's coordinates (r, j): bit sign_place(r * RUN + j) set = negated; q: place of the lane among the
// LANES of its vector. Neighbours lie 16 bits apart, as the signs of two 16-bit numbers in a word do.
__device__ constexpr int sign_place(int i) { return i / 2 + 16 * (i % 2); }

template <class Shape, class Table = SignTable<Shape::HEAD_DIM>>
__device__ __forceinline__ uint32_t lane_signs(int q) {
  static __constant__ const uint32_t words[8] = {Table::at(0), Table::at(1), Table::at(2), Table::at(3),
                                                 Table::at(4), Table::at(5), Table::at(6), Table::at(7)};
  uint32_t signs = 0;
#pragma unroll
  for (int r = 0; r < Shape::ROWS; r++) {
    const int c = r * Shape::STRIDE + q * Shape::RUN;
#pragma unroll
    for (int j = 0; j < Shape::RUN; j++) signs |= (words[c / 32] >> (c % 32 + j) & 1) << sign_place(r * Shape::RUN + j);
  }
  return signs;
}

// Apply the sign of coordinate i, or of coordinates i and i + 1 (i even) packed in a word.
__device__ __forceinline__ float flip_sign(float x, uint32_t signs, int i) {
  return __uint_as_float(__float_as_uint(x) ^ (signs << (31 - sign_place(i)) & 0x80000000u));
}
__device__ __forceinline__ uint32_t flip_signs(uint32_t pair, uint32_t signs, int i) {
  return pair ^ (signs << (15 - i / 2) & 0x80008000u);
}

// x <- H x, without the factor 1 / sqrt(head_dim) and without the signs; all lanes of the warp take part.
template <class Shape>
__device__ __forceinline__ void hadamard(float (&x)[Shape::ROWS][Shape::RUN], int q) {
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
        column[r] = BaseTable<Shape::BASE>::at(r) & 1 ? -x[0][j] : x[0][j];
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
