// A block of 16, 24 or 32 query rows in a warp: speculative verification, and groups of many heads.
//
// Scores as in row_block.cuh, but the rotated query stands in shared memory, in the order of the operands. Every code of a value
// is used by all rows, so it is worth its conversion to float16 (exact), and O^T = V^T P^T is a dense float16 MMA m16n8k16:
// rows = coordinates 64 i + 8 g + 4 h + j of one j, reduction = the 16 tokens of a tile, columns = eight query rows. A lane has
// the same scores and outputs as in RowBlock. A tile is finished before the next begins, which is what registers allow.
//
// Weights in float16 are weight * value scale * value_unit, at most 2^15: value_unit is the power of two that brought the
// value scales near one when it was chosen, and is chosen again when one of them passes 4.
#pragma once
#include "row_block.cuh"

namespace tq {

template <class S> struct WideRowBlock : RowBlock<S> {
  static_assert(!S::SKETCH);
  using Base = RowBlock<S>;
  using Base::RT, Base::D, Base::reference, Base::sum, Base::weighted, Base::output;
  using Base::all_begin, Base::all_end, Base::begin, Base::end;
  using typename Base::Coordinates, typename Base::Key, typename Base::Value;
  static constexpr float WIDE_OVERFLOW = 8192.0f, SCALE_OVERFLOW = 4.0f;
  static constexpr int AT_ONCE = RT % 4 == 0 ? 4 : 3;  // row tiles whose queries are loaded together

  struct QueryBits {};
  struct RowInfo {
    float scale, shift;  // RowBlock::Query::scale, shift
    int begin, end;      // positions that the row sees
  };

  float value_unit;  // 0: no token yet

  __device__ __forceinline__ void fetch(const DecodeParams& p, const Cursor& c, QueryBits&, int) { this->set_limits(p, c); }

  static __device__ __forceinline__ RowInfo* infos(uint8_t* bytes) { return reinterpret_cast<RowInfo*>(bytes + 2 * S::ROWS * D); }

  // bytes: operands B of the scores, 8 bytes at [k-step][tile of four rows][lane], then RowInfo [ROWS].
  __device__ __forceinline__ void prepare(const DecodeParams& p, const Cursor& c, const QueryBits&, uint8_t* bytes, int lane) {
    const int q = lane & 3, g = lane >> 2;
    __syncwarp();
#pragma unroll 1
    for (int first = 0; first < RT; first += AT_ONCE) {  // what registers have room for waits for memory together
      float bits[AT_ONCE][D / 64][8];
      typename Base::Place at[AT_ONCE];
#pragma unroll
      for (int t = 0; t < AT_ONCE; t++) {
        at[t] = Base::place(p, c, 4 * (first + t) + q);
        load_bits(bits[t], p.query, at[t].query(p, c) + 8 * g, p.dtype, p.vector_rows, at[t].real);
      }
#pragma unroll
      for (int t = 0; t < AT_ONCE; t++) {
        Coordinates x;
#pragma unroll
        for (int n = 0; n < D / 8; n++) x[n >> 3][n >> 2 & 1][n & 3] = float_of_bits(bits[t][n >> 3], n & 7, p.dtype);
        Base::rotate(x, lane);
        int total = 0;
        float maximum = Base::largest(x);
        const float inverse = maximum > 0 ? __fdividef(QUERY_MAX, maximum) : 0.0f;
#pragma unroll
        for (int i = 0; i < D / 64; i++) {
          uint32_t high[2] = {}, low[2] = {};
#pragma unroll
          for (int n = 0; n < 8; n++) Base::quantize(x[i][n >> 2][n & 3], inverse, total, high[n >> 2], low[n >> 2]);
          const int s = Key::step_of(8 * i + g);
          uint2* operand = reinterpret_cast<uint2*>(bytes) + (s * RT + first + t) * 32 + 8 * q + Key::lane_of(8 * i + g);
          operand[0] = make_uint2(high[0], high[1]);
          operand[4] = make_uint2(low[0], low[1]);
        }
        if (x[0][0][0] != x[0][0][0]) maximum = x[0][0][0];  // a NaN escapes fmaxf
        total = sum_over_tokens(total);
        if (g == 0) {
          const float scale = Base::template scale_of<S::KEY_BITS>(p, maximum, rsqrtf(float(D)));
          const float shift = Base::template shift_of<S::KEY_BITS>(scale, total);
          infos(bytes)[4 * (first + t) + q] = {scale, shift, at[t].begin, at[t].end};
        }
      }
    }
    __syncwarp();
#pragma unroll
    for (int t = 0; t < RT; t++) {
      reference[t] = NOTHING, sum[t] = 0, weighted[t] = 0;
#pragma unroll
      for (int n = 0; n < D / 8; n++) output[t][n >> 3][n >> 2 & 1][n & 3] = 0;
    }
    value_unit = 0;
  }

  __device__ __forceinline__ void add(const uint8_t* stage, uint8_t* bytes, int position, const float (&offset)[RT],
                                      float soft_cap, int lane) {
#pragma unroll 1
    for (int t = 0; t < S::TILES; t++)
      add_tile(stage + t * S::TILE_BYTES, bytes, position + t * TILE_TOKENS, offset, soft_cap, lane);
  }

  __device__ __forceinline__ void add_tile(const uint8_t* tile, uint8_t* bytes, int position, const float (&offset)[RT],
                                           float soft_cap, int lane) {
    const int q = lane & 3, g = lane >> 2;
    const RowInfo* info = infos(bytes) + q;
    float score[RT][2], value_scale[2];
    {
      int product[RT][4];
      const uint2* operands = reinterpret_cast<const uint2*>(bytes) + lane;
#pragma unroll
      for (int c = 0; c < Key::STEPS / Key::CHUNK; c++) {
        Key first, second;
        first.load(tile, g, c, q);
        second.load(tile, g + 8, c, q);
#pragma unroll
        for (int i = 0; i < Key::CHUNK; i++) {
          uint32_t a[4];
          first.get(i, a[0], a[2]);
          second.get(i, a[1], a[3]);
          const int s = c * Key::CHUNK + i;
#pragma unroll
          for (int r = 0; r < RT; r++) {
            const uint2 b = operands[(s * RT + r) * 32];
            if (s == 0)
              mma_s8_first(product[r], a[0], a[1], a[2], a[3], b.x, b.y);
            else
              mma_s8(product[r], a[0], a[1], a[2], a[3], b.x, b.y);
          }
        }
      }
      const __half* key_scale = reinterpret_cast<const __half*>(tile + S::Page::KEY_SCALE);
      const __half* scale_of_value = reinterpret_cast<const __half*>(tile + S::Page::VALUE_SCALE);
      float scale[2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        scale[h] = __half2float(key_scale[g + 8 * h]);
        value_scale[h] = __half2float(scale_of_value[g + 8 * h]);
      }
#pragma unroll
      for (int r = 0; r < RT; r++) {
        const float2 of_query = *reinterpret_cast<const float2*>(info + 4 * r);
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const float x = fmaf(__int_as_float(product[r][2 * h]) - MAGIC, 128.0f, __int_as_float(product[r][2 * h + 1]));
          score[r][h] = fmaf(fmaf(x, of_query.x, of_query.y), scale[h], offset[r]);
        }
      }
    }
    if (soft_cap > 0) {
      const float c = soft_cap * LOG2_E, inverse = 2 * LOG2_E / c;
#pragma unroll
      for (int r = 0; r < RT; r++)
#pragma unroll
        for (int h = 0; h < 2; h++)  // c tanh(s / c)
          score[r][h] = c - __fdividef(2 * c, 1 + exp2_fast(score[r][h] * inverse));
    }
    if (position < all_begin || position + TILE_TOKENS > all_end) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int token = position + g + 8 * h;
        if (token < begin || token >= end) value_scale[h] = 0;
#pragma unroll
        for (int r = 0; r < RT; r++)
          if (token < info[4 * r].begin || token >= info[4 * r].end) score[r][h] = __int_as_float(0xff800000);
      }
    }

    float weight[RT][2];
    bool overflow = fmaxf(value_scale[0], value_scale[1]) * value_unit > SCALE_OVERFLOW;
#pragma unroll
    for (int r = 0; r < RT; r++) {
#pragma unroll
      for (int h = 0; h < 2; h++) weight[r][h] = exp2_fast(score[r][h] - reference[r]);
      overflow |= weight[r][0] + weight[r][1] > WIDE_OVERFLOW;
    }
    if (__any_sync(~0u, overflow)) {
      const float largest = max_over_tokens(fmaxf(value_scale[0], value_scale[1]));
      const float old_unit = value_unit;
      if (old_unit == 0 || largest * old_unit > SCALE_OVERFLOW)
        value_unit = largest > 0 ? __int_as_float(0x7f000000 - (__float_as_int(largest) & 0x7f800000)) : 1.0f;
      const float rescale = old_unit == 0 ? 0.0f : __fdividef(value_unit, old_unit);
#pragma unroll
      for (int r = 0; r < RT; r++) {
        const float maximum = fmaxf(max_over_tokens(fmaxf(score[r][0], score[r][1])), reference[r]);
        const float shrink = exp2_fast(reference[r] - maximum), shrink_output = shrink * rescale;
        reference[r] = maximum, sum[r] *= shrink, weighted[r] *= shrink_output;
#pragma unroll
        for (int n = 0; n < D / 8; n++) output[r][n >> 3][n >> 2 & 1][n & 3] *= shrink_output;
#pragma unroll
        for (int h = 0; h < 2; h++) weight[r][h] = exp2_fast(score[r][h] - maximum);
      }
    }

    uint32_t weights[RT / 2][2];  // operands B: query rows 8 n + 0..7, tokens 2q and 2q+1 (+8)
    const float scale[2] = {value_scale[0] * value_unit, value_scale[1] * value_unit};
#pragma unroll
    for (int n = 0; n < RT / 2; n++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float a = weight[2 * n][h] * scale[h], b = weight[2 * n + 1][h] * scale[h];
        sum[2 * n] += weight[2 * n][h], sum[2 * n + 1] += weight[2 * n + 1][h];
        if (HAS_HALF<S::VALUE_BITS>) weighted[2 * n] += a, weighted[2 * n + 1] += b;
        const __half2 pair = __floats2half2_rn(a, b);
        weights[n][h] = transpose_8x8(*reinterpret_cast<const uint32_t*>(&pair));
      }

    const uint8_t* section = tile + S::Page::VALUE_PLANE_0;
#pragma unroll
    for (int i = 0; i < D / 64; i++) {
      Value value;
      value.load(section, i, g, q);
      uint32_t codes[2][4];  // four coordinates of tokens 2q, 2q+1, 2q+8, 2q+9, as unsigned bytes 128 too large
#pragma unroll
      for (int k = 0; k < 4; k++) {
        value.get(k, codes[0][k], codes[1][k]);
        codes[0][k] ^= 0x80808080u, codes[1][k] ^= 0x80808080u;
      }
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        uint32_t a[2][4];
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
          for (int k = 0; k < 2; k++) {
            const uint32_t two = prmt(codes[h][2 * k], codes[h][2 * k + 1], j == 0 ? 0x5140 : 0x7362);
            a[0][h + 2 * k] = half_bytes(prmt(two, 0x64646464u, 0x4140));
            a[1][h + 2 * k] = half_bytes(prmt(two, 0x64646464u, 0x4342));
          }
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
          for (int n = 0; n < RT / 2; n++) {
            float d[4];
#pragma unroll
            for (int e = 0; e < 4; e++) d[e] = output[2 * n + (e & 1)][i][e >> 1][j + m];
            mma_16bit(d, false, a[m][0], a[m][1], a[m][2], a[m][3], weights[n][0], weights[n][1]);
#pragma unroll
            for (int e = 0; e < 4; e++) output[2 * n + (e & 1)][i][e >> 1][j + m] = d[e];
          }
      }
    }
  }

  __device__ __forceinline__ void reduce() {
    const float inverse = value_unit > 0 ? __fdividef(1.0f, value_unit) : 0.0f;
#pragma unroll
    for (int t = 0; t < RT; t++) {
      weighted[t] *= inverse;
#pragma unroll
      for (int n = 0; n < D / 8; n++) output[t][n >> 3][n >> 2 & 1][n & 3] *= inverse;
    }
    Base::reduce();
  }
};

}  // namespace tq
