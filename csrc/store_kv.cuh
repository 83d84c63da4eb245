// Fused write: load, subtract the key offset, rotate, normalise, search the scale, quantize, pack and scatter.
//
// LANES lanes hold a vector, a warp holds 32 / LANES tokens of one KV head, and blockIdx.y says keys or values. The work is in the
// scale search: 9 candidates x head_dim coordinates, each a nearest-level look-up. The thresholds of a page codebook are
// integers in units, so that cell = floor(magnitude / (candidate * unit)) decides the level exactly (as in
// tq_vllm/core/quantizers.py). A table over cells gives the level as a float, with its index in the lowest mantissa bits,
// and is repeated for every lane of a warp: lane l reads bank l and no two lanes conflict. Per coordinate and candidate
// that is FFMA (floor), IMAD (address), LDS, FFMA (dot product), FFMA (norm).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "codebook.cuh"
#include "layout.cuh"
#include "rotation.cuh"
#include "store_kv.h"

namespace tq {

constexpr int STORE_THREADS = 256;
constexpr float FLOAT16_MAX = 65504.f;
constexpr float FLOOR_BIAS = 8388608.f;  // 2^23: adding it with rounding down leaves floor(x) in the low mantissa bits
constexpr uint32_t TABLE_ROW_BYTES = 32 * 4;
constexpr uint32_t FLOOR_BIAS_ADDRESS = 0x4b000000u * TABLE_ROW_BYTES;  // of 2^23 itself, modulo 2^32
constexpr uint32_t INDEX_MASK = 15;  // a level 2m+1 has 8 significant bits: its low mantissa bits are free

__device__ __forceinline__ uint32_t load_shared(uint32_t address) {
  uint32_t x;
  asm("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address));
  return x;
}

// Cell of a magnitude as the address of its table entry; `base` is lane's entry of row 0 minus FLOOR_BIAS_ADDRESS.
__device__ __forceinline__ uint32_t table_address(float magnitude, float cells_per_unit, uint32_t base) {
  return __float_as_uint(__fmaf_rd(magnitude, cells_per_unit, FLOOR_BIAS)) * TABLE_ROW_BYTES + base;
}

// Row `cell` of the table holds the level 2m+1 of that cell as a float, its index in the low bits, 32 times.
template <int BITS>
__device__ __forceinline__ void fill_table(uint4* table, int rows) {
  for (int i = threadIdx.x; i < 8 * rows; i += STORE_THREADS) {
    const int cell = i / 8;
    int m = LevelTable<BITS>::at(0), index = 0;
#pragma unroll
    for (int t = 0; t < StepTable<BITS>::COUNT; t++) {
      if (cell >= StepTable<BITS>::at(t)) m = LevelTable<BITS>::at(t + 1), index = t + 1;
    }
    const uint32_t entry = __float_as_uint(2.f * m + 1.f) | index;
    table[i] = make_uint4(entry, entry, entry, entry);
  }
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

// x[j] <- RUN consecutive elements.
template <int RUN, typename T>
__device__ __forceinline__ void load_run(const T* source, bool vector_loads, float (&x)[RUN]) {
  if (vector_loads) {
    constexpr int BYTES = RUN * sizeof(T), PIECE = BYTES < 16 ? BYTES : 16, COUNT = PIECE / sizeof(T);
#pragma unroll
    for (int piece = 0; piece < BYTES / PIECE; piece++) {
      alignas(16) T buffer[COUNT];
      const T* from = source + piece * COUNT;
      if constexpr (PIECE == 16) *reinterpret_cast<uint4*>(buffer) = *reinterpret_cast<const uint4*>(from);
      if constexpr (PIECE == 8) *reinterpret_cast<uint2*>(buffer) = *reinterpret_cast<const uint2*>(from);
      if constexpr (PIECE == 4) *reinterpret_cast<uint32_t*>(buffer) = *reinterpret_cast<const uint32_t*>(from);
      if constexpr (PIECE == 2) buffer[0] = *from;
#pragma unroll
      for (int j = 0; j < COUNT; j++) x[piece * COUNT + j] = to_float(buffer[j]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < RUN; j++) x[j] = to_float(source[j]);
  }
}

// x <- the lane's coordinates of the vector at element `start` of `source`.
template <int HEAD_DIM>
__device__ __forceinline__ void load_vector(
    const void* source, int dtype, int64_t start, bool vector_loads, int q,
    float (&x)[VectorShape<HEAD_DIM>::ROWS][VectorShape<HEAD_DIM>::RUN]) {
  using Shape = VectorShape<HEAD_DIM>;
  start += q * Shape::RUN;
  if (dtype == BFLOAT16) {
#pragma unroll
    for (int r = 0; r < Shape::ROWS; r++)
      load_run<Shape::RUN>(static_cast<const __nv_bfloat16*>(source) + start + r * Shape::STRIDE, vector_loads, x[r]);
  } else if (dtype == FLOAT16) {
#pragma unroll
    for (int r = 0; r < Shape::ROWS; r++)
      load_run<Shape::RUN>(static_cast<const __half*>(source) + start + r * Shape::STRIDE, vector_loads, x[r]);
  } else {
#pragma unroll
    for (int r = 0; r < Shape::ROWS; r++)
      load_run<Shape::RUN>(static_cast<const float*>(source) + start + r * Shape::STRIDE, vector_loads, x[r]);
  }
}

// How the words of a plane are spread over the lanes of a vector: GROUP lanes hold parts of the same SLOTS words.
template <int HEAD_DIM, int PLANE_BITS>
struct PlaneShape {
  using Shape = VectorShape<HEAD_DIM>;
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
template <int HEAD_DIM>
struct Plane4Signs {
  static constexpr int RUN = VectorShape<HEAD_DIM>::RUN;
  __device__ static constexpr int constant_bit(int r, int j) { return RUN == 8 ? sign_bit(j) : RUN == 1 ? (r & 1 ? 3 : 7) : 8 * j; }
  __device__ static int lane_bit(int q) { return RUN == 8 ? 0 : RUN == 1 ? 8 * q : 16 * (q & 1) + (q & 2 ? 3 : 7); }
};

// Where a token's words and scale go: nullptr base = nowhere.
struct Destination {
  uint8_t* tile;
  int token;  // 0..15, permuted for values
};

// Joins the parts of the GROUP lanes of each word and writes the words to the page.
template <int HEAD_DIM, int PLANE_BITS>
__device__ __forceinline__ void write_plane(
    uint32_t (&words)[PlaneShape<HEAD_DIM, PLANE_BITS>::SLOTS], const StoreRole& role, int plane, Destination to, int q) {
  using Plane = PlaneShape<HEAD_DIM, PLANE_BITS>;
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

__device__ __forceinline__ void write_scale(float scale, const StoreRole& role, int token, Destination to, int q) {
  if (to.tile != nullptr && q == 0)
    *reinterpret_cast<__half*>(to.tile + role.scale + 2 * token) = __float2half_rn(fminf(scale, FLOAT16_MAX));
}

// 2 to 5 bits: the page codebook with the best scale candidate. x: rotated; gain: sqrt(d) / norm, 0 for an empty vector
// (then x is 0). Returns the scale.
template <int HEAD_DIM, int BITS>
__device__ __forceinline__ float encode_levels(
    float (&x)[VectorShape<HEAD_DIM>::ROWS][VectorShape<HEAD_DIM>::RUN], float gain, float norm, const StoreRole& role,
    uint32_t table_base, Destination to, int q) {
  using Shape = VectorShape<HEAD_DIM>;
  constexpr int MAIN = plane_bits(BITS, 0);  // plane of the index; in plane 4 with the sign, in plane 2 too for 2 bits
  using Main = PlaneShape<HEAD_DIM, MAIN>;
  using Extra = PlaneShape<HEAD_DIM, 1>;
  constexpr float LAST_LEVEL = 2 * LevelTable<BITS>::at(LevelTable<BITS>::COUNT - 1) + 1;

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
        signs[Main::slot(r, j)] |= negative << Plane4Signs<HEAD_DIM>::constant_bit(r, j);
      }
      const float magnitude = fabsf(x[r][j]) * gain;
      x[r][j] = fminf(magnitude, role.magnitude_cap);
      dot_above += magnitude - x[r][j];
    }
  }
  dot_above *= LAST_LEVEL;

  float best = -1.f, best_cells = role.cells_per_unit[0];
#pragma unroll 1
  for (int k = 0; k < role.num_candidates; k++) {
    const float cells = role.cells_per_unit[k];
    float dot[2] = {dot_above, 0.f}, square[2] = {};
#pragma unroll
    for (int r = 0; r < Shape::ROWS; r++) {
#pragma unroll
      for (int j = 0; j < Shape::RUN; j++) {
        const float level = __uint_as_float(load_shared(table_address(x[r][j], cells, table_base)));
        dot[(r + j) % 2] = fmaf(x[r][j], level, dot[(r + j) % 2]);
        square[(r + j) % 2] = fmaf(level, level, square[(r + j) % 2]);
      }
    }
    const float cosine = sum_lanes<Shape::LANES>(dot[0] + dot[1]) * rsqrtf(sum_lanes<Shape::LANES>(square[0] + square[1]));
    if (cosine > best) best = cosine, best_cells = cells;
  }

  float dot = dot_above, square = 0.f;
#pragma unroll
  for (int r = 0; r < Shape::ROWS; r++) {
#pragma unroll
    for (int j = 0; j < Shape::RUN; j++) {
      const uint32_t entry = load_shared(table_address(x[r][j], best_cells, table_base));
      const float level = __uint_as_float(entry & ~INDEX_MASK);
      dot = fmaf(x[r][j], level, dot);
      square = fmaf(level, level, square);
      const uint32_t index = entry & INDEX_MASK;
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
    if constexpr (MAIN == 4) main[s] |= signs[s] << Plane4Signs<HEAD_DIM>::lane_bit(q);
  }
  write_plane<HEAD_DIM, MAIN>(main, role, 0, to, q);
  if constexpr (num_planes(BITS) == 2) {
#pragma unroll
    for (int s = 0; s < Extra::SLOTS; s++) extra[s] <<= Extra::lane_bit(q);
    write_plane<HEAD_DIM, 1>(extra, role, 1, to, q);
  }

  constexpr float UNIT = Unit<BITS>::VALUE;
  const float root = sqrtf(static_cast<float>(HEAD_DIM));
  if (role.scale_rule == SCALE_NORM) return norm / (sqrtf(sum_lanes<Shape::LANES>(square)) * UNIT);
  if (role.scale_rule == SCALE_UNBIASED) return norm * root / (sum_lanes<Shape::LANES>(dot) * UNIT);
  return norm / root;
}

// 8 bits: rint(u * 127 / max|u|) as a signed byte. Arguments and result as above.
template <int HEAD_DIM>
__device__ __forceinline__ float encode_bytes(
    float (&x)[VectorShape<HEAD_DIM>::ROWS][VectorShape<HEAD_DIM>::RUN], float gain, float norm, const StoreRole& role,
    Destination to, int q) {
  using Shape = VectorShape<HEAD_DIM>;
  using Plane = PlaneShape<HEAD_DIM, 8>;
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
  write_plane<HEAD_DIM, 8>(words, role, 0, to, q);
  return norm / sqrtf(fmaxf(sum_lanes<Shape::LANES>(square), 1.f));
}

// Grid [ctas, 2 roles]; dynamic shared memory: table_rows * TABLE_ROW_BYTES of the larger role.
template <int HEAD_DIM>
__global__ void __launch_bounds__(STORE_THREADS, 3) store_kv_kernel(const __grid_constant__ StoreParams params) {
  using Shape = VectorShape<HEAD_DIM>;
  constexpr int TOKENS = 32 / Shape::LANES;  // of a warp
  extern __shared__ uint4 table[];
  const StoreRole& role = params.role[blockIdx.y];
  const bool is_key = blockIdx.y == 0;
  const int lane = threadIdx.x % 32, q = lane % Shape::LANES;

  switch (role.bits) {
    case 2: fill_table<2>(table, role.table_rows); break;
    case 3: fill_table<3>(table, role.table_rows); break;
    case 4: fill_table<4>(table, role.table_rows); break;
    case 5: fill_table<5>(table, role.table_rows); break;
  }
  __syncthreads();
  const uint32_t table_base = static_cast<uint32_t>(__cvta_generic_to_shared(table)) + 4 * lane - FLOOR_BIAS_ADDRESS;
  const uint32_t rotation_signs = lane_signs<HEAD_DIM>(q);

  const int num_items = (params.num_slots + TOKENS - 1) / TOKENS * params.num_kv_heads;
  const int warps = gridDim.x * (STORE_THREADS / 32);
  for (int item = blockIdx.x * (STORE_THREADS / 32) + threadIdx.x / 32; item < num_items; item += warps) {
    const int head = item % params.num_kv_heads;
    const int token = item / params.num_kv_heads * TOKENS + lane / Shape::LANES;
    const int64_t slot = token < params.num_slots ? params.slot_mapping[token] : -1;
    if (!__any_sync(ALL_LANES, slot >= 0)) continue;

    float x[Shape::ROWS][Shape::RUN] = {};
    Destination to = {nullptr, 0};
    int place = 0;
    if (slot >= 0) {
      load_vector<HEAD_DIM>(role.x, role.dtype, token * role.token_stride + head * role.head_stride, role.vector_loads, q, x);
      if (is_key && params.key_offset != nullptr) {
        const int64_t position = params.positions_are_int64 ? static_cast<const int64_t*>(params.positions)[token]
                                                            : static_cast<const int32_t*>(params.positions)[token];
        const int64_t segment = min(max(position, int64_t{0}) / SEGMENT_TOKENS, int64_t{params.num_segments - 1});
        float offset[Shape::ROWS][Shape::RUN];
        load_vector<HEAD_DIM>(params.key_offset, params.offset_dtype,
                              segment * params.offset_segment_stride + head * params.offset_head_stride, false, q, offset);
#pragma unroll
        for (int r = 0; r < Shape::ROWS; r++) {
#pragma unroll
          for (int j = 0; j < Shape::RUN; j++) x[r][j] -= offset[r][j];
        }
      }
      const int in_block = static_cast<int>(slot % params.block_size);
      to.tile = params.kv_cache + slot / params.block_size * params.block_stride + head * params.head_stride +
                in_block / TILE_TOKENS * params.tile_bytes;
      place = in_block % TILE_TOKENS;
      to.token = is_key ? place : value_token_order(place);
    }

#pragma unroll
    for (int r = 0; r < Shape::ROWS; r++) {
#pragma unroll
      for (int j = 0; j < Shape::RUN; j++) x[r][j] = flip_sign<HEAD_DIM>(x[r][j], rotation_signs, r * Shape::RUN + j);
    }
    hadamard<HEAD_DIM>(x, q);
    const float root = sqrtf(static_cast<float>(HEAD_DIM));
    float square = 0.f;
#pragma unroll
    for (int r = 0; r < Shape::ROWS; r++) {
#pragma unroll
      for (int j = 0; j < Shape::RUN; j++) {
        x[r][j] = fmaf(x[r][j], 1.f / root, 0.f);  // + 0 makes -0 positive
        square = fmaf(x[r][j], x[r][j], square);
      }
    }
    float norm = sqrtf(sum_lanes<Shape::LANES>(square));
    float gain = root / norm;
    if (!(norm > 0.f && norm <= 3.402823466e38f)) {  // zero, NaN, inf or above the range of float32: stored as 0
      norm = gain = 0.f;
#pragma unroll
      for (int r = 0; r < Shape::ROWS; r++) {
#pragma unroll
        for (int j = 0; j < Shape::RUN; j++) x[r][j] = 0.f;
      }
    }

    float scale = 0.f;
    switch (role.bits) {
      case 2: scale = encode_levels<HEAD_DIM, 2>(x, gain, norm, role, table_base, to, q); break;
      case 3: scale = encode_levels<HEAD_DIM, 3>(x, gain, norm, role, table_base, to, q); break;
      case 4: scale = encode_levels<HEAD_DIM, 4>(x, gain, norm, role, table_base, to, q); break;
      case 5: scale = encode_levels<HEAD_DIM, 5>(x, gain, norm, role, table_base, to, q); break;
      case 8: scale = encode_bytes<HEAD_DIM>(x, gain, norm, role, to, q); break;
    }
    write_scale(scale, role, place, to, q);
  }
}

}  // namespace tq
