// The search for a path through one trellis block, by one thread: tq_vllm/core/trellis.py in units of the codebook.
//
// `column` is the block, position p at column[p * STRIDE] (shared memory: a loop over positions can't index registers). States,
// branches and subsets are compile-time numbers, so that a step is straight-line code on eight metrics.
#pragma once

#include <cstdint>

#include "codebook.cuh"
#include "layout.cuh"

namespace tq {

constexpr int TRELLIS_BLOCK = 32, TRELLIS_STATES = 8;
constexpr float TIE = 1.f + 0x1p-16f;  // sums of distances this near to each other count as equal: the first state wins

// Subset of a coordinate whose coded bit is bit 0 of `window` and the t-th before it bit t.
__host__ __device__ constexpr int subset_of(int window) {
  return 2 * ((window ^ window >> 1 ^ window >> 3) & 1) + (window >> 2 & 1);
}

// Level `index` of the rising codebook, an odd number of units.
template <int BITS> __host__ __device__ constexpr float rising_level(int index) {
  using T = LevelTable<BITS>;
  return index < T::COUNT ? -(2.f * T::at(T::COUNT - 1 - index) + 1.f) : 2.f * T::at(index - T::COUNT) + 1.f;
}
template <int BITS> constexpr int SUBSET_LEVELS = 1 << (BITS - TRELLIS - 1);

// Squared distances of y to the nearest level of each subset.
template <int BITS> __device__ __forceinline__ void subset_distances(float y, float (&distance)[4]) {
#pragma unroll
  for (int subset = 0; subset < 4; subset++) {
    float nearest = fabsf(y - rising_level<BITS>(subset));
#pragma unroll
    for (int i = 1; i < SUBSET_LEVELS<BITS>; i++) nearest = fminf(nearest, fabsf(y - rising_level<BITS>(4 * i + subset)));
    distance[subset] = nearest * nearest;
  }
}

// Least distances of paths through the block that begin anywhere, to each state after it.
template <int BITS, int STRIDE>
__device__ __forceinline__ void search_forward(const float* column, float cells, float (&metric)[TRELLIS_STATES]) {
#pragma unroll
  for (float& m : metric) m = 0.f;
#pragma unroll 4
  for (int p = 0; p < TRELLIS_BLOCK; p++) {
    float distance[4], next[TRELLIS_STATES];
    subset_distances<BITS>(column[p * STRIDE] * cells, distance);
#pragma unroll
    for (int s = 0; s < TRELLIS_STATES; s++)
      next[s] = fminf(metric[s >> 1] + distance[subset_of(s)], metric[s >> 1 | 4] + distance[subset_of(s | 8)]);
#pragma unroll
    for (int s = 0; s < TRELLIS_STATES; s++) metric[s] = next[s];
  }
}

// Least distances of paths through the block that end anywhere, from each state before it.
template <int BITS, int STRIDE>
__device__ __forceinline__ void search_backward(const float* column, float cells, float (&metric)[TRELLIS_STATES]) {
#pragma unroll
  for (float& m : metric) m = 0.f;
#pragma unroll 4
  for (int p = TRELLIS_BLOCK - 1; p >= 0; p--) {
    float distance[4], next[TRELLIS_STATES];
    subset_distances<BITS>(column[p * STRIDE] * cells, distance);
#pragma unroll
    for (int s = 0; s < TRELLIS_STATES; s++)
      next[s] = fminf(metric[2 * s & 7] + distance[subset_of(2 * s)], metric[(2 * s & 7) + 1] + distance[subset_of(2 * s + 1)]);
#pragma unroll
    for (int s = 0; s < TRELLIS_STATES; s++) metric[s] = next[s];
  }
}

__device__ __forceinline__ float least(const float (&metric)[TRELLIS_STATES]) {
  return fminf(fminf(fminf(metric[0], metric[1]), fminf(metric[2], metric[3])),
               fminf(fminf(metric[4], metric[5]), fminf(metric[6], metric[7])));
}

// Coded bits of the closest path from `seam` before the block to the same state after it. Paths are carried along with their
// metrics: as many instructions as decisions and a way back through them.
template <int BITS, int STRIDE>
__device__ __forceinline__ uint32_t closed_path(const float* column, float cells, int seam) {
  float metric[TRELLIS_STATES];
  uint32_t path[TRELLIS_STATES];
#pragma unroll
  for (int s = 0; s < TRELLIS_STATES; s++) metric[s] = s == seam ? 0.f : 1e30f, path[s] = 0;
  uint32_t bit = 1;
#pragma unroll 4
  for (int p = 0; p < TRELLIS_BLOCK; p++, bit <<= 1) {
    float distance[4], next[TRELLIS_STATES];
    uint32_t next_path[TRELLIS_STATES];
    subset_distances<BITS>(column[p * STRIDE] * cells, distance);
#pragma unroll
    for (int s = 0; s < TRELLIS_STATES; s++) {
      const float old = metric[s >> 1] + distance[subset_of(s)], young = metric[s >> 1 | 4] + distance[subset_of(s | 8)];
      const bool take = young < old;
      next[s] = take ? young : old;
      next_path[s] = (take ? path[s >> 1 | 4] : path[s >> 1]) | (s & 1 ? bit : 0);
    }
#pragma unroll
    for (int s = 0; s < TRELLIS_STATES; s++) metric[s] = next[s], path[s] = next_path[s];
  }
  uint32_t chosen = path[0];
#pragma unroll
  for (int s = 1; s < TRELLIS_STATES; s++) chosen = s == seam ? path[s] : chosen;
  return chosen;
}

// Coded bits of a path near to the block: closed through the state where open paths into it and out of it are closest.
template <int BITS, int STRIDE> __device__ __forceinline__ uint32_t closest_path(const float* column, float cells) {
  float into[TRELLIS_STATES], out_of[TRELLIS_STATES];
  search_forward<BITS, STRIDE>(column, cells, into);
  search_backward<BITS, STRIDE>(column, cells, out_of);
#pragma unroll
  for (int s = 0; s < TRELLIS_STATES; s++) into[s] += out_of[s];
  const float most = least(into) * TIE;
  int seam = TRELLIS_STATES - 1;
#pragma unroll
  for (int s = TRELLIS_STATES - 2; s >= 0; s--) seam = into[s] <= most ? s : seam;
  return closed_path<BITS, STRIDE>(column, cells, seam);
}

// Words of a block: coded bits, and uncoded bits as plane 1 (2 bits: uncoded[0]) or plane 2 has them.
struct TrellisWords {
  uint32_t coded, uncoded[2];
};

// Nearest levels along `path`. Adds to <y, level> and <level, level>.
template <int BITS, int STRIDE>
__device__ __forceinline__ TrellisWords quantize_along(const float* column, float cells, uint32_t path, float& dot, float& square) {
  constexpr int PLANE = plane_bits(BITS, 0);
  const uint32_t c0 = path << 2 | path >> 30, c1 = path ^ (path << 1 | path >> 31) ^ (path << 3 | path >> 29);
  TrellisWords words{path, {0, 0}};
#pragma unroll
  for (int p = 0; p < TRELLIS_BLOCK; p++) {
    const int j = p % 4, k = p / 4;
    const bool low = c0 >> p & 1, high = c1 >> p & 1;
    const float y = column[p * STRIDE] * cells;
    float level = 0.f, nearest = 0.f;
    uint32_t index = 0;
#pragma unroll
    for (int i = 0; i < SUBSET_LEVELS<BITS>; i++) {
      const float even = high ? rising_level<BITS>(4 * i + 2) : rising_level<BITS>(4 * i);
      const float odd = high ? rising_level<BITS>(4 * i + 3) : rising_level<BITS>(4 * i + 1);
      const float candidate = low ? odd : even, distance = fabsf(y - candidate);
      if (i == 0 || distance < nearest) level = candidate, nearest = distance, index = i;
    }
    dot = fmaf(y, level, dot);
    square = fmaf(level, level, square);
    words.uncoded[PLANE == 2 ? j % 2 : 0] |= (index & 1) << trellis_bit(PLANE, j, k);
    if (PLANE == 2) words.uncoded[j % 2] |= (index >> 1) << trellis_top_bit(j, k);
  }
  return words;
}

}  // namespace tq
