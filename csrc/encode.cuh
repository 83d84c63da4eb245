// Encoding of vectors that a few lanes of a warp hold: rotate, search the scale, quantize, pack, write to a page.
//
// The work is in the scale search: 9 candidates x head_dim coordinates, each a nearest-level look-up. The thresholds of a page
// codebook are integers in units, so that cell = floor(magnitude / (candidate * unit)) decides the level exactly (as in
// tq_vllm/core/quantizers.py). A table over cells gives the level as a float, with its index in the lowest mantissa bits. Per
// coordinate and candidate that is FFMA (floor), IMAD (address), LDS, FFMA (dot product), FFMA (norm).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "codebook.cuh"
#include "instructions.cuh"
#include "layout.cuh"
#include "rotation.cuh"
#include "store_kv.h"

namespace tq {

constexpr float FLOAT16_MAX = 65504.f;
constexpr float FLOOR_BIAS = 8388608.f;  // 2^23: adding it with rounding down leaves floor(x) in the low mantissa bits
constexpr uint32_t INDEX_MASK = 15;  // a level 2m+1 has 8 significant bits: its low mantissa bits are free
constexpr float FLOAT32_MAX = 3.402823466e38f;

// A table of levels in shared memory, a row of ROW_BYTES for every cell.
template <uint32_t ROW_BYTES>
struct LevelsOfCells {
  static constexpr uint32_t FLOOR_BIAS_ADDRESS = 0x4b000000u * ROW_BYTES;  // of the bits of 2^23, modulo 2^32
  uint32_t base;

  __device__ __forceinline__ explicit LevelsOfCells(const void* entry_of_row_0)
      : base(static_cast<uint32_t>(__cvta_generic_to_shared(entry_of_row_0)) - FLOOR_BIAS_ADDRESS) {}
  __device__ __forceinline__ uint32_t entry(float magnitude, float cells_per_unit) const {
    return load_shared(__float_as_uint(__fmaf_rd(magnitude, cells_per_unit, FLOOR_BIAS)) * ROW_BYTES + base);
  }
};

// An entry of the row of `cell`: the level 2m+1 of that cell as a float whose low bits are the level's index: of the floats with
// these low bits the nearest one, at most 8 units in the last place away.
template <int BITS>
__device__ __forceinline__ uint32_t table_entry(int cell) {
  int m = LevelTable<BITS>::at(0), index = 0;
#pragma unroll
  for (int t = 0; t < StepTable<BITS>::COUNT; t++) {
    if (cell >= StepTable<BITS>::at(t)) m = LevelTable<BITS>::at(t + 1), index = t + 1;
  }
  return __float_as_uint(2.f * m + 1.f) + index - (index > 8 ? 16 : 0);
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

// x[j] <- RUN consecutive elements with their random signs; i: place of the first among the lane's coordinates.
template <int RUN, typename T>
__device__ __forceinline__ void load_run(const T* source, bool vector_loads, uint32_t signs, int i, float (&x)[RUN]) {
  constexpr int BYTES = RUN * sizeof(T), WORDS = BYTES / 4;
  if (vector_loads && WORDS > 0) {
    uint32_t word[WORDS > 0 ? WORDS : 1];
    if constexpr (BYTES % 16 == 0) {
#pragma unroll
      for (int w = 0; w < WORDS; w += 4) {
        const uint4 piece = reinterpret_cast<const uint4*>(source)[w / 4];
        word[w] = piece.x, word[w + 1] = piece.y, word[w + 2] = piece.z, word[w + 3] = piece.w;
      }
    } else {
#pragma unroll
      for (int w = 0; w < WORDS; w++) word[w] = reinterpret_cast<const uint32_t*>(source)[w];
    }
#pragma unroll
    for (int w = 0; w < WORDS; w++) {
      if constexpr (sizeof(T) == 4) {
        x[w] = flip_sign(__uint_as_float(word[w]), signs, i + w);
      } else {
        const uint32_t pair = flip_signs(word[w], signs, i + 2 * w);
        x[2 * w] = to_float(*reinterpret_cast<const T*>(&pair));
        x[2 * w + 1] = to_float(reinterpret_cast<const T*>(&pair)[1]);
      }
    }
  } else {
#pragma unroll
    for (int j = 0; j < RUN; j++) x[j] = flip_sign(to_float(source[j]), signs, i + j);
  }
}

template <class Shape, bool SUBTRACT, typename T>
__device__ __forceinline__ void load_rows(
    const void* source, int64_t start, bool vector_loads, uint32_t signs, float (&x)[Shape::ROWS][Shape::RUN]) {
  const T* from = static_cast<const T*>(source) + start;
#pragma unroll
  for (int r = 0; r < Shape::ROWS; r++) {
    float row[Shape::RUN];
    load_run<Shape::RUN>(from + r * Shape::STRIDE, vector_loads, signs, r * Shape::RUN, row);
#pragma unroll
    for (int j = 0; j < Shape::RUN; j++) x[r][j] = SUBTRACT ? x[r][j] - row[j] : row[j];
  }
}

// x <- the lane's coordinates of the vector at element `start` of `source`, with their random signs; or x minus them.
template <class Shape, bool SUBTRACT>
__device__ __forceinline__ void load_vector(
    const void* source, int dtype, int64_t start, bool vector_loads, uint32_t signs, int q,
    float (&x)[Shape::ROWS][Shape::RUN]) {
  start += q * Shape::RUN;
  if (dtype == BFLOAT16) {
    load_rows<Shape, SUBTRACT, __nv_bfloat16>(source, start, vector_loads, signs, x);
  } else if (dtype == FLOAT16) {
    load_rows<Shape, SUBTRACT, __half>(source, start, vector_loads, signs, x);
  } else {
    load_rows<Shape, SUBTRACT, float>(source, start, vector_loads, signs, x);
  }
}

// How the words of a plane are spread over the lanes of a vector: GROUP lanes hold parts of the same SLOTS words.
template <class Shape, int PLANE_BITS>
struct PlaneShape {
  static constexpr int WIDTH = 32 / PLANE_BITS;  // coordinates a word
  static constexpr bool WHOLE = Shape::RUN >= WIDTH;  // a lane holds whole words
  static constexpr bool ROW_WORDS = Shape::STRIDE >= WIDTH;  // a row holds whole words
  static constexpr int GROUP = WHOLE ? 1 : ROW_WORDS ? WIDTH / Shape::RUN : Shape::LANES;
  static constexpr int ROWS_A_WORD = ROW_WORDS ? 1 : WIDTH / Shape::STRIDE;
  static constexpr int SLOTS_A_ROW = WHOLE ? Shape::RUN / WIDTH : 1;
  static constexpr int SLOTS = (Shape::ROWS + ROWS_A_WORD - 1) / ROWS_A_WORD * SLOTS_A_ROW;

  __device__ static constexpr int slot(int r, int j) { return r / ROWS_A_WORD * SLOTS_A_ROW + (WHOLE ? j / WIDTH : 0); }
  // Coordinate (r, j) of lane 0, counted from the start of its word.
  __device__ static constexpr int place(int r, int j) { return (r % ROWS_A_WORD * Shape::STRIDE + j) % WIDTH; }
  __device__ static int word(int slot, int q) {
    if (WHOLE) return slot / SLOTS_A_ROW * (Shape::STRIDE / WIDTH) + q * SLOTS_A_ROW + slot % SLOTS_A_ROW;
    return ROW_WORDS ? slot * (Shape::STRIDE / WIDTH) + q / GROUP : slot;
  }
  // What a lane's place adds to the bits of `coordinate_bit(place)`.
  __device__ static int lane_bit(int q) { return WHOLE ? 0 : coordinate_bit(PLANE_BITS, q * Shape::RUN % WIDTH); }
};

// The same for the sign bits of plane 4: the bit of coordinate (r, j) is constant_bit + lane_bit, neither negative.
template <int RUN>
struct Plane4Signs {
  __device__ static constexpr int constant_bit(int r, int j) { return RUN == 8 ? sign_bit(j) : RUN == 1 ? (r & 1 ? 3 : 7) : 8 * j; }
  __device__ static int lane_bit(int q) { return RUN == 8 ? 0 : RUN == 1 ? 8 * q : 16 * (q & 1) + (q & 2 ? 3 : 7); }
};

// Where a token's words and scale go: nullptr base = nowhere.
struct Destination {
  uint8_t* tile;
  int token;  // 0..15, permuted for values
};

// Joins the parts of the GROUP lanes of each word and writes the words to the page.
template <class Shape, int PLANE_BITS>
__device__ __forceinline__ void write_plane(
    uint32_t (&words)[PlaneShape<Shape, PLANE_BITS>::SLOTS], const StoreRole& role, int plane, Destination to, int q) {
  using Plane = PlaneShape<Shape, PLANE_BITS>;
  uint8_t* row = to.tile + role.plane[plane] + to.token * role.token_bytes[plane];
  const int word_bytes = role.word_bytes;
#pragma unroll
  for (int s = 0; s < Plane::SLOTS; s++) {
#pragma unroll
    for (int m = 1; m < Plane::GROUP; m *= 2) words[s] |= __shfl_xor_sync(ALL_LANES, words[s], m);
    if (to.tile != nullptr && s % Plane::GROUP == q % Plane::GROUP)
      *reinterpret_cast<uint32_t*>(row + Plane::word(s, q) * word_bytes) = words[s];
  }
}

// offset: of the scales in the tile record; token: 0..15, not permuted.
__device__ __forceinline__ void write_scale(float scale, int offset, int token, Destination to, int q) {
  if (to.tile != nullptr && q == 0)
    *reinterpret_cast<__half*>(to.tile + offset + 2 * token) = __float2half_rn(fminf(scale, FLOAT16_MAX));
}

// The tile record of a slot.
__device__ __forceinline__ uint8_t* tile_of(const StoreParams& params, uint32_t slot, int head) {
  const uint32_t block = slot / params.block_size, in_block = slot - block * params.block_size;
  return params.kv_cache + block * params.block_stride + head * params.head_stride + in_block / TILE_TOKENS * params.tile_bytes;
}

// x <- H x; returns its length. What is zero, has a NaN or inf, or is above the range of float32 becomes the zero vector, of
// length 0.
template <class Shape>
__device__ __forceinline__ float rotate(float (&x)[Shape::ROWS][Shape::RUN], int q) {
  hadamard<Shape>(x, q);
  float square = 0.f;
#pragma unroll
  for (int r = 0; r < Shape::ROWS; r++) {
#pragma unroll
    for (int j = 0; j < Shape::RUN; j++) square = fmaf(x[r][j], x[r][j], square);
  }
  float length = sqrtf(sum_lanes<Shape::LANES>(square));
  const bool empty = !(length > 0.f && length <= FLOAT32_MAX);
  if (__any_sync(ALL_LANES, empty)) {
    if (empty) length = 0.f;
#pragma unroll
    for (int r = 0; r < Shape::ROWS; r++) {
#pragma unroll
      for (int j = 0; j < Shape::RUN; j++) x[r][j] = empty ? 0.f : x[r][j];
    }
  }
  return length;
}

// 1 / sqrt(x) to the last digit: the approximation alone would decide between candidates that are 2^-22 apart.
__device__ __forceinline__ float inverse_root(float x) {
  const float r = rsqrtf(x);
  return fmaf(0.5f * r, fmaf(-x * r, r, 1.f), r);
}

// Signs and scale of the second rotation of a residual (TurboQuant Alg. 2 lines 6 and 7; core/qjl.py). x: the residual of
// the rotated vector times `per_unit`.
template <class Shape>
__device__ __forceinline__ void write_sketch(
    float (&x)[Shape::ROWS][Shape::RUN], float per_unit, const StoreRole& role, Destination to, int q) {
  using Plane = PlaneShape<Shape, 1>;
  const uint32_t signs = lane_signs<Shape, SketchSignTable<Shape::HEAD_DIM>>(q);
  float square = 0.f;
#pragma unroll
  for (int r = 0; r < Shape::ROWS; r++) {
#pragma unroll
    for (int j = 0; j < Shape::RUN; j++) {
      square = fmaf(x[r][j], x[r][j], square);
      x[r][j] = flip_sign(x[r][j], signs, r * Shape::RUN + j);
    }
  }
  const float norm = sqrtf(sum_lanes<Shape::LANES>(square));
  hadamard<Shape>(x, q);
  uint32_t words[Plane::SLOTS] = {};
#pragma unroll
  for (int r = 0; r < Shape::ROWS; r++) {
#pragma unroll
    for (int j = 0; j < Shape::RUN; j++)  // not the sign bit: a zero is positive
      words[Plane::slot(r, j)] |= static_cast<uint32_t>(x[r][j] < 0.f) << coordinate_bit(1, Plane::place(r, j));
  }
#pragma unroll
  for (int s = 0; s < Plane::SLOTS; s++) words[s] <<= Plane::lane_bit(q);
  write_plane<Shape, 1>(words, role, 2, to, q);
  write_scale(norm * per_unit * role.sketch_gain, role.sketch_scale, to.token, to, q);  // a key's token is not permuted
}

// 2 to 5 bits: the page codebook with the best scale candidate. x: rotated, of length `length`, all 0 and 0 for an empty
// vector. SKETCH: and the sketch of what the codes miss. Returns the scale.
template <class Shape, int BITS, bool SKETCH = false, class Table>
__device__ __forceinline__ float encode_levels(
    float (&x)[Shape::ROWS][Shape::RUN], float length, const StoreRole& role, const Table& table, Destination to, int q) {
  constexpr int MAIN = plane_bits(BITS, 0);  // plane of the index; in plane 4 with the sign, in plane 2 too for 2 bits
  using Main = PlaneShape<Shape, MAIN>;
  using Extra = PlaneShape<Shape, 1>;
  using Signs = Plane4Signs<Shape::RUN>;
  constexpr float LAST_LEVEL = 2 * LevelTable<BITS>::at(LevelTable<BITS>::COUNT - 1) + 1;
  const float root = sqrtf(static_cast<float>(Shape::HEAD_DIM));
  const float gain = length > 0.f ? root / length : 0.f;

  uint32_t main[Main::SLOTS] = {}, signs[Main::SLOTS] = {}, extra[Extra::SLOTS] = {};
  float dot_above = 0.f;  // what magnitudes above the cap add to every candidate's dot product
#pragma unroll
  for (int r = 0; r < Shape::ROWS; r++) {
#pragma unroll
    for (int j = 0; j < Shape::RUN; j++) {
      const uint32_t negative = __float_as_uint(x[r][j]) >> 31;
      if constexpr (BITS == 3) {
        extra[Extra::slot(r, j)] |= negative << coordinate_bit(1, Extra::place(r, j));
      } else if constexpr (BITS == 2) {
        main[Main::slot(r, j)] |= negative << (coordinate_bit(2, Main::place(r, j)) + 1);
      } else {
        signs[Main::slot(r, j)] |= negative << Signs::constant_bit(r, j);
      }
      const float magnitude = fabsf(x[r][j]) * gain;
      const float capped = fminf(magnitude, role.magnitude_cap);
      dot_above += magnitude - capped;
      x[r][j] = SKETCH ? x[r][j] * gain : capped;
    }
  }
  dot_above *= LAST_LEVEL;
  const auto capped = [&](int r, int j) { return SKETCH ? fminf(fabsf(x[r][j]), role.magnitude_cap) : x[r][j]; };

  float best = -1.f, best_cells = role.cells_per_unit[0], best_square = 1.f;
  constexpr int BATCH = Shape::LANES > 8 ? 3 : 1;  // candidates at a time: with few coordinates a lane the sums' latency counts
#pragma unroll 1
  for (int first = 0; first < role.num_candidates; first += BATCH) {
    float cells[BATCH], dot[BATCH], square[BATCH];
#pragma unroll
    for (int k = 0; k < BATCH; k++) {
      cells[k] = role.cells_per_unit[min(first + k, role.num_candidates - 1)];  // the last one again changes nothing
      float dots[2] = {dot_above, 0.f}, squares[2] = {};
#pragma unroll
      for (int r = 0; r < Shape::ROWS; r++) {
#pragma unroll
        for (int j = 0; j < Shape::RUN; j++) {
          const float magnitude = capped(r, j);
          const float level = __uint_as_float(table.entry(magnitude, cells[k]));
          dots[(r + j) % 2] = fmaf(magnitude, level, dots[(r + j) % 2]);
          squares[(r + j) % 2] = fmaf(level, level, squares[(r + j) % 2]);
        }
      }
      dot[k] = dots[0] + dots[1], square[k] = squares[0] + squares[1];
    }
#pragma unroll
    for (int m = 1; m < Shape::LANES; m *= 2) {
#pragma unroll
      for (int k = 0; k < BATCH; k++) {
        dot[k] += __shfl_xor_sync(ALL_LANES, dot[k], m);
        square[k] += __shfl_xor_sync(ALL_LANES, square[k], m);
      }
    }
#pragma unroll
    for (int k = 0; k < BATCH; k++) {
      const float projection = dot[k] * inverse_root(square[k]);  // <u, c> / |c|
      if (projection > best) best = projection, best_cells = cells[k], best_square = square[k];
    }
  }

  const float norm = length / root;  // of the rotated vector with the factor 1 / sqrt(head_dim)
  float scale = norm / root;
  if (role.scale_rule == SCALE_NORM) scale = norm / (sqrtf(best_square) * Unit<BITS>::VALUE);
  if (role.scale_rule == SCALE_UNBIASED) scale = length / (best * sqrtf(best_square) * Unit<BITS>::VALUE);
  // A level in units of x as a reader of the stored scale sees it.
  const float level_seen =
      SKETCH && norm > 0.f ? __half2float(__float2half_rn(fminf(scale, FLOAT16_MAX))) * (Unit<BITS>::VALUE * root / norm) : 0.f;

#pragma unroll
  for (int r = 0; r < Shape::ROWS; r++) {
#pragma unroll
    for (int j = 0; j < Shape::RUN; j++) {
      const uint32_t entry = table.entry(capped(r, j), best_cells);
      const uint32_t index = entry & INDEX_MASK;
      if constexpr (SKETCH) x[r][j] -= copysignf(__uint_as_float(entry & ~INDEX_MASK) * level_seen, x[r][j]);
      if constexpr (BITS == 5) {
        main[Main::slot(r, j)] |= (index >> 1) << coordinate_bit(4, Main::place(r, j));
        extra[Extra::slot(r, j)] |= (index & 1) << coordinate_bit(1, Extra::place(r, j));
      } else {
        main[Main::slot(r, j)] |= index << coordinate_bit(MAIN, Main::place(r, j));
      }
    }
  }
#pragma unroll
  for (int s = 0; s < Main::SLOTS; s++) {
    main[s] <<= Main::lane_bit(q);
    if constexpr (MAIN == 4) main[s] |= signs[s] << Signs::lane_bit(q);
  }
  write_plane<Shape, MAIN>(main, role, 0, to, q);
  if constexpr (num_planes(BITS) == 2) {
#pragma unroll
    for (int s = 0; s < Extra::SLOTS; s++) extra[s] <<= Extra::lane_bit(q);
    write_plane<Shape, 1>(extra, role, 1, to, q);
  }

  if constexpr (SKETCH) {
    static_assert(LevelTable<BITS>::COUNT <= 8, "masking the index out of a table entry leaves the level");
    write_sketch<Shape>(x, norm / root, role, to, q);
  }
  return scale;
}

// 8 bits: rint(u * 127 / max|u|) as a signed byte, u the unit-variance vector. Arguments and result as above.
template <class Shape>
__device__ __forceinline__ float encode_bytes(
    float (&x)[Shape::ROWS][Shape::RUN], float length, const StoreRole& role, Destination to, int q) {
  using Plane = PlaneShape<Shape, 8>;
  const float root = sqrtf(static_cast<float>(Shape::HEAD_DIM));
  const float gain = length > 0.f ? root / length : 0.f;
  float largest = 1.f;  // a vector that isn't empty has a coordinate of at least 1
#pragma unroll
  for (int r = 0; r < Shape::ROWS; r++) {
#pragma unroll
    for (int j = 0; j < Shape::RUN; j++) largest = fmaxf(largest, fabsf(x[r][j] * gain));
  }
  const float step = 127.f / max_lanes<Shape::LANES>(largest);
  uint32_t words[Plane::SLOTS] = {};
  float square = 0.f;
#pragma unroll
  for (int r = 0; r < Shape::ROWS; r++) {
#pragma unroll
    for (int j = 0; j < Shape::RUN; j++) {
      const float c = rintf(x[r][j] * gain * step);
      square = fmaf(c, c, square);
      words[Plane::slot(r, j)] |= (static_cast<uint32_t>(static_cast<int>(c)) & 0xff) << coordinate_bit(8, Plane::place(r, j));
    }
  }
#pragma unroll
  for (int s = 0; s < Plane::SLOTS; s++) words[s] <<= Plane::lane_bit(q);
  write_plane<Shape, 8>(words, role, 0, to, q);
  return length / (root * sqrtf(fmaxf(sum_lanes<Shape::LANES>(square), 1.f)));
}

}  // namespace tq
