// Attention of few query rows to a TurboQuant cache, on its codes.
//
// The work of a call is a list of units (request, KV head, block of ROWS query rows), each a run of groups of 16 * TILES
// tokens. Every warp of a fixed grid takes an equal share of that list, whatever the batch, so nothing is planned on the
// host. A warp streams its groups through a private ring in shared memory and knows no barrier until its share is done.
//
//   scores   S^T = K Q^T      int8 MMA m16n8k32: rows = 16 tokens of a tile, columns = (query row, high / low byte)
//   output   O^T = V^T P^T    int8 MMA m16n8k32: rows = 16 half groups of coordinates, reduction = (8 tokens, 4 coordinates of
//                             a half group), columns = (query row, high / low byte) of one of the four coordinates: a
//                             register of value codes is an operand as it comes out of prmt, never transposed
//
// The rotated query is two signed bytes a coordinate, 128 * high + low. P times the value scale is two bytes, 128 * high + low,
// relative to its maximum in the group. Products are exact in int32; accumulators start at the bits of 1.5 * 2^23, so that
// they read as floats. Shares of a unit that end inside it leave partial results (max, sum, output) in a workspace; one warp a
// row merges those of a CTA, and the last CTA to finish a row merges those of the CTAs, rotates back and stores.
#pragma once
#include <cuda_runtime.h>

#include "row_block.cuh"

namespace tq {

// Sizes of an instantiation.
template <int KEY_BITS_, int VALUE_BITS_, int D_, int ROWS_> struct Shape {
  static constexpr int KEY_BITS = KEY_BITS_, VALUE_BITS = VALUE_BITS_, D = D_, ROWS = ROWS_;
  using Page = tq::Page<KEY_BITS, VALUE_BITS, D>;
  static constexpr int TILE_BYTES = Page::TILE_BYTES;
  static constexpr int TILES = TILE_BYTES <= 2368 ? 4 : TILE_BYTES <= 4672 ? 2 : 1;  // 16-token tiles of a group
  static constexpr int STAGES = 2;
  static constexpr int STAGE_BYTES = TILES * TILE_BYTES;
  static constexpr int ROW_TILES = ROWS / 4;
  static constexpr int QUERY_BYTES = 2 * ROWS * D;
  static constexpr int PARTIAL_FLOATS = ROWS * (D + 2);  // reference [ROWS], sum [ROWS], output [ROWS, D]
  static_assert(STAGES * STAGE_BYTES >= 4 * PARTIAL_FLOATS);
  static constexpr int MAX_WARPS = ROWS == 4 && D < 192 ? 12 : 8;  // 168 or 255 registers a lane
  static constexpr int HEAD_BYTES = 8 * STAGES + 104 & ~15;  // barriers and two cursors
  static constexpr int WARP_BYTES = STAGES * STAGE_BYTES + QUERY_BYTES + HEAD_BYTES;
  static constexpr int OFFSET_BYTES = 4 * ROWS * D;  // more for the unrotated queries, with a key offset
  static int warp_bytes(const DecodeParams& p) { return WARP_BYTES + (p.key_offset ? OFFSET_BYTES : 0); }
};

// A partial result of this CTA, as the merge needs it.
struct Piece {
  float* partial;  // in shared or global memory
  int unit_begin;  // place of the unit's first group in the work list
  int num_groups;  // of the unit; 0: no such piece
  int query_start, num_rows, head, row_block;
};

template <class S> __device__ __forceinline__ void load_row(float (&v)[Row<S::D>::PER_LANE], const float* row, int lane) {
  using R = Row<S::D>;
  if constexpr (R::PER_LANE % 4 == 0) {
#pragma unroll
    for (int j = 0; j < R::PER_LANE; j += 4) {
      const float4 x = load_fresh_4(row + R::element(lane, j));
      v[j] = x.x, v[j + 1] = x.y, v[j + 2] = x.z, v[j + 3] = x.w;
    }
  } else {
#pragma unroll
    for (int j = 0; j < R::PER_LANE; j++) v[j] = load_fresh(row + R::element(lane, j));
  }
}

// Divide a row by its sum, rotate it back and store it.
template <class S>
__device__ __noinline__ void finish_piece(const DecodeParams& p, const Piece& piece, int row, float (&v)[Row<S::D>::PER_LANE],
                                          float reference, float sum, int lane) {
  using R = Row<S::D>;
  const int index = piece.row_block * S::ROWS + row;
  const int token = piece.query_start + index / p.group_size, head = piece.head * p.group_size + index % p.group_size;
  R::rotate_back(v, lane);
  const float scale = RowBlock<S>::finish_row(p, token, head, reference, sum, lane == 0);
  const int64_t base = token * p.out_stride_token + head * p.out_stride_head;
#pragma unroll
  for (int j = 0; j < R::PER_LANE; j++)
    store_float(p.out, base + R::element(lane, j), p.dtype, sum == 0 ? 0.0f : v[j] * scale);
}

// One row of partial results, merged by a warp.
template <class S> struct Merge {
  static constexpr int PER_LANE = Row<S::D>::PER_LANE;
  float reference = NOTHING, sum = 0, output[PER_LANE] = {};

  // Add the partial results of all lanes; null: none of this lane.
  __device__ __forceinline__ void add(const float* partial, int row, int lane) {
    const float mine = partial ? load_fresh(partial + row) : NOTHING;
    const float sum_of_mine = partial ? load_fresh(partial + S::ROWS + row) : 0.0f;
    float weight = 0;
    const uint32_t all = __ballot_sync(~0u, partial != nullptr);
    constexpr int AT_ONCE = PER_LANE <= 4 ? 12 : 4;  // rows in flight: most merges wait for memory once
#pragma unroll 1
    for (uint32_t left = all; left;) {
      float x[AT_ONCE][PER_LANE];
      int source[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) {
        source[i] = left ? __ffs(left) - 1 : -1;
        const uint64_t from = __shfl_sync(~0u, reinterpret_cast<uint64_t>(partial), max(source[i], 0));
        if (left) load_row<S>(x[i], reinterpret_cast<const float*>(from) + 2 * S::ROWS + row * S::D, lane);
        left &= left - 1;
      }
      if (source[0] == __ffs(all) - 1) {  // the first of them are on their way
        float largest = fmaxf(mine, reference);
#pragma unroll
        for (int m = 16; m; m /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, m));
        const float shrink = exp2_fast(reference - largest);
        weight = partial ? exp2_fast(mine - largest) : 0.0f;
        float total = weight * sum_of_mine;
#pragma unroll
        for (int m = 16; m; m /= 2) total += __shfl_xor_sync(~0u, total, m);
        reference = largest, sum = sum * shrink + total;
#pragma unroll
        for (int j = 0; j < PER_LANE; j++) output[j] *= shrink;
      }
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) {
        const float w = __shfl_sync(~0u, weight, max(source[i], 0));
#pragma unroll
        for (int j = 0; j < PER_LANE; j++)
          output[j] = source[i] < 0 || w == 0 ? output[j] : fmaf(w, x[i][j], output[j]);
      }
    }
  }

  __device__ __forceinline__ void write(float* partial, int row, int lane) const {
    if (lane == 0) partial[row] = reference, partial[S::ROWS + row] = sum;
#pragma unroll
    for (int j = 0; j < PER_LANE; j++)
      partial[2 * S::ROWS + row * S::D + Row<S::D>::element(lane, j)] = output[j];
  }
};

template <class S>
__global__ void __launch_bounds__(32 * S::MAX_WARPS, 1) decode_kernel(const __grid_constant__ DecodeParams p, int warp_bytes) {
  extern __shared__ __align__(128) uint8_t shared[];
  constexpr int GROUP = TILE_TOKENS * S::TILES;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, num_warps = blockDim.x >> 5;
  Piece* pieces = reinterpret_cast<Piece*>(shared);  // [num_warps][2]
  uint8_t* mine = shared + num_warps * 2 * sizeof(Piece) + warp * warp_bytes;
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
  float* raw = reinterpret_cast<float*>(query_bytes + S::QUERY_BYTES);

  if (lane < S::STAGES) Copier::init(barriers + lane);
  Copier::fence_init();
  if (lane < 2) pieces[2 * warp + lane].num_groups = 0;
  __syncwarp();

  Request request{};
  const int work = work_of<S>(p, 0, request, lane);
  int total = work;
  for (int base = 32; base < p.num_reqs; base += 32) {
    Request other;
    total += work_of<S>(p, base, other, lane);
  }
  const Shares shares{unsigned(__reduce_add_sync(~0u, total)), gridDim.x * num_warps};
  if (shares.total == 0) return;
  const int share = blockIdx.x * num_warps + warp;
  const int begin = shares.begin(share), end = shares.begin(share + 1);

  if (begin < end) {
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
      if (whole_groups && source)
        Copier::copy_whole<S::STAGE_BYTES>(ring + into * S::STAGE_BYTES, reinterpret_cast<const uint8_t*>(source), barriers + into, lane);
      else
        Copier::copy<S::TILE_BYTES>(ring + into * S::STAGE_BYTES + lane * S::TILE_BYTES, reinterpret_cast<const uint8_t*>(source),
                                  source && lane < S::TILES, barriers + into, lane);
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

    RowBlock<S> rows;
    typename RowBlock<S>::QueryBits bits;
    rows.fetch(p, current, bits, lane);
    load(0);

    for (int at = begin; at < end;) {
      const int unit_begin = at - current.group, count = min(end - at, current.request.num_groups - current.group);
      if (at > begin) rows.fetch(p, current, bits, lane);
      rows.prepare(p, bits, query_bytes, raw, lane);
      if (at == begin) {  // not before: copies are served in order, and every warp waits for its first one
#pragma unroll
        for (int s = 1; s < S::STAGES; s++) load(s);
      }
      float offset[S::ROW_TILES] = {};
      int position = (current.request.first_group + current.group) * GROUP;
      for (int i = 0; i < count; i++, position += GROUP) {
        if (p.key_offset) offset_scores<S>(p, current.head, position, raw, offset, lane);
        Copier::wait<S::STAGES>(barriers + stage, parity);
        rows.add(ring + stage * S::STAGE_BYTES, position, offset, p.logits_soft_cap, lane);
        __syncwarp();
        load(stage);
        if (++stage == S::STAGES) stage = 0, parity ^= 1;
      }
      at += count;
      rows.reduce();
      const bool whole = count == current.request.num_groups;
      if (whole) {
        rows.finish(p, current, lane);
      } else {
        // At most two of a share: of the unit that it ends in, into the ring, which is free then, and of the one that it
        // begins in.
        float* partial = at == end ? reinterpret_cast<float*>(ring) : p.workspace + int64_t(share) * S::PARTIAL_FLOATS;
        rows.write(partial, lane);
        if (lane == 0)
          pieces[2 * warp + (unit_begin <= begin ? 0 : 1)] = {
              partial, unit_begin, current.request.num_groups, current.request.query_start,
              current.request.query_len * p.group_size, current.head, current.row_block};
      }
      __syncwarp();
      if (at < end) next_unit(current);
    }
  }
  __syncthreads();

  // One warp a row: merge the pieces of this CTA and, in the last CTA to come, those of all CTAs.
  const Shares ctas{shares.total, gridDim.x};
  const int cta_begin = ctas.begin(blockIdx.x);
  auto partial_of = [&](int cta, int begins, int unit_begin) {
    const int64_t index = shares.num_shares + 2 * int64_t(cta) + (unit_begin <= begins ? 0 : 1);
    return p.workspace + index * S::PARTIAL_FLOATS;
  };
#pragma unroll 1
  for (int task = warp; task < num_warps * 2 * S::ROWS; task += num_warps) {
    const int row = task % S::ROWS, entry = task / S::ROWS;
    const Piece piece = pieces[entry];
    if (piece.num_groups == 0 || piece.row_block * S::ROWS + row >= piece.num_rows) continue;
    const bool same = lane < 2 * num_warps && pieces[lane].num_groups && pieces[lane].unit_begin == piece.unit_begin;
    if (__ffs(__ballot_sync(~0u, same)) - 1 != entry) continue;  // another task's
    const int first_cta = ctas.owner(piece.unit_begin), last_cta = ctas.owner(piece.unit_begin + piece.num_groups - 1);
    Merge<S> merge;
    merge.add(same ? pieces[lane].partial : nullptr, row, lane);
    if (first_cta != last_cta) {
      merge.write(partial_of(blockIdx.x, cta_begin, piece.unit_begin), row, lane);
      __syncwarp();
      // A unit's CTAs count at its first one, which holds the beginning of no other unit that goes on in another CTA.
      const unsigned contributors = shares.total >= ctas.num_shares ? last_cta - first_cta + 1 : piece.num_groups;
      unsigned arrived = 0;
      if (lane == 0) arrived = count_arrival(p.counters + first_cta * 16 + row, contributors - 1);
      if (__shfl_sync(~0u, arrived, 0) != contributors - 1) continue;
      __syncwarp();
      merge = Merge<S>{};
#pragma unroll 1
      for (int base = first_cta; base <= last_cta; base += 32) {
        const int cta = base + lane, cta_begins = ctas.begin(cta);
        const bool has_part = cta <= last_cta && cta_begins < ctas.begin(cta + 1);  // a share may be empty
        merge.add(has_part ? partial_of(cta, cta_begins, piece.unit_begin) : nullptr, row, lane);
      }
    }
    finish_piece<S>(p, piece, row, merge.output, merge.reference, merge.sum, lane);
  }
}

}  // namespace tq
