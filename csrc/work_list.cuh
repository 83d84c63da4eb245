// The work list of a decode call, (request, KV head, block of query rows, group of tokens) in this order, and its equal shares.
// Every warp finds its share from seq_lens on its own: nothing is planned on the host.
#pragma once
#include "decode.h"
#include "layout.cuh"

namespace tq {

// One request's part of the work list.
struct Request {
  int index, seq_len, query_start, query_len, row_blocks, first_group, num_groups;

  template <class S> __device__ __forceinline__ void load(const DecodeParams& p, int r) {
    constexpr int GROUP = TILE_TOKENS * S::TILES;
    index = r;
    seq_len = p.seq_lens[r];
    query_start = p.query_start_loc[r];
    query_len = p.query_start_loc[r + 1] - query_start;
    row_blocks = (query_len * p.group_size + S::ROWS - 1) / S::ROWS;
    first_group = p.sliding_window > 0 ? max(0, seq_len - query_len - p.sliding_window + 1) / GROUP : 0;
    num_groups = max(1, (seq_len + GROUP - 1) / GROUP - first_group);
  }
  __device__ __forceinline__ int work(const DecodeParams& p) const { return num_groups * row_blocks * p.num_kv_heads; }
};

// A place in the work list.
struct Cursor {
  Request request;
  int head, row_block, group;  // group counts from the unit's first

  template <class S> __device__ __forceinline__ void next_unit(const DecodeParams& p) {
    group = 0;
    if (++row_block < request.row_blocks) return;
    row_block = 0;
    if (++head < p.num_kv_heads) return;
    head = 0;
    int r = request.index;
    do {
      if (++r >= p.num_reqs) return;
      request.load<S>(p, r);
    } while (request.row_blocks == 0);
  }
};

// Equal shares of the work list: warp w of num_shares has groups [begin(w), begin(w + 1)).
struct Shares {
  unsigned total, num_shares;
  __device__ __forceinline__ unsigned scale(unsigned a, unsigned b, unsigned less, unsigned c) const {  // (a * b - less) / c
    if (total >= 0xffffffffu / num_shares) return unsigned((uint64_t(a) * b - less) / c);
    return (a * b - less) / c;
  }
  __device__ __forceinline__ int begin(int share) const { return scale(total, share, 0, num_shares); }
  __device__ __forceinline__ int owner(int group) const { return scale(group + 1, num_shares, 1, total); }
};

// Place in the workspace of what `share`, which begins at `begin`, has of a unit: at most two shares' units go on elsewhere, the
// one that it begins in and the one that it ends in.
__device__ __forceinline__ int64_t partial_index(int share, int begin, int unit_begin) {
  return 2 * int64_t(share) + (unit_begin <= begin ? 0 : 1);
}

// This lane's request of 32 from `base`, and its work.
template <class S> __device__ __forceinline__ int work_of(const DecodeParams& p, int base, Request& request, int lane) {
  if (base + lane >= p.num_reqs) return 0;
  request.load<S>(p, base + lane);
  return request.work(p);
}

// The cursor of group `target` of the work list; first_request and first_work: work_of requests 0..31.
template <class S>
__device__ __forceinline__ Cursor seek(const DecodeParams& p, int target, Request request, int work, int lane) {
  int before = 0, base = 0, found, sum;
  while (true) {
    sum = work;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(~0u, sum, d);
      if (lane >= d) sum += other;
    }
    const uint32_t past = __ballot_sync(~0u, before + sum > target);
    found = past ? __ffs(past) - 1 : 31;
    if (past || base + 32 >= p.num_reqs) break;
    before += __shfl_sync(~0u, sum, 31);
    base += 32;
    work = work_of<S>(p, base, request, lane);
  }
  Cursor c;
  c.request = {__shfl_sync(~0u, request.index, found),       __shfl_sync(~0u, request.seq_len, found),
               __shfl_sync(~0u, request.query_start, found), __shfl_sync(~0u, request.query_len, found),
               __shfl_sync(~0u, request.row_blocks, found),  __shfl_sync(~0u, request.first_group, found),
               __shfl_sync(~0u, request.num_groups, found)};
  const unsigned rest = target - before - __shfl_sync(~0u, sum - work, found);
  const unsigned unit = rest / unsigned(c.request.num_groups);
  c.group = rest - unit * c.request.num_groups;
  c.head = unit / unsigned(c.request.row_blocks);
  c.row_block = unit - c.head * c.request.row_blocks;
  return c;
}

}  // namespace tq
