// What the key offset adds to scores: q . offset of a segment, for 16 segments of a KV head at a time.
//
// An m16n8k16 product has segments as rows and query rows as columns: query row q in column 2q, query row 4 + q in 2q + 1, so
// that a lane gets the rows it has the scores of. A lane takes eight neighbouring coordinates for two steps of the reduction.
#pragma once
#include "instructions.cuh"
#include "rows.cuh"
#include "work_list.cuh"

namespace tq {

constexpr int SEGMENTS_AT_ONCE = 16;

// Eight 16-bit numbers of a row.
__device__ __forceinline__ void load_eight(uint32_t (&w)[4], const void* base, int64_t index, bool vector) {
  const uint16_t* at = static_cast<const uint16_t*>(base) + index;
  if (vector) {
    const uint4 x = *reinterpret_cast<const uint4*>(at);
    w[0] = x.x, w[1] = x.y, w[2] = x.z, w[3] = x.w;
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) w[i] = at[2 * i] | uint32_t(at[2 * i + 1]) << 16;
  }
}

// table [SEGMENTS_AT_ONCE][ROWS] of this warp, in units of the scores, of the segments from `first` on and the unit at `c`.
template <class S>
__device__ __noinline__ void offset_scores(const DecodeParams& p, const Cursor& c, int first, float* table, int lane) {
  constexpr int D = S::D;
  const float unit = p.softmax_scale * 1.4426950408889634f;  // scores are exponents of 2
  auto segment_at = [&](int i) {
    return min(first + i, p.num_segments - 1) * p.offset_stride_segment + c.head * p.offset_stride_head;
  };
  auto query_at = [&](int row) {  // -1: no such row
    const int index = c.row_block * S::ROWS + row, token = unsigned(index) / unsigned(p.group_size);
    return token < c.request.query_len ? (c.request.query_start + token) * p.query_stride_token +
                                             (c.head * p.group_size + index - token * p.group_size) * p.query_stride_head
                                       : int64_t{-1};
  };
  __syncwarp();
  if (p.dtype == FLOAT32 || p.dtype != p.offset_dtype) {  // rare: two lanes a segment
    const int64_t segment = segment_at(lane >> 1);
#pragma unroll 1
    for (int row = 0; row < S::ROWS; row++) {
      const int64_t query = query_at(row);
      float sum = 0;
      if (query >= 0)
#pragma unroll 1
        for (int i = lane & 1; i < D; i += 2)
          sum = fmaf(load_float(p.query, query + i, p.dtype), load_float(p.key_offset, segment + i, p.offset_dtype), sum);
      sum += __shfl_xor_sync(~0u, sum, 1);
      table[(lane >> 1) * S::ROWS + row] = sum * unit;
    }
  } else {
    const int g = lane >> 2, q = lane & 3;
    const int64_t query = query_at((S::ROW_TILES > 1 && g & 1 ? 4 : 0) + (g >> 1));
    const int64_t segments[2] = {segment_at(g), segment_at(g + 8)};
    float product[4] = {};
#pragma unroll
    for (int i = 0; i < D / 32; i++) {
      uint32_t a[2][4], b[4] = {};
#pragma unroll
      for (int h = 0; h < 2; h++) load_eight(a[h], p.key_offset, segments[h] + 32 * i + 8 * q, p.vector_offsets);
      if (query >= 0) load_eight(b, p.query, query + 32 * i + 8 * q, p.vector_rows);
#pragma unroll
      for (int w = 0; w < 4; w += 2) mma_16bit(product, p.dtype == BFLOAT16, a[0][w], a[1][w], a[0][w + 1], a[1][w + 1], b[w], b[w + 1]);
    }
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int t = 0; t < S::ROW_TILES; t++) table[(g + 8 * h) * S::ROWS + 4 * t + q] = product[2 * h + t] * unit;
  }
  __syncwarp();
}

}  // namespace tq
