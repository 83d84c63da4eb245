// What the key offset adds to scores: q . offset of a segment, for 32 segments of a KV head at a time.
//
// An m16n8k16 product has segments as rows and up to eight query rows as columns: row q in column 2q, row 4 + q in 2q + 1, so
// that a lane gets the rows it has the scores of. A lane takes eight neighbouring coordinates for two steps of the reduction.
#pragma once
#include "row_block.cuh"

namespace tq {

constexpr int SEGMENTS_AT_ONCE = 32;

// Eight 16-bit numbers of a row, at a multiple of 16 bytes.
__device__ __forceinline__ void load_eight(uint32_t (&w)[4], const void* base, int64_t index) {
  const uint4 x = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(base) + index);
  w[0] = x.x, w[1] = x.y, w[2] = x.z, w[3] = x.w;
}

template <class S> struct OffsetScores {
  static constexpr int D = S::D, SETS = SEGMENTS_AT_ONCE / 16;

  static __device__ __forceinline__ int64_t segment_at(const DecodeParams& p, const Cursor& c, int segment) {
    return min(segment, p.num_segments - 1) * p.offset_stride_segment + c.head * p.offset_stride_head;
  }
  static __device__ __forceinline__ int64_t query_at(const DecodeParams& p, const Cursor& c, int row) {  // -1: no such row
    const int token = unsigned(row) / unsigned(p.group_size), member = row - token * p.group_size;
    if (token >= c.request.query_len) return -1;
    return (c.request.query_start + token) * p.query_stride_token + (c.head * p.group_size + member) * p.query_stride_head;
  }

  // table [SEGMENTS_AT_ONCE][ROWS] of this warp, in units of the scores: of the segments of num_tokens tokens from `position`
  // on, each at its number modulo SEGMENTS_AT_ONCE, and of the rows of the unit at `c`.
  static __device__ __forceinline__ void fill(const DecodeParams& p, const Cursor& c, int position,
                                              int num_tokens, float* table, int lane) {
    const float unit = p.softmax_scale * LOG2_E;
    const int g = lane >> 2, q = lane & 3, first = position / SEGMENT_TOKENS;
    if (p.dtype != FLOAT32 && p.dtype == p.offset_dtype && p.vector_rows && p.vector_offsets) {
      const int sets = min(((position + num_tokens - 1) / SEGMENT_TOKENS - first) / 16 + 1, SETS);
#pragma unroll 1
      for (int first_row = 0; first_row < S::ROWS; first_row += 8) {
        const int64_t at = query_at(p, c, c.row_block * S::ROWS + first_row + (S::ROW_TILES > 1 && g & 1 ? 4 : 0) + (g >> 1));
        uint32_t query[D / 32][4] = {};
        if (at >= 0)
#pragma unroll
          for (int i = 0; i < D / 32; i++) load_eight(query[i], p.query, at + 32 * i + 8 * q);
        __syncwarp();
#pragma unroll 1
        for (int s = 0; s < sets; s++) {
          uint32_t segment[2][D / 32][4];
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const int64_t from = segment_at(p, c, first + 16 * s + 8 * h + g) + 8 * q;
#pragma unroll
            for (int i = 0; i < D / 32; i++) load_eight(segment[h][i], p.key_offset, from + 32 * i);
          }
          float product[4] = {};
#pragma unroll
          for (int i = 0; i < D / 32; i++)
#pragma unroll
            for (int w = 0; w < 4; w += 2)
              mma_16bit(product, p.dtype == BFLOAT16, segment[0][i][w], segment[1][i][w], segment[0][i][w + 1],
                        segment[1][i][w + 1], query[i][w], query[i][w + 1]);
#pragma unroll
          for (int h = 0; h < 2; h++)
#pragma unroll
            for (int t = 0; t < S::ROW_TILES && t < 2; t++)
              table[(first + 16 * s + 8 * h + g) % SEGMENTS_AT_ONCE * S::ROWS + first_row + 4 * t + q] =
                  product[2 * h + t] * unit;
        }
      }
    } else {  // rare: a lane a segment
      const int64_t from = segment_at(p, c, first + lane);
      __syncwarp();
#pragma unroll 1
      for (int row = 0; row < S::ROWS; row++) {
        const int64_t at = query_at(p, c, c.row_block * S::ROWS + row);
        float sum = 0;
        if (at >= 0)
#pragma unroll 1
          for (int i = 0; i < D; i++)
            sum = fmaf(load_float(p.query, at + i, p.dtype), load_float(p.key_offset, from + i, p.offset_dtype), sum);
        table[(first + lane) % SEGMENTS_AT_ONCE * S::ROWS + row] = sum * unit;
      }
    }
    __syncwarp();
  }
};

}  // namespace tq
