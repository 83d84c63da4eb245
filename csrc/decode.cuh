// Attention of few query rows to a TurboQuant cache, on its codes.
//
// The work of a call is a list of units (request, KV head, block of ROWS query rows), each a run of groups of 16 * TILES
// tokens. Every warp of a fixed grid takes an equal share of that list, whatever the batch, so nothing is planned on the
// host. A warp streams its groups through a private ring in shared memory and knows no barrier.
//
//   scores   S^T = K Q^T      int8 MMA m16n8k32: rows = 16 tokens of a tile, columns = (query row, high / low byte)
//   output   O^T = V^T P^T    int8 MMA m16n8k32: rows = 16 half groups of coordinates, reduction = (8 tokens, 4 coordinates of
//                             a half group), columns = (query row, high / low byte) of one of the four coordinates: a
//                             register of value codes is an operand as it comes out of prmt, never transposed
//
// The rotated query is two signed bytes a coordinate, 128 * high + low. P times the value scale is two bytes, 128 * high + low,
// relative to its maximum in the group. Products are exact in int32; accumulators start at the bits of 1.5 * 2^23, so that
// they read as floats. A share that holds only a part of a unit leaves a partial result (output, reference, sum) of it in a
// workspace; the next kernel merges these (merge.cuh). A unit that a share holds whole is finished here.
#pragma once
#include <cuda_runtime.h>

#include <type_traits>

#include "early_start.cuh"
#include "newest_token.cuh"
#include "offset_scores.cuh"
#include "wide_row_block.cuh"

namespace tq {

// Sizes of an instantiation.
template <int KEY_BITS_, int VALUE_BITS_, int D_, int ROWS_, bool SKETCH_ = false> struct Shape {
  static constexpr int KEY_BITS = KEY_BITS_, VALUE_BITS = VALUE_BITS_, D = D_, ROWS = ROWS_;
  static constexpr bool SKETCH = SKETCH_;  // keys have one: scores are two products, with a scale each
  using Page = tq::Page<KEY_BITS, VALUE_BITS, D, SKETCH>;
  static constexpr int TILE_BYTES = Page::TILE_BYTES;
  static constexpr int TILES = TILE_BYTES <= 2368 ? 4 : TILE_BYTES <= 4672 ? 2 : 1;  // 16-token tiles of a group
  static constexpr int STAGES = 2;
  static constexpr int STAGE_BYTES = TILES * TILE_BYTES;
  static constexpr int ROW_TILES = ROWS / 4;
  static constexpr bool WIDE = ROWS >= 16;
  static constexpr int QUERY_BYTES = 2 * ROWS * D + (WIDE ? 16 * ROWS : 0);
  static constexpr int PARTIAL_ROW = D + 4;  // floats of a row of a partial result: output [D], reference, sum, two unused
  static constexpr int PARTIAL_FLOATS = ROWS * PARTIAL_ROW;
  static constexpr int MAX_WARPS = ROWS == 4 && D < 192 ? 12 : 8;  // 168 or 255 registers a lane
  static constexpr int HEAD_BYTES = 8 * STAGES + 104 & ~15;  // barriers and two cursors
  static constexpr int WARP_BYTES = STAGES * STAGE_BYTES + QUERY_BYTES + HEAD_BYTES;
  static constexpr int OFFSET_BYTES = 4 * SEGMENTS_AT_ONCE * ROWS;  // more with a key offset
  static int warp_bytes(const DecodeParams& p) { return WARP_BYTES + (p.key_offset ? OFFSET_BYTES : 0); }
};

template <class S>
__global__ void __launch_bounds__(32 * S::MAX_WARPS, 1) decode_kernel(const __grid_constant__ DecodeParams p, int warp_bytes) {
  extern __shared__ __align__(128) uint8_t shared[];
  constexpr int GROUP = TILE_TOKENS * S::TILES;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, num_warps = blockDim.x >> 5;
  uint8_t* mine = shared + warp * warp_bytes;
  uint64_t* barriers = reinterpret_cast<uint64_t*>(mine);
  // The units that are worked on and loaded: in shared memory to save registers; all lanes write the same.
  Cursor& current = *reinterpret_cast<Cursor*>(mine + 8 * S::STAGES);
  Cursor& ahead = *(&current + 1);
  auto next_unit = [&](Cursor& cursor) {
    Cursor c = cursor;
    c.next_unit<S>(p);
    __syncwarp();
    cursor = c;
    __syncwarp();
  };
  static_assert(8 * S::STAGES + 2 * sizeof(Cursor) <= S::HEAD_BYTES);
  uint8_t* ring = mine + S::HEAD_BYTES;
  uint8_t* query_bytes = ring + S::STAGES * S::STAGE_BYTES;
  float* offsets = reinterpret_cast<float*>(query_bytes + S::QUERY_BYTES);  // [SEGMENTS_AT_ONCE][ROWS]

  if (lane < S::STAGES) Copier::init(barriers + lane);
  Copier::fence_init();
  __syncwarp();
  const bool stores = NewestToken<S>::EXISTS && p.store.num_slots > 0;
  uint32_t* tables = reinterpret_cast<uint32_t*>(shared + num_warps * warp_bytes);
  touch_arguments(p);
  if constexpr (NewestToken<S>::EXISTS)
    if (stores) {
      NewestToken<S>::fill_tables(p, tables);
      __syncthreads();
    }
  wait_for_earlier_kernels();
  let_next_kernel_start();

  Request request{};
  const int work = work_of<S>(p, 0, request, lane);
  int total = work;
  bool completes = stores && NewestToken<S>::completes(p, request.seq_len);
  for (int base = 32; base < p.num_reqs; base += 32) {
    Request other{};
    total += work_of<S>(p, base, other, lane);
    completes |= stores && NewestToken<S>::completes(p, other.seq_len);
  }
  const Shares shares{unsigned(__reduce_add_sync(~0u, total)), gridDim.x * num_warps};
  const int share = blockIdx.x * num_warps + warp;
  const int begin = shares.begin(share), end = shares.begin(share + 1);
  if (begin == end) return;

  const Cursor start = seek<S>(p, begin, request, work, lane);
  current = start, ahead = start;
  int to_load = end - begin, stage = 0;
  uint32_t parity = 0;
  // Every lane knows where one of the next 32 tiles stands, and the block of one of the 32 after them.
  constexpr int GROUPS_AT_ONCE = 32 / S::TILES;
  int tile, left_of_unit, group_of_32 = 0, block = 0;
  const uint8_t* from = nullptr;
  const bool whole_groups = p.tiles_per_block % S::TILES == 0;  // a group is contiguous in one block
  auto column_of = [&](int tile) { return p.block_magic ? int(__umulhi(tile, p.block_magic)) : tile; };
  auto find = [&] {
    group_of_32 = GROUPS_AT_ONCE;
    if (tile * TILE_TOKENS < ahead.request.seq_len)
      block = p.block_table[ahead.request.index * p.block_table_stride + column_of(tile)];
  };
  auto enter = [&] {
    tile = (ahead.request.first_group + ahead.group) * S::TILES + lane;
    left_of_unit = ahead.request.num_groups - ahead.group;
    find();
  };
  auto load = [&](int into) {
    if (to_load == 0) {
      Copier::nothing();
      return;
    }
    if (group_of_32 == GROUPS_AT_ONCE) {
      from = tile * TILE_TOKENS < ahead.request.seq_len
                 ? p.kv_cache + block * p.cache_stride_block + ahead.head * p.cache_stride_head +
                       (tile - column_of(tile) * p.tiles_per_block) * S::TILE_BYTES
                 : nullptr;
      group_of_32 = 0;
    }
    // Of a whole group every lane gets the first tile; its last tiles may hold nothing, and are masked.
    const int tile_of_lane = whole_groups ? 0 : lane % S::TILES;
    const uint64_t source = __shfl_sync(~0u, reinterpret_cast<uint64_t>(from), group_of_32 * S::TILES + tile_of_lane);
    const uint8_t* at = reinterpret_cast<const uint8_t*>(source);
    uint8_t* to = ring + into * S::STAGE_BYTES;
    if (whole_groups && source)
      Copier::copy_whole<S::STAGE_BYTES>(to, at, barriers + into, lane);
    else
      Copier::copy<S::TILE_BYTES>(to + lane * S::TILE_BYTES, at, source && lane < S::TILES, barriers + into, lane);
    if (--to_load == 0) return;
    if (--left_of_unit == 0) {
      next_unit(ahead);
      enter();
    } else if (++group_of_32 == GROUPS_AT_ONCE) {
      tile += 32;
      find();
    }
  };
  __syncwarp();
  enter();

  using Rows = std::conditional_t<S::WIDE, WideRowBlock<S>, RowBlock<S>>;
  Rows rows;
  typename Rows::QueryBits bits;
  rows.fetch(p, current, bits, lane);
  if constexpr (NewestToken<S>::EXISTS)  // while the first block's number and the query are on their way
    if (stores) NewestToken<S>::write_share(p, start, end - begin, __any_sync(~0u, completes), tables, lane);
  load(0);

  // A turn is what a unit has in this share or, with a key offset, as much of it as `offsets` has the segments of (it may begin
  // inside one).
  constexpr int TURN = (SEGMENTS_AT_ONCE - (GROUP < SEGMENT_TOKENS)) * SEGMENT_TOKENS / GROUP;
  bool whole = true, enters = true;  // the share has the unit from its beginning; the turn is the first of the unit
  for (int at = begin; at < end;) {
    const int in_unit = min(end - at, current.request.num_groups - current.group);
    const int count = p.key_offset ? min(in_unit, TURN) : in_unit;
    int position = (current.request.first_group + current.group) * GROUP;
    if (enters && at > begin) rows.fetch(p, current, bits, lane);
    if (p.key_offset) OffsetScores<S>::fill(p, current, position, count * GROUP, offsets, lane);
    if (enters) {
      whole = current.group == 0;
      rows.prepare(p, current, bits, query_bytes, lane);
    }
    if (at == begin) {  // not before: copies are served in order, and every warp waits for its first one
#pragma unroll
      for (int s = 1; s < S::STAGES; s++) load(s);
    }
    float offset[S::ROW_TILES] = {};
    for (int i = 0; i < count; i++, position += GROUP) {
      if (p.key_offset) {
#pragma unroll
        for (int t = 0; t < S::ROW_TILES; t++)
          offset[t] = offsets[position / SEGMENT_TOKENS % SEGMENTS_AT_ONCE * S::ROWS + 4 * t + (lane & 3)];
      }
      Copier::wait<S::STAGES>(barriers + stage, parity);
      rows.add(ring + stage * S::STAGE_BYTES, query_bytes, position, offset, p.logits_soft_cap, lane);
      __syncwarp();
      load(stage);
      if (++stage == S::STAGES) stage = 0, parity ^= 1;
    }
    at += count;
    enters = count == in_unit;
    const int group = current.group + count;
    __syncwarp();
    if (!enters) {
      if (lane == 0) current.group = group;
      __syncwarp();
      continue;
    }
    rows.reduce();
    if (whole && group == current.request.num_groups)
      rows.finish(p, current, lane);
    else
      rows.write(p.workspace + partial_index(share, begin, at - group) * S::PARTIAL_FLOATS, lane);
    __syncwarp();
    if (at < end) next_unit(current);
  }
}

}  // namespace tq
