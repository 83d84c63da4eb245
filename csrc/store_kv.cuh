// Fused write: load, subtract the key offset, rotate, normalise, search the scale, quantize, pack and scatter.
//
// A few lanes hold a vector, a warp holds neighbouring tokens of one KV head, and blockIdx.y says keys or values. The work is
// in the scale search: 9 candidates x head_dim coordinates, each a nearest-level look-up. The thresholds of a page codebook
// are integers in units, so that cell = floor(magnitude / (candidate * unit)) decides the level exactly (as in
// tq_vllm/core/quantizers.py). A table over cells gives the level as a float, with its index in the lowest mantissa bits,
// and is repeated for every lane of a warp: lane l reads bank l and no two lanes conflict. Per coordinate and candidate
// that is FFMA (floor), IMAD (address), LDS, FFMA (dot product), FFMA (norm).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "codebook.cuh"
#include "early_start.cuh"
#include "instructions.cuh"
#include "layout.cuh"
#include "rotation.cuh"
#include "store_kv.h"
#include "trellis.cuh"

namespace tq {

constexpr int STORE_THREADS = 256;
// CTAs of a multiprocessor: three leave 80 registers a thread, each has its own table.
__host__ __device__ constexpr int store_ctas(int head_dim) { return head_dim == 256 ? 2 : 3; }
// Dynamic shared memory and CTAs of a multiprocessor for trellis codes, of which every thread holds a block there.
constexpr int TRELLIS_SHARED_BYTES = TRELLIS_BLOCK * STORE_THREADS * 4, TRELLIS_CTAS = 2;
constexpr bool has_trellis(int head_dim) { return head_dim == 64 || head_dim == 128 || head_dim == 256; }
constexpr float FLOAT16_MAX = 65504.f;
constexpr float FLOOR_BIAS = 8388608.f;  // 2^23: adding it with rounding down leaves floor(x) in the low mantissa bits
constexpr uint32_t TABLE_ROW_BYTES = 32 * 4;
constexpr uint32_t FLOOR_BIAS_ADDRESS = 0x4b000000u * TABLE_ROW_BYTES;  // of 2^23 itself, modulo 2^32
constexpr uint32_t INDEX_MASK = 15;  // a level 2m+1 has 8 significant bits: its low mantissa bits are free
constexpr float FLOAT32_MAX = 3.402823466e38f;

// Cell of a magnitude as the address of its table entry; `base` is lane's entry of row 0 minus FLOOR_BIAS_ADDRESS.
__device__ __forceinline__ uint32_t table_address(float magnitude, float cells_per_unit, uint32_t base) {
  return __float_as_uint(__fmaf_rd(magnitude, cells_per_unit, FLOOR_BIAS)) * TABLE_ROW_BYTES + base;
}

// Row `cell` of the table holds, 32 times, the level 2m+1 of that cell as a float whose low bits are the level's index: of
// the floats with these low bits the nearest one, at most 8 units in the last place away.
template <int BITS>
__device__ __forceinline__ uint32_t table_entry(int cell) {
  int m = LevelTable<BITS>::at(0), index = 0;
#pragma unroll
  for (int t = 0; t < StepTable<BITS>::COUNT; t++) {
    if (cell >= StepTable<BITS>::at(t)) m = LevelTable<BITS>::at(t + 1), index = t + 1;
  }
  return __float_as_uint(2.f * m + 1.f) + index - (index > 8 ? 16 : 0);
}

template <int BITS>
__device__ __forceinline__ void fill_table(uint4* table, int rows) {
  const int lane = threadIdx.x % 32;
  for (int first = threadIdx.x / 32 * 32; first < rows; first += STORE_THREADS) {  // 32 rows a warp, one a lane
    const uint32_t mine = table_entry<BITS>(first + lane);
#pragma unroll
    for (int r = 0; r < 32; r += 4) {  // four rows at a time, 8 lanes each
      const uint32_t entry = __shfl_sync(ALL_LANES, mine, r + lane / 8);
      if (first + r + lane / 8 < rows) table[8 * (first + r) + lane] = make_uint4(entry, entry, entry, entry);
    }
  }
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

// Asks the L2 for the warp's next vectors while these are encoded.
template <class Shape>
__device__ __forceinline__ void prefetch_vector(const StoreParams& params, const StoreRole& role, int item, int lane) {
  const int token = item / params.num_kv_heads * Shape::VECTORS + lane / Shape::LANES;
  if (token >= params.num_slots) return;
  const int element_bytes = role.dtype == FLOAT32 ? 4 : 2;
  const int64_t start = token * role.token_stride + item % params.num_kv_heads * role.head_stride;
  const int part = lane % Shape::LANES * (Shape::HEAD_DIM / Shape::LANES);
  prefetch_l2(static_cast<const uint8_t*>(role.x) + (start + part) * element_bytes);
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
template <class Shape, int BITS, bool SKETCH = false>
__device__ __forceinline__ float encode_levels(
    float (&x)[Shape::ROWS][Shape::RUN], float length, const StoreRole& role, uint32_t table_base, Destination to, int q) {
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
          const float level = __uint_as_float(load_shared(table_address(magnitude, cells[k], table_base)));
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
      const uint32_t entry = load_shared(table_address(capped(r, j), best_cells, table_base));
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

// Trellis codes: the scale candidate of the closest open paths, and along one path a block its nearest levels. A lane has block
// q; column: room for it, of this thread. Other arguments and result as above.
template <class Shape, int BITS>
__device__ __forceinline__ float encode_trellis(
    const float (&x)[Shape::ROWS][Shape::RUN], float length, const StoreRole& role, float* column, Destination to, int q) {
  const float root = sqrtf(static_cast<float>(Shape::HEAD_DIM));
  const float gain = length > 0.f ? root / length : 0.f;
#pragma unroll
  for (int r = 0; r < Shape::ROWS; r++) {
#pragma unroll
    for (int j = 0; j < Shape::RUN; j++) column[(4 * j + r) * STORE_THREADS] = x[r][j] * gain;
  }
  float cells = role.cells_per_unit[0], least_distance = FLOAT32_MAX;
#pragma unroll 1
  for (int i = 0; i < role.num_candidates; i++) {
    float metric[TRELLIS_STATES];
    search_forward<BITS, STORE_THREADS>(column, role.cells_per_unit[i], metric);
    const float distance =
        sum_lanes<Shape::LANES>(least(metric)) / (role.cells_per_unit[i] * role.cells_per_unit[i]);
    if (distance < least_distance) least_distance = distance, cells = role.cells_per_unit[i];
  }
  float dot = 0.f, square = 0.f;
  const uint32_t path = closest_path<BITS, STORE_THREADS>(column, cells);
  TrellisWords words = quantize_along<BITS, STORE_THREADS>(column, cells, path, dot, square);
  if (length == 0.f) words = {};
  if (to.tile != nullptr) {
    uint8_t* row = to.tile + role.plane[0] + to.token * role.token_bytes[0];
#pragma unroll
    for (int w = 0; w < plane_bits(BITS, 0); w++)
      *reinterpret_cast<uint32_t*>(row + (plane_bits(BITS, 0) * q + w) * role.word_bytes) = words.uncoded[w];
    *reinterpret_cast<uint32_t*>(to.tile + role.plane[1] + to.token * role.token_bytes[1] + q * role.word_bytes) = words.coded;
  }
  square = sum_lanes<Shape::LANES>(square);
  const float norm = length / root;
  if (role.scale_rule == SCALE_NORM) return norm / (sqrtf(square) * Unit<BITS>::VALUE);
  if (role.scale_rule == SCALE_UNBIASED) return length * cells / sum_lanes<Shape::LANES>(dot) / Unit<BITS>::VALUE;
  return norm / root;
}

// Grid [ctas, 2 roles]; dynamic shared memory: table_rows * TABLE_ROW_BYTES of the larger role; for trellis codes, which are
// those of SPREAD = BLOCKS and of both roles, TRELLIS_SHARED_BYTES. SKETCH: codes of 3 bits, which are keys then, have one.
template <int HEAD_DIM, Spread SPREAD, bool SKETCH = false>
__global__ void __launch_bounds__(STORE_THREADS, SPREAD == BLOCKS ? TRELLIS_CTAS : store_ctas(HEAD_DIM))
    store_kv_kernel(const __grid_constant__ StoreParams params) {
  using Shape = VectorShape<HEAD_DIM, SPREAD>;
  extern __shared__ uint4 table[];
  const StoreRole& role = params.role[blockIdx.y];
  const bool is_key = blockIdx.y == 0;
  const int lane = threadIdx.x % 32, q = lane % Shape::LANES;
  const uint32_t table_base = static_cast<uint32_t>(__cvta_generic_to_shared(table)) + 4 * lane - FLOOR_BIAS_ADDRESS;
  const uint32_t signs = lane_signs<Shape>(q);
  // Before the wait: the table, and the arguments into the constant cache, whose misses would come one after another (half a
  // microsecond of five for one token).
  if (threadIdx.x < sizeof(StoreParams) / 32) {
    const int word = reinterpret_cast<const int*>(&params)[8 * threadIdx.x];
    asm volatile("" ::"r"(word));
  }
  switch (role.bits) {
    case 2: fill_table<2>(table, role.table_rows); break;
    case 3: fill_table<3>(table, role.table_rows); break;
    case 4: fill_table<4>(table, role.table_rows); break;
    case 5: fill_table<5>(table, role.table_rows); break;
  }
  wait_for_earlier_kernels();
  let_next_kernel_start();  // attention to what is written here waits in its turn, with its launch behind it
  __syncthreads();

  const int num_items = (params.num_slots + Shape::VECTORS - 1) / Shape::VECTORS * params.num_kv_heads;
  const int warps = gridDim.x * (STORE_THREADS / 32);
  for (int item = blockIdx.x * (STORE_THREADS / 32) + threadIdx.x / 32; item < num_items; item += warps) {
    const int head = item % params.num_kv_heads;
    const int token = item / params.num_kv_heads * Shape::VECTORS + lane / Shape::LANES;
    float x[Shape::ROWS][Shape::RUN] = {};
    int64_t slot = -1;
    if (token < params.num_slots) {
      slot = params.slot_mapping[token];  // the vector is loaded at the same time, whatever the slot
      const int64_t start = token * role.token_stride + head * role.head_stride;
      load_vector<Shape, false>(role.x, role.dtype, start, role.vector_loads, signs, q, x);
      if (is_key && params.key_offset != nullptr) {
        const int64_t position = params.positions_are_int64 ? static_cast<const int64_t*>(params.positions)[token]
                                                            : static_cast<const int32_t*>(params.positions)[token];
        const int64_t segment = min(max(position, int64_t{0}) / SEGMENT_TOKENS, int64_t{params.num_segments - 1});
        load_vector<Shape, true>(params.key_offset, params.offset_dtype,
                                 segment * params.offset_segment_stride + head * params.offset_head_stride,
                                 params.vector_offsets, signs, q, x);
      }
    }
    if (!__any_sync(ALL_LANES, slot >= 0)) continue;
    Destination to = {nullptr, 0};
    int place = 0;
    if (slot >= 0) {
      const uint32_t block = static_cast<uint32_t>(slot) / params.block_size;
      const uint32_t in_block = static_cast<uint32_t>(slot) - block * params.block_size;
      to.tile = params.kv_cache + block * params.block_stride + head * params.head_stride +
                in_block / TILE_TOKENS * params.tile_bytes;
      place = in_block % TILE_TOKENS;
      to.token = is_key ? place : value_token_order(place);
    }
    prefetch_vector<Shape>(params, role, item + warps, lane);

    hadamard<Shape>(x, q);
    float square = 0.f;
#pragma unroll
    for (int r = 0; r < Shape::ROWS; r++) {
#pragma unroll
      for (int j = 0; j < Shape::RUN; j++) square = fmaf(x[r][j], x[r][j], square);
    }
    float length = sqrtf(sum_lanes<Shape::LANES>(square));
    const bool empty = !(length > 0.f && length <= FLOAT32_MAX);  // zero, NaN, inf or above the range of float32
    if (__any_sync(ALL_LANES, empty)) {
      if (empty) length = 0.f;
#pragma unroll
      for (int r = 0; r < Shape::ROWS; r++) {
#pragma unroll
        for (int j = 0; j < Shape::RUN; j++) x[r][j] = empty ? 0.f : x[r][j];
      }
    }

    float scale = 0.f;
    if constexpr (SPREAD == BLOCKS) {
      float* column = reinterpret_cast<float*>(table) + threadIdx.x;
      scale = role.bits == TRELLIS + 3 ? encode_trellis<Shape, TRELLIS + 3>(x, length, role, column, to, q)
                                       : encode_trellis<Shape, TRELLIS + 2>(x, length, role, column, to, q);
      write_scale(scale, role.scale, place, to, q);
      continue;
    }
    switch (role.bits) {
      case 2: scale = encode_levels<Shape, 2>(x, length, role, table_base, to, q); break;
      case 3: scale = encode_levels<Shape, 3, SKETCH>(x, length, role, table_base, to, q); break;
      case 4: scale = encode_levels<Shape, 4>(x, length, role, table_base, to, q); break;
      case 5: scale = encode_levels<Shape, 5>(x, length, role, table_base, to, q); break;
      case 8: scale = encode_bytes<Shape>(x, length, role, to, q); break;
    }
    write_scale(scale, role.scale, place, to, q);
  }
}

}  // namespace tq
