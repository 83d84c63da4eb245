// Merges the partial results that the shares of a unit left (decode.cuh), rotates back and stores.
//
// `parts` warps take a row: each merges every parts-th partial result, the first of them what the others found. A fixed
// order, so results do not depend on timing. What shares hold whole was stored by them.
#pragma once
#include <cuda_runtime.h>

#include "early_start.cuh"
#include "row_block.cuh"

namespace tq {

constexpr int MERGE_WARPS = 16;

// AT_ONCE: rows in flight, so that most merges wait for memory once.
template <class S, int AT_ONCE> struct Merge {
  static constexpr int PER_LANE = Row<S::D>::PER_LANE;
  float reference = NOTHING, sum = 0, output[PER_LANE] = {};

  static __device__ __forceinline__ void load_row(float (&v)[PER_LANE], const float* row, int lane) {
    if constexpr (PER_LANE % 4 == 0) {
#pragma unroll
      for (int j = 0; j < PER_LANE; j += 4) {
        const float4 x = load_fresh_4(row + Row<S::D>::element(lane, j));
        v[j] = x.x, v[j + 1] = x.y, v[j + 2] = x.z, v[j + 3] = x.w;
      }
    } else {
#pragma unroll
      for (int j = 0; j < PER_LANE; j++) v[j] = load_fresh(row + Row<S::D>::element(lane, j));
    }
  }

  // Add the rows [D + 4] of all lanes; null: none of this lane.
  __device__ __forceinline__ void add(const float* mine, int lane) {
    const float reference_of_mine = mine ? load_fresh(mine + S::D) : NOTHING;
    const float sum_of_mine = mine ? load_fresh(mine + S::D + 1) : 0.0f;
    float weight = 0;
    const uint32_t all = __ballot_sync(~0u, mine != nullptr);
#pragma unroll 1
    for (uint32_t left = all; left;) {
      float x[AT_ONCE][PER_LANE];
      int source[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) {
        source[i] = left ? __ffs(left) - 1 : -1;
        const uint64_t from = __shfl_sync(~0u, reinterpret_cast<uint64_t>(mine), max(source[i], 0));
        if (left) load_row(x[i], reinterpret_cast<const float*>(from), lane);
        left &= left - 1;
      }
      if (source[0] == __ffs(all) - 1) {  // the first of them are on their way
        float largest = fmaxf(reference_of_mine, reference);
#pragma unroll
        for (int m = 16; m; m /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, m));
        const float shrink = exp2_fast(reference - largest);
        weight = mine ? exp2_fast(reference_of_mine - largest) : 0.0f;
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

  // Leave a row for another warp's `add`.
  __device__ __forceinline__ void write(float* row, int lane) const {
    if (lane == 0) row[S::D] = reference, row[S::D + 1] = sum;
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) row[Row<S::D>::element(lane, j)] = output[j];
  }
};

template <class S> __host__ __device__ constexpr int merge_shared_bytes(int num_warps) {
  return 4 * num_warps * S::PARTIAL_ROW + 4 * 2 * MERGE_WARPS;
}

// Grid: (request, KV head, block of rows of max_row_blocks, ROWS / rows of a CTA). A CTA has blockDim / 32 / parts rows. NARROW:
// for one part; a row has few partial results then, and there are many rows: they fit a multiprocessor together.
template <class S, bool NARROW, int WARPS = NARROW && S::ROWS < MERGE_WARPS ? S::ROWS : MERGE_WARPS>
__global__ void __launch_bounds__(32 * WARPS, NARROW ? 40 / WARPS : 1)
    merge_kernel(const __grid_constant__ DecodeParams p, int num_shares, int max_row_blocks, int parts) {
  using R = Row<S::D>;
  using M = Merge<S, (NARROW ? 16 : 48) / R::PER_LANE>;
  extern __shared__ __align__(128) uint8_t shared[];
  float* merged = reinterpret_cast<float*>(shared);                                            // [num_warps][PARTIAL_ROW]
  int* works = reinterpret_cast<int*>(shared + merge_shared_bytes<S>(blockDim.x >> 5)) - 2 * MERGE_WARPS;  // [num_warps][2]
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, num_warps = blockDim.x >> 5;
  const int rows_of_cta = num_warps / parts, ctas_of_unit = S::ROWS / rows_of_cta;
  int index = blockIdx.x / ctas_of_unit;
  const int row_block = index % max_row_blocks;
  index /= max_row_blocks;
  const int head = index % p.num_kv_heads, r = index / p.num_kv_heads;

  // Lengths were there before the kernel that may still run.
  int before = 0, all = 0;
  for (int i = threadIdx.x; i < p.num_reqs; i += blockDim.x) {
    Request request;
    request.load<S>(p, i);
    const int work = request.work(p);
    all += work;
    before += i < r ? work : 0;
  }
  before = __reduce_add_sync(~0u, before), all = __reduce_add_sync(~0u, all);
  if (lane == 0) works[2 * warp] = before, works[2 * warp + 1] = all;
  Request request{};
  request.load<S>(p, r);
  __syncthreads();
  before = all = 0;
  for (int w = 0; w < num_warps; w++) before += works[2 * w], all += works[2 * w + 1];
  const Shares shares{unsigned(all), unsigned(num_shares)};
  const int unit_begin = before + (head * request.row_blocks + row_block) * request.num_groups;

  const int first = row_block < request.row_blocks ? shares.owner(unit_begin) : 0;
  const int last = row_block < request.row_blocks ? shares.owner(unit_begin + request.num_groups - 1) : 0;
  wait_for_earlier_kernels();
  if (first == last) return;  // nothing, or whole

  const int row = blockIdx.x % ctas_of_unit * rows_of_cta + warp / parts, part = warp % parts;
  const int query_row = row_block * S::ROWS + row;
  const bool real = query_row < request.query_len * p.group_size;
  const bool share_a_group = shares.total < shares.num_shares;  // then some shares are empty
  const int count = share_a_group ? request.num_groups : last - first + 1;
  M merge;
#pragma unroll 1
  for (int base = 0; real && base < count; base += 32 * parts) {
    const int i = base + lane * parts + part;
    const int share = share_a_group ? shares.owner(unit_begin + min(i, count - 1)) : first + min(i, count - 1);
    const int64_t row_of_all = partial_index(share, shares.begin(share), unit_begin) * S::ROWS + row;
    merge.add(i < count ? p.workspace + row_of_all * S::PARTIAL_ROW : nullptr, lane);
  }
  if constexpr (!NARROW) {
    merge.write(merged + warp * S::PARTIAL_ROW, lane);
    __syncthreads();
    if (part != 0) return;
    merge = M{};
    merge.add(lane < parts ? merged + (warp + lane) * S::PARTIAL_ROW : nullptr, lane);
  }
  if (!real) return;

  const int token = request.query_start + query_row / p.group_size, query_head = head * p.group_size + query_row % p.group_size;
  R::rotate_back(merge.output, lane);
  const float scale = RowBlock<S>::finish_row(p, token, query_head, merge.reference, merge.sum, lane == 0);
  const int64_t base = token * p.out_stride_token + query_head * p.out_stride_head;
#pragma unroll
  for (int j = 0; j < R::PER_LANE; j++)
    store_float(p.out, base + R::element(lane, j), p.dtype, merge.sum == 0 ? 0.0f : merge.output[j] * scale);
}

// Calls launch(whether NARROW, CTAs, warps of one, arguments of merge_kernel after the first): as many warps a row as leave
// each no more than 12 partial results, as far as a CTA has them.
template <class S, class Launch>
auto launch_merge(const DecodeParams& p, int max_query_len, int num_shares, Launch launch) {
  const int max_row_blocks = (max_query_len * p.group_size + S::ROWS - 1) / S::ROWS;
  const int num_units = p.num_reqs * p.num_kv_heads * max_row_blocks;
  int parts = 1;
  while (parts < MERGE_WARPS && num_shares / num_units + 2 > 12 * parts) parts *= 2;
  int rows = S::ROWS < MERGE_WARPS / parts ? S::ROWS : MERGE_WARPS / parts;
  while (S::ROWS % rows) rows /= 2;
  return launch(parts == 1, num_units * (S::ROWS / rows), parts * rows, num_shares, max_row_blocks, parts);
}

}  // namespace tq
