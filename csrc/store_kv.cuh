// Fused write: load, subtract the key offset, rotate, normalise, search the scale, quantize, pack and scatter.
//
// A few lanes hold a vector, a warp holds neighbouring tokens of one KV head, and blockIdx.y says keys or values (encode.cuh has
// the work). The table of levels is repeated for every lane of a warp: lane l reads bank l and no two lanes conflict.
#pragma once

#include "early_start.cuh"
#include "encode.cuh"
#include "trellis.cuh"

namespace tq {

constexpr int STORE_THREADS = 256;
// CTAs of a multiprocessor: three leave 80 registers a thread, each has its own table.
__host__ __device__ constexpr int store_ctas(int head_dim) { return head_dim == 256 ? 2 : 3; }
// Dynamic shared memory and CTAs of a multiprocessor for trellis codes, of which every thread holds a block there.
constexpr int TRELLIS_SHARED_BYTES = TRELLIS_BLOCK * STORE_THREADS * 4, TRELLIS_CTAS = 2;
constexpr bool has_trellis(int head_dim) { return head_dim == 64 || head_dim == 128 || head_dim == 256; }
constexpr uint32_t TABLE_ROW_BYTES = 32 * 4;

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
  const LevelsOfCells<TABLE_ROW_BYTES> levels(reinterpret_cast<const uint32_t*>(table) + lane);
  const uint32_t signs = lane_signs<Shape>(q);
  touch_arguments(params);  // half a microsecond of five for one token
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
    const int place = static_cast<uint32_t>(slot) % TILE_TOKENS;  // a block has whole tiles
    if (slot >= 0) to = {tile_of(params, slot, head), is_key ? place : value_token_order(place)};
    prefetch_vector<Shape>(params, role, item + warps, lane);

    const float length = rotate<Shape>(x, q);
    float scale = 0.f;
    if constexpr (SPREAD == BLOCKS) {
      float* column = reinterpret_cast<float*>(table) + threadIdx.x;
      scale = role.bits == TRELLIS + 3 ? encode_trellis<Shape, TRELLIS + 3>(x, length, role, column, to, q)
                                       : encode_trellis<Shape, TRELLIS + 2>(x, length, role, column, to, q);
      write_scale(scale, role.scale, place, to, q);
      continue;
    }
    switch (role.bits) {
      case 2: scale = encode_levels<Shape, 2>(x, length, role, levels, to, q); break;
      case 3: scale = encode_levels<Shape, 3, SKETCH>(x, length, role, levels, to, q); break;
      case 4: scale = encode_levels<Shape, 4>(x, length, role, levels, to, q); break;
      case 5: scale = encode_levels<Shape, 5>(x, length, role, levels, to, q); break;
      case 8: scale = encode_bytes<Shape>(x, length, role, to, q); break;
    }
    write_scale(scale, role.scale, place, to, q);
  }
}

}  // namespace tq
