// Attention that writes what it reads: in a step of one token a request, the key and the value of that token.
//
// The warp whose share has a unit's last group, where that token stands, encodes it before it loads anything: no kernel of its
// own, no launch. Query rows of a KV head in several blocks have a unit each; each of their warps writes the token, the same bytes.
//
// One token may be read by another request: the last one of a block, which a prefix cache may have given to a request that
// begins in the same step. A warp that reads such a block writes this token too.
#pragma once
#include "encode.cuh"
#include "decode.h"
#include "work_list.cuh"

namespace tq {

template <class S> struct NewestToken {
  static constexpr bool EXISTS = S::KEY_BITS < TRELLIS && !S::SKETCH;  // others are written by a kernel of their own
  using Shape = VectorShape<S::D, WIDE>;
  static constexpr int ROLES_AT_ONCE = Shape::VECTORS > 1 ? 2 : 1;
  using Levels = LevelsOfCells<4>;

  static __host__ __device__ __forceinline__ int table_bytes(const DecodeParams& p) {
    return 4 * (p.store.role[0].table_rows + p.store.role[1].table_rows);
  }

  template <int BITS> static __device__ __forceinline__ void fill_table(uint32_t* table, int rows) {
    if constexpr (BITS != 8)
      for (int cell = threadIdx.x; cell < rows; cell += blockDim.x) table[cell] = table_entry<BITS>(cell);
  }
  static __device__ __forceinline__ void fill_tables(const DecodeParams& p, uint32_t* tables) {
    fill_table<S::KEY_BITS>(tables, p.store.role[0].table_rows);
    fill_table<S::VALUE_BITS>(tables + p.store.role[0].table_rows, p.store.role[1].table_rows);
  }

  template <int BITS>
  static __device__ __forceinline__ float encode(float (&x)[Shape::ROWS][Shape::RUN], float length, const StoreRole& role,
                                                 const uint32_t* table, Destination to, int q) {
    if constexpr (BITS == 8)
      return encode_bytes<Shape>(x, length, role, to, q);
    else
      return encode_levels<Shape, BITS>(x, length, role, Levels(table), to, q);
  }

  // The newest token of a request; its slot may say that it is not to be stored.
  static __device__ __forceinline__ void write(const DecodeParams& p, const Request& request, int head, const uint32_t* tables,
                                               int lane) {
    const StoreParams& store = p.store;
    const int q = lane % Shape::LANES;
    const int token = request.query_start;
    const int64_t slot = store.slot_mapping[token];
    const uint32_t signs = lane_signs<Shape>(q);
#pragma unroll
    for (int first = 0; first < 2; first += ROLES_AT_ONCE) {
      const int vector = lane / Shape::LANES;  // those from ROLES_AT_ONCE on do as the first ones, but for writing
      const int r = first + vector % ROLES_AT_ONCE;
      const StoreRole& role = store.role[r];
      float x[Shape::ROWS][Shape::RUN];
      load_vector<Shape, false>(role.x, role.dtype, token * role.token_stride + head * role.head_stride, role.vector_loads, signs,
                                q, x);
      if (r == 0 && store.key_offset != nullptr) {
        const int segment = min((request.seq_len - 1) / SEGMENT_TOKENS, store.num_segments - 1);
        load_vector<Shape, true>(store.key_offset, store.offset_dtype,
                                 segment * store.offset_segment_stride + head * store.offset_head_stride, store.vector_offsets,
                                 signs, q, x);
      }
      if (slot < 0) return;
      const int place = static_cast<uint32_t>(slot) % TILE_TOKENS;
      const float length = rotate<Shape>(x, q);
      uint8_t* tile = vector < ROLES_AT_ONCE ? tile_of(store, slot, head) : nullptr;
      const Destination to = {tile, r == 0 ? place : value_token_order(place)};
      const uint32_t* table = tables + (r == 0 ? 0 : store.role[0].table_rows);
      float scale;
      if constexpr (S::KEY_BITS == S::VALUE_BITS) {
        scale = encode<S::KEY_BITS>(x, length, role, table, to, q);
      } else {
        float y[Shape::ROWS][Shape::RUN];
#pragma unroll
        for (int i = 0; i < Shape::ROWS; i++)
#pragma unroll
          for (int j = 0; j < Shape::RUN; j++) y[i][j] = x[i][j];
        const Destination key = {r == 0 ? tile : nullptr, to.token}, value = {r == 0 ? nullptr : tile, to.token};
        const float of_key = encode<S::KEY_BITS>(x, length, store.role[0], tables, key, q);
        const float of_value = encode<S::VALUE_BITS>(y, length, store.role[1], tables + store.role[0].table_rows, value, q);
        scale = r == 0 ? of_key : of_value;
      }
      write_scale(scale, role.scale, place, to, q);
    }
  }

  // Of requests whose newest token completes a block: that token, if a request that this warp reads has the block too.
  static __device__ __forceinline__ void write_shared_blocks(const DecodeParams& p, const Request& reader, int head,
                                                             const uint32_t* tables, int lane) {
    const int* reads = p.block_table + reader.index * p.block_table_stride;
    for (int base = 0; base < p.num_reqs; base += 32) {
      const int r = base + lane;
      const int seq_len = r < p.num_reqs ? p.seq_lens[r] : 0;
      bool shared = completes(p, seq_len) && seq_len < reader.seq_len;
      if (shared) {
        const int column = seq_len / p.store.block_size - 1;
        shared = reads[column] == p.block_table[r * p.block_table_stride + column];
      }
      for (uint32_t left = __ballot_sync(~0u, shared); left; left &= left - 1) {
        Request writer{};
        writer.load<S>(p, base + __ffs(left) - 1);
        if (writer.query_len > 0) write(p, writer, head, tables, lane);
      }
    }
  }

  static __device__ __forceinline__ bool completes(const DecodeParams& p, int seq_len) {
    return seq_len > 0 && seq_len % p.store.block_size == 0;
  }

  // What a warp must write to read `work` groups from a cursor on: the newest tokens of the units that end there and, if any
  // request completes a block, those of blocks that units there share with it.
  static __device__ __forceinline__ void write_share(const DecodeParams& p, Cursor at, int work, bool any_completes,
                                                     const uint32_t* tables, int lane) {
    while (true) {
      if (any_completes && p.num_reqs > 1) write_shared_blocks(p, at.request, at.head, tables, lane);
      work -= at.request.num_groups - at.group;
      if (work < 0) break;
      write(p, at.request, at.head, tables, lane);
      if (work == 0) break;
      at.next_unit<S>(p);
    }
    Copier::publish();
    __syncwarp();
  }
};

}  // namespace tq
