// A block of query rows in the registers of a warp, and its running softmax over the tokens of one KV head.
//
// Lane (g, q) = (lane / 4, lane % 4) has, of query rows q, q + 4, ..: the scores of tokens g and g + 8 of a tile, and the
// coordinates 64 i + 8 g + 0..7 of a query or an output.
#pragma once
#include <type_traits>

#include "codes.cuh"
#include "decode.h"
#include "instructions.cuh"
#include "rows.cuh"
#include "work_list.cuh"

namespace tq {

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;
constexpr float NOTHING = -1e30f;       // reference of a row that has seen no token
constexpr float OVERFLOW = 1048576.0f;  // weights above this move the reference
constexpr float QUERY_MAX = 16256.0f;   // 128 * 127
constexpr float WEIGHT_MAX = 16382.0f;  // 128 * 127 + 127, less one for rounding

__device__ __forceinline__ float max_over_tokens(float x) {  // over the lanes that share lane % 4
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 4));
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 8));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 16));
}

template <class T> __device__ __forceinline__ T sum_over_tokens(T x) {
  x += __shfl_xor_sync(~0u, x, 4);
  x += __shfl_xor_sync(~0u, x, 8);
  return x + __shfl_xor_sync(~0u, x, 16);
}

template <class S> struct RowBlock {
  static constexpr int RT = S::ROW_TILES, D = S::D;
  using Key = KeysOf<S::KEY_BITS, D>;
  using Sketch = KeyCodes<SIGNS, D>;
  using Value = ValuesOf<S::VALUE_BITS, D>;
  using Coordinates = float[D / 64][2][4];  // 64 i + 8 g + 4 h + j at [i][h][j]

  // Operand B of the scores; score = key scale * ((MAGIC + 128 high + low) * scale + shift).
  template <class Codes> struct Query {
    uint32_t bytes[RT][Codes::STEPS][2];
    float scale[RT], shift[RT];
  };
  struct Nothing {};
  Query<Key> query;
  std::conditional_t<S::SKETCH, Query<Sketch>, Nothing> sketched;  // in the space of the key sketches
  float reference[RT];                     // weights are exp2(score - reference)
  float sum[RT];                           // of this lane's weights
  float weighted[RT];                      // of this lane's weights times value scales
  Coordinates output[RT];
  int row_begin[RT], row_end[RT];          // positions that the row sees
  int begin, end, all_begin, all_end;      // positions that any row sees, and that all rows see

  // Multiply by the Sylvester matrix of order D.
  static __device__ __forceinline__ void butterflies(Coordinates& x, int lane) {
#pragma unroll
    for (int m = 1; m < D / 8; m *= 2) {  // bits j0, j1, h, then i
#pragma unroll
      for (int n = 0; n < D / 8; n++) {
        if (n & m) continue;
        float &a = x[n >> 3][n >> 2 & 1][n & 3], &b = x[(n | m) >> 3][(n | m) >> 2 & 1][(n | m) & 3];
        const float sum = a + b, difference = a - b;
        a = sum, b = difference;
      }
    }
#pragma unroll
    for (int m = 4; m < 32; m *= 2) {
      const float sign = lane & m ? -1.0f : 1.0f;
#pragma unroll
      for (int n = 0; n < D / 8; n++) {
        float& a = x[n >> 3][n >> 2 & 1][n & 3];
        a = fmaf(a, sign, __shfl_xor_sync(~0u, a, m));
      }
    }
  }

  template <class T = SignTable<D>> static __device__ __forceinline__ void flip_signs(Coordinates& x, int lane) {
    const int g = lane >> 2;
#pragma unroll
    for (int i = 0; i < D / 64; i++) {
      const uint32_t signs = (g < 4 ? T::at(2 * i) : T::at(2 * i + 1)) >> 8 * (g & 3);
#pragma unroll
      for (int n = 0; n < 8; n++) {
        float& a = x[i][n >> 2][n & 3];
        a = __uint_as_float(__float_as_uint(a) ^ (signs << 31 - n & 0x80000000u));
      }
    }
  }

  // Row `row` of the block at `c`: the query it is, and the positions it sees.
  struct Place {
    bool real;
    int token, member, begin, end;
    __device__ __forceinline__ int64_t query(const DecodeParams& p, const Cursor& c) const {
      return (c.request.query_start + token) * p.query_stride_token +
             (c.head * p.group_size + member) * p.query_stride_head;
    }
  };
  static __device__ __forceinline__ Place place(const DecodeParams& p, const Cursor& c, int row) {
    Place at;
    row += c.row_block * S::ROWS;
    at.real = row < c.request.query_len * p.group_size;
    at.token = unsigned(row) / unsigned(p.group_size), at.member = row - at.token * p.group_size;
    const int context = c.request.seq_len - c.request.query_len;
    at.end = at.real ? context + at.token + 1 : c.request.seq_len;
    at.begin = at.real && p.sliding_window > 0 ? context + at.token + 1 - p.sliding_window : 0;
    return at;
  }

  __device__ __forceinline__ void set_limits(const DecodeParams& p, const Cursor& c) {
    const int num_rows = c.request.query_len * p.group_size, first_row = c.row_block * S::ROWS;
    const int context = c.request.seq_len - c.request.query_len;
    const int first_position = context + first_row / p.group_size;
    const int last_position = context + (min(first_row + S::ROWS, num_rows) - 1) / p.group_size;
    begin = p.sliding_window > 0 ? first_position - p.sliding_window + 1 : 0;
    all_begin = p.sliding_window > 0 ? last_position - p.sliding_window + 1 : 0;
    end = min(last_position + 1, c.request.seq_len);
    all_end = first_position + 1;
  }

  // Begin to load the rows of the unit at `c`; `bits` are for `prepare`.
  struct QueryBits {
    float x[RT][D / 64][8];
  };
  __device__ __forceinline__ void fetch(const DecodeParams& p, const Cursor& c, QueryBits& bits, int lane) {
    const int q = lane & 3, g = lane >> 2;
#pragma unroll
    for (int t = 0; t < RT; t++) {
      const Place at = place(p, c, 4 * t + q);
      row_begin[t] = at.begin, row_end[t] = at.end;
      load_bits(bits.x[t], p.query, at.query(p, c) + 8 * g, p.dtype, p.vector_rows, at.real);
    }
    set_limits(p, c);
  }

  // Rotate and quantize the query and start the softmax. bytes: [ROWS][high, low][D] of this warp.
  __device__ __forceinline__ void prepare(const DecodeParams& p, const Cursor&, const QueryBits& bits, uint8_t* bytes, int lane) {
    __syncwarp();
    Coordinates x[RT];
#pragma unroll
    for (int t = 0; t < RT; t++) {
#pragma unroll
      for (int n = 0; n < D / 8; n++) x[t][n >> 3][n >> 2 & 1][n & 3] = float_of_bits(bits.x[t][n >> 3], n & 7, p.dtype);
      rotate(x[t], lane);
      write_bytes<S::KEY_BITS>(p, x[t], t, rsqrtf(float(D)), query, bytes, lane);
    }
    __syncwarp();
    read_bytes<Key>(query, bytes, lane);
    if constexpr (S::SKETCH) {
      __syncwarp();
#pragma unroll
      for (int t = 0; t < RT; t++) {
        rotate<SketchSignTable<D>>(x[t], lane);
        write_bytes<SIGNS>(p, x[t], t, 1.0f / D, sketched, bytes, lane);
      }
      __syncwarp();
      read_bytes<Sketch>(sketched, bytes, lane);
    }
#pragma unroll
    for (int t = 0; t < RT; t++) {
      reference[t] = NOTHING, sum[t] = 0, weighted[t] = 0;
#pragma unroll
      for (int n = 0; n < D / 64 * 8; n++) output[t][n >> 3][n >> 2 & 1][n & 3] = 0;
    }
  }

  // Quantize rows 4 t .. 4 t + 3, whose rotated coordinates are `normaliser` times x, for scores with codes of a width.
  template <int BITS, class Q>
  static __device__ __forceinline__ void write_bytes(const DecodeParams& p, const Coordinates& x, int t, float normaliser, Q& to,
                                                     uint8_t* bytes, int lane) {
    const int g = lane >> 2, row = 4 * t + (lane & 3);
    float maximum = largest(x);
    int total = 0;
    const float inverse = maximum > 0 ? __fdividef(QUERY_MAX, maximum) : 0.0f;
#pragma unroll
    for (int i = 0; i < D / 64; i++) {
      uint32_t high[2] = {}, low[2] = {};
#pragma unroll
      for (int n = 0; n < 8; n++) quantize(x[i][n >> 2][n & 3], inverse, total, high[n >> 2], low[n >> 2]);
      *reinterpret_cast<uint2*>(bytes + 2 * row * D + 64 * i + 8 * g) = make_uint2(high[0], high[1]);
      *reinterpret_cast<uint2*>(bytes + (2 * row + 1) * D + 64 * i + 8 * g) = make_uint2(low[0], low[1]);
    }
    // A NaN escapes fmaxf: let it reach the scores.
    if (x[0][0][0] != x[0][0][0]) maximum = x[0][0][0];
    to.scale[t] = scale_of<BITS>(p, maximum, normaliser);
    to.shift[t] = shift_of<BITS>(to.scale[t], sum_over_tokens(total));
  }

  template <class Codes, class Q> static __device__ __forceinline__ void read_bytes(Q& to, const uint8_t* bytes, int lane) {
    const int q = lane & 3, g = lane >> 2;
#pragma unroll
    for (int t = 0; t < RT; t++)
#pragma unroll
      for (int s = 0; s < Codes::STEPS; s++) {
        const int group = Codes::group_of(q, s);
        const uint2 w = *reinterpret_cast<const uint2*>(bytes + (2 * (4 * t + (g >> 1)) + (g & 1)) * D + 8 * group);
        to.bytes[t][s][0] = w.x, to.bytes[t][s][1] = w.y;
      }
  }

  // x in steps of 1 / inverse is 128 * high + low, with high -127..127 and low 0..127; shifted in as top bytes.
  static __device__ __forceinline__ void quantize(float x, float inverse, int& total, uint32_t& high, uint32_t& low) {
    const int n = __float_as_int(fmaf(x, inverse, MAGIC)) - MAGIC_BITS;
    total += n;
    high = prmt(high, n << 1, 0x5321);
    low = prmt(low, n & 127, 0x4321);
  }

  template <class T = SignTable<D>> static __device__ __forceinline__ void rotate(Coordinates& x, int lane) {
    flip_signs<T>(x, lane);
    butterflies(x, lane);
  }
  static __device__ __forceinline__ float largest(const Coordinates& x) {
    float maximum = 0;
#pragma unroll
    for (int n = 0; n < D / 8; n++) maximum = fmaxf(maximum, fabsf(x[n >> 3][n >> 2 & 1][n & 3]));
    return max_over_tokens(maximum);
  }
  // Of rows whose largest rotated coordinate is normaliser * maximum, for scores with codes of a width.
  template <int BITS>
  static __device__ __forceinline__ float scale_of(const DecodeParams& p, float maximum, float normaliser) {
    return maximum * (1.0f / QUERY_MAX) * normaliser * p.softmax_scale * LOG2_E * centroid_unit<BITS>();
  }
  template <int BITS> static __device__ __forceinline__ float shift_of(float scale, int total) {
    return ((HAS_HALF<BITS> ? 0.5f * total : 0.0f) - MAGIC) * scale;
  }

  // Scores of the 16 tokens of a section of key codes, without their scales: of tokens g and g + 8 at [r][0] and [r][1].
  template <class Codes, class Q>
  static __device__ __forceinline__ void multiply(const uint8_t* section, const Q& with, float (&score)[RT][2], int lane) {
    const int q = lane & 3, g = lane >> 2;
    int product[RT][4];
#pragma unroll
    for (int c = 0; c < Codes::STEPS / Codes::CHUNK; c++) {
      Codes first, second;
      first.load(section, g, c, q);
      second.load(section, g + 8, c, q);
#pragma unroll
      for (int i = 0; i < Codes::CHUNK; i++) {
        uint32_t a[4];
        first.get(i, a[0], a[2]);
        second.get(i, a[1], a[3]);
        const int s = c * Codes::CHUNK + i;
#pragma unroll
        for (int r = 0; r < RT; r++)
          if (s == 0)
            mma_s8_first(product[r], a[0], a[1], a[2], a[3], with.bytes[r][s][0], with.bytes[r][s][1]);
          else
            mma_s8(product[r], a[0], a[1], a[2], a[3], with.bytes[r][s][0], with.bytes[r][s][1]);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int r = 0; r < RT; r++) {
        const float x = fmaf(__int_as_float(product[r][2 * h]) - MAGIC, 128.0f, __int_as_float(product[r][2 * h + 1]));
        score[r][h] = fmaf(x, with.scale[r], with.shift[r]);
      }
  }

  // Add the tokens of a group, first position `position`, whose records stand in `stage`; offset: added to every score.
  __device__ __forceinline__ void add(const uint8_t* stage, const uint8_t*, int position, const float (&offset)[RT], float soft_cap, int lane) {
    const int q = lane & 3, g = lane >> 2;
    const bool edge = position < all_begin || position + TILE_TOKENS * S::TILES > all_end;
    float score[S::TILES][RT][2], value_scale[S::TILES][2];
#pragma unroll
    for (int t = 0; t < S::TILES; t++) {
      const uint8_t* tile = stage + t * S::TILE_BYTES;
      float product[RT][2], correction[RT][2];
      multiply<Key>(tile, query, product, lane);
      if constexpr (S::SKETCH) multiply<Sketch>(tile + S::Page::SKETCH_PLANE, sketched, correction, lane);
      const __half* key_scale = reinterpret_cast<const __half*>(tile + S::Page::KEY_SCALE);
      const __half* scale_of_value = reinterpret_cast<const __half*>(tile + S::Page::VALUE_SCALE);
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float scale = __half2float(key_scale[g + 8 * h]);
        value_scale[t][h] = __half2float(scale_of_value[g + 8 * h]);
#pragma unroll
        for (int r = 0; r < RT; r++) score[t][r][h] = fmaf(product[r][h], scale, offset[r]);
        if constexpr (S::SKETCH) {
          const float sketch_scale = __half2float(reinterpret_cast<const __half*>(tile + S::Page::SKETCH_SCALE)[g + 8 * h]);
#pragma unroll
          for (int r = 0; r < RT; r++) score[t][r][h] = fmaf(correction[r][h], sketch_scale, score[t][r][h]);
        }
      }
    }
    if (soft_cap > 0) {
      const float c = soft_cap * LOG2_E, inverse = 2 * LOG2_E / c;
#pragma unroll
      for (int t = 0; t < S::TILES; t++)
#pragma unroll
        for (int r = 0; r < RT; r++)
#pragma unroll
          for (int h = 0; h < 2; h++)  // c tanh(s / c)
            score[t][r][h] = c - __fdividef(2 * c, 1 + exp2_fast(score[t][r][h] * inverse));
    }
    if (edge) {
#pragma unroll
      for (int t = 0; t < S::TILES; t++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int token = position + TILE_TOKENS * t + g + 8 * h;
          if (token < begin || token >= end) value_scale[t][h] = 0;
#pragma unroll
          for (int r = 0; r < RT; r++)
            if (token < row_begin[r] || token >= row_end[r]) score[t][r][h] = __int_as_float(0xff800000);
        }
    }

    float weight[S::TILES][RT][2], added[RT];
    bool overflow = false;
#pragma unroll
    for (int r = 0; r < RT; r++) {
      added[r] = 0;
#pragma unroll
      for (int t = 0; t < S::TILES; t++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          weight[t][r][h] = exp2_fast(score[t][r][h] - reference[r]);
          added[r] += weight[t][r][h];
        }
      overflow |= added[r] > OVERFLOW;
    }
    if (__any_sync(~0u, overflow)) {
#pragma unroll
      for (int r = 0; r < RT; r++) {
        float maximum = score[0][r][0];
#pragma unroll
        for (int t = 0; t < S::TILES; t++) maximum = fmaxf(maximum, fmaxf(score[t][r][0], score[t][r][1]));
        maximum = fmaxf(max_over_tokens(maximum), reference[r]);
        const float shrink = exp2_fast(reference[r] - maximum);
        reference[r] = maximum, sum[r] *= shrink, weighted[r] *= shrink, added[r] = 0;
#pragma unroll
        for (int i = 0; i < D / 64; i++)
#pragma unroll
          for (int h = 0; h < 2; h++)
#pragma unroll
            for (int j = 0; j < 4; j++) output[r][i][h][j] *= shrink;
#pragma unroll
        for (int t = 0; t < S::TILES; t++)
#pragma unroll
          for (int h = 0; h < 2; h++) {
            weight[t][r][h] = exp2_fast(score[t][r][h] - reference[r]);
            added[r] += weight[t][r][h];
          }
      }
    }

    float unit[RT];                       // of the integers that stand for weights
    uint32_t packed[S::TILES][RT];        // bytes: high of token g, high of g + 8, low, low
#pragma unroll
    for (int r = 0; r < RT; r++) {
      sum[r] += added[r];
      float maximum = 1e-30f;
#pragma unroll
      for (int t = 0; t < S::TILES; t++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          weight[t][r][h] *= value_scale[t][h];
          weighted[r] += weight[t][r][h];
          maximum = fmaxf(maximum, weight[t][r][h]);
        }
      maximum = max_over_tokens(maximum);
      unit[r] = maximum * (1.0f / WEIGHT_MAX);
      const float inverse = __fdividef(WEIGHT_MAX, maximum);
#pragma unroll
      for (int t = 0; t < S::TILES; t++) {
        const uint32_t n = prmt(__float_as_uint(fmaf(weight[t][r][0], inverse, 8388608.0f)),
                                __float_as_uint(fmaf(weight[t][r][1], inverse, 8388608.0f)), 0x5410);  // two 14-bit integers
        packed[t][r] = prmt(n + (n & 0x3f803f80u), 0, 0x2031);
      }
    }

    int product[RT][D / 64][4][4];
#pragma unroll
    for (int t = 0; t < S::TILES; t++) {
      const uint8_t* section = stage + t * S::TILE_BYTES + S::Page::VALUE_PLANE_0;
      uint32_t weights[RT][2][4][2];  // operands B: step, coordinate of the half group, tokens 2q (+8), 2q+1 (+8)
#pragma unroll
      for (int r = 0; r < RT; r++) {
        const uint32_t w = transpose_8x8(packed[t][r]);  // bytes: tokens 2q, 2q+8, 2q+1, 2q+9; even g high, odd g low
#pragma unroll
        for (int s = 0; s < 2; s++)
#pragma unroll
          for (int k = 0; k < 2; k++)
#pragma unroll
            for (int j = 0; j < 4; j++)
              weights[r][s][j][k] = j == 0 ? prmt(w, 0, 0x4440 + s + 2 * k) : weights[r][s][0][k] * (1u << 8 * j);
      }
#pragma unroll
      for (int i = 0; i < D / 64; i++) {
        Value value;
        value.load(section, i, g, q);
#pragma unroll
        for (int s = 0; s < 2; s++) {
          uint32_t a[4];
          value.get(2 * s, a[0], a[1]);
          value.get(2 * s + 1, a[2], a[3]);
#pragma unroll
          for (int r = 0; r < RT; r++)
#pragma unroll
            for (int j = 0; j < 4; j++)
              if (t == 0 && s == 0)
                mma_s8_first(product[r][i][j], a[0], a[1], a[2], a[3], weights[r][s][j][0], weights[r][s][j][1]);
              else
                mma_s8(product[r][i][j], a[0], a[1], a[2], a[3], weights[r][s][j][0], weights[r][s][j][1]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < RT; r++)
#pragma unroll
      for (int i = 0; i < D / 64; i++)
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
          for (int j = 0; j < 4; j++) {
            const int* n = product[r][i][j] + 2 * h;
            const float x = fmaf(__int_as_float(n[0]) - MAGIC, 128.0f, __int_as_float(n[1]) - MAGIC);
            output[r][i][h][j] = fmaf(x, unit[r], output[r][i][h][j]);
          }
  }

  // Weighted sums of values, rotated and not divided by the sum of weights, into `output`; sums into every lane.
  __device__ __forceinline__ void reduce() {
#pragma unroll
    for (int t = 0; t < RT; t++) {
      sum[t] = sum_over_tokens(sum[t]);
      const float half = HAS_HALF<S::VALUE_BITS> ? 0.5f * sum_over_tokens(weighted[t]) : 0.0f;
#pragma unroll
      for (int n = 0; n < D / 64 * 8; n++) {
        float& x = output[t][n >> 3][n >> 2 & 1][n & 3];
        x = (x + half) * centroid_unit<S::VALUE_BITS>();
      }
    }
  }

  // After `reduce`: leave rows of output [D], reference, sum.
  __device__ __forceinline__ void write(float* partial, int lane) const {
    const int q = lane & 3, g = lane >> 2;
#pragma unroll
    for (int t = 0; t < RT; t++) {
      float* row = partial + (4 * t + q) * S::PARTIAL_ROW;
      if (g == 0) *reinterpret_cast<float2*>(row + D) = make_float2(reference[t], sum[t]);
#pragma unroll
      for (int i = 0; i < D / 64; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const float* x = output[t][i][h];
          *reinterpret_cast<float4*>(row + 64 * i + 8 * g + 4 * h) = make_float4(x[0], x[1], x[2], x[3]);
        }
    }
  }

  // After `reduce`, of a whole unit: rotate back and store.
  __device__ __forceinline__ void finish(const DecodeParams& p, const Cursor& c, int lane) {
    const int q = lane & 3, g = lane >> 2;
    const int num_rows = c.request.query_len * p.group_size;
#pragma unroll
    for (int t = 0; t < RT; t++) {
      const int row = c.row_block * S::ROWS + 4 * t + q;
      const int token = unsigned(row) / unsigned(p.group_size), member = row - token * p.group_size;
      butterflies(output[t], lane);
      flip_signs(output[t], lane);
      if (row >= num_rows) continue;
      const float scale =
          finish_row(p, c.request.query_start + token, c.head * p.group_size + member, reference[t], sum[t], g == 0);
      const int64_t base = (c.request.query_start + token) * p.out_stride_token +
                           (c.head * p.group_size + member) * p.out_stride_head + 8 * g;
#pragma unroll
      for (int i = 0; i < D / 64; i++) {
        float x[8];
#pragma unroll
        for (int n = 0; n < 8; n++) x[n] = sum[t] == 0 ? 0.0f : output[t][i][n >> 2][n & 3] * scale;
        store_eight(p.out, base + 64 * i, p.dtype, p.vector_rows, x);
      }
    }
  }

  // What to multiply a row by that was rotated back; stores its lse.
  static __device__ __forceinline__ float finish_row(const DecodeParams& p, int token, int head, float reference, float sum,
                                                     bool store_lse) {
    float total = sum;
    if (p.sinks) total += exp2_fast(load_float(p.sinks, head, p.sinks_dtype) * LOG2_E - reference);
    if (p.lse && store_lse)
      p.lse[head * p.lse_stride_head + token] = sum == 0 ? __int_as_float(0xff800000) : reference * LN_2 + logf(sum);
    return rsqrtf(float(D)) / total;
  }
};

}  // namespace tq
