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

#include "codes.cuh"
#include "decode.h"
#include "rows.cuh"

namespace tq {

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;
constexpr int MAGIC_BITS = 0x4B400000;     // 1.5 * 2^23: MAGIC_BITS + n are the bits of MAGIC + n for |n| < 2^22
constexpr float MAGIC = 12582912.0f;
constexpr float NOTHING = -1e30f;          // reference of a row that has seen no token
constexpr float OVERFLOW = 1048576.0f;     // weights above this move the reference
constexpr float QUERY_MAX = 16256.0f;      // 128 * 127
constexpr float WEIGHT_MAX = 16382.0f;     // 128 * 127 + 127, less one for rounding

__device__ __forceinline__ void mma_s8(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// As mma_s8, on accumulators that start at MAGIC_BITS.
__device__ __forceinline__ void mma_s8_first(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                             uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(MAGIC_BITS));
}

__device__ __forceinline__ uint32_t transpose_8x8(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float max_over_tokens(float x) {  // over the lanes that share lane % 4
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 4));
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 8));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 16));
}

__device__ __forceinline__ float sum_over_tokens(float x) {
  x += __shfl_xor_sync(~0u, x, 4);
  x += __shfl_xor_sync(~0u, x, 8);
  return x + __shfl_xor_sync(~0u, x, 16);
}

// Copies tile records into a ring of stages: the bulk copy engine and one mbarrier a stage from sm_90 on, cp.async below.
struct Copier {
#if __CUDA_ARCH__ >= 900
  static __device__ __forceinline__ void init(uint64_t* barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"((uint32_t)__cvta_generic_to_shared(barrier)) : "memory");
  }
  static __device__ __forceinline__ void fence_init() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
  // Lanes with `valid` copy their record; all lanes call.
  template <int BYTES>
  static __device__ __forceinline__ void copy(uint8_t* to, const uint8_t* from, bool valid, uint64_t* barrier, int lane) {
    const uint32_t bar = (uint32_t)__cvta_generic_to_shared(barrier);
    const int count = __popc(__ballot_sync(~0u, valid));
    if (lane == 0)
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(count * BYTES) : "memory");
    if (valid)
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                       (uint32_t)__cvta_generic_to_shared(to)),
                   "l"(from), "r"(BYTES), "r"(bar)
                   : "memory");
  }
  template <int STAGES> static __device__ __forceinline__ void wait(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(
            (uint32_t)__cvta_generic_to_shared(barrier)),
        "r"(parity)
        : "memory");
  }
  static __device__ __forceinline__ void nothing() {}
#else
  static __device__ __forceinline__ void init(uint64_t*) {}
  static __device__ __forceinline__ void fence_init() {}
  template <int BYTES>
  static __device__ __forceinline__ void copy(uint8_t* to, const uint8_t* from, bool valid, uint64_t*, int lane) {
    uint32_t lanes = __ballot_sync(~0u, valid);
    while (lanes) {
      const int source = __ffs(lanes) - 1;
      lanes &= lanes - 1;
      const uint64_t src = __shfl_sync(~0u, reinterpret_cast<uint64_t>(from), source);
      const uint32_t dst = __shfl_sync(~0u, (uint32_t)__cvta_generic_to_shared(to), source);
#pragma unroll
      for (int i = 0; i < (BYTES + 511) / 512; i++)
        if (i * 512 + lane * 16 < BYTES)
          asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst + i * 512 + lane * 16), "l"(src + i * 512 + lane * 16)
                       : "memory");
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
  template <int STAGES> static __device__ __forceinline__ void wait(uint64_t*, uint32_t) {
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
    __syncwarp();
  }
  static __device__ __forceinline__ void nothing() { asm volatile("cp.async.commit_group;" ::: "memory"); }
#endif
};

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
  static constexpr int MAX_WARPS = ROWS == 4 && D < 192 ? 12 : 8;  // 168 or 255 registers a lane
  static constexpr int WARP_BYTES = STAGES * STAGE_BYTES + QUERY_BYTES + 4 * Row<D>::SCRATCH_FLOATS + 16;
  static constexpr int OFFSET_BYTES = 4 * ROWS * D;  // more for the unrotated queries, with a key offset
  static int warp_bytes(const DecodeParams& p) { return WARP_BYTES + (p.key_offset ? OFFSET_BYTES : 0); }
};

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
  template <class S> __device__ __forceinline__ void next_group(const DecodeParams& p) {
    if (++group == request.num_groups) next_unit<S>(p);
  }
};

// Equal shares of the work list: warp w of num_shares has groups [begin(w), begin(w + 1)).
struct Shares {
  int total, num_shares;
  __device__ __forceinline__ int begin(int share) const { return int(int64_t(total) * share / num_shares); }
  __device__ __forceinline__ int owner(int group) const { return int((int64_t(group + 1) * num_shares - 1) / total); }
};

template <class S> __device__ __forceinline__ int total_work(const DecodeParams& p, int lane) {
  int total = 0;
  for (int r = lane; r < p.num_reqs; r += 32) {
    Request request;
    request.load<S>(p, r);
    total += request.work(p);
  }
  return __reduce_add_sync(~0u, total);
}

// The cursor of group `target` of the work list.
template <class S> __device__ __forceinline__ Cursor seek(const DecodeParams& p, int target, int lane) {
  int before = 0;
  Cursor c{};
  for (int base = 0;; base += 32) {
    Request request{};
    if (base + lane < p.num_reqs) request.load<S>(p, base + lane);
    const int work = base + lane < p.num_reqs ? request.work(p) : 0;
    int sum = work;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(~0u, sum, d);
      if (lane >= d) sum += other;
    }
    const uint32_t past = __ballot_sync(~0u, before + sum > target);
    if (past || base + 32 >= p.num_reqs) {
      const int found = past ? __ffs(past) - 1 : 31;
      int rest = target - before - __shfl_sync(~0u, sum - work, found);
      c.request.load<S>(p, min(base + found, p.num_reqs - 1));
      c.group = rest % c.request.num_groups;
      rest /= c.request.num_groups;
      c.row_block = rest % max(1, c.request.row_blocks);
      c.head = rest / max(1, c.request.row_blocks);
      return c;
    }
    before += __shfl_sync(~0u, sum, 31);
  }
}

// A unit that a share holds in part, as the merge needs it.
struct Piece {
  int unit_begin;  // place of the unit's first group in the work list
  int num_groups;  // of the unit; 0: no such piece
  int query_start, num_rows, head, row_block;
};

template <class S> struct RowIO {
  using R = Row<S::D>;
  static __device__ __forceinline__ void load(float (&v)[R::PER_LANE], const float* row, int lane) {
    if constexpr (S::D == 128 || S::D == 256) {
#pragma unroll
      for (int j = 0; j < R::PER_LANE; j += 4) {
        const float4 x = __ldcg(reinterpret_cast<const float4*>(row + lane * R::PER_LANE + j));
        v[j] = x.x, v[j + 1] = x.y, v[j + 2] = x.z, v[j + 3] = x.w;
      }
    } else {
#pragma unroll
      for (int j = 0; j < R::PER_LANE; j++) v[j] = R::valid(lane, j) ? __ldcg(row + R::element(lane, j)) : 0.0f;
    }
  }

  // Divide a row by its sum, rotate it back and store it with its lse.
  static __device__ __forceinline__ void finish(const DecodeParams& p, const Piece& piece, int row, float (&v)[R::PER_LANE],
                                                float reference, float sum, int lane, float* scratch) {
    const int index = piece.row_block * S::ROWS + row;
    const int token = piece.query_start + index / p.group_size, head = piece.head * p.group_size + index % p.group_size;
    float total = sum;
    if (p.sinks) total += exp2_fast(load_float(p.sinks, head, p.sinks_dtype) * LOG2_E - reference);
    R::rotate_back(v, lane, scratch);
    const float scale = sum == 0 ? 0.0f : rsqrtf(float(S::D)) / total;
    const int64_t base = token * p.out_stride_token + head * p.out_stride_head;
#pragma unroll
    for (int j = 0; j < R::PER_LANE; j++)
      if (R::valid(lane, j)) store_float(p.out, base + R::element(lane, j), p.dtype, sum == 0 ? 0.0f : v[j] * scale);
    if (p.lse && lane == 0)
      p.lse[head * p.lse_stride_head + token] = sum == 0 ? __int_as_float(0xff800000) : reference * LN_2 + logf(sum);
  }
};

// Partial results of one row: `at(i)` is a partial (reference [ROWS], sum [ROWS], output [ROWS, D]) or null.
template <class S, class At>
__device__ __forceinline__ void merge_row(int row, int count, At at, float (&v)[Row<S::D>::PER_LANE], float& reference, float& sum,
                                          int lane) {
  constexpr int PER_LANE = Row<S::D>::PER_LANE;
  reference = NOTHING;
  for (int i = lane; i < count; i += 32)
    if (const float* partial = at(i)) reference = fmaxf(reference, __ldcg(partial + row));
#pragma unroll
  for (int d = 16; d; d /= 2) reference = fmaxf(reference, __shfl_xor_sync(~0u, reference, d));
  sum = 0;
#pragma unroll
  for (int j = 0; j < PER_LANE; j++) v[j] = 0;
  for (int base = 0; base < count; base += 32) {
    const float* partial = base + lane < count ? at(base + lane) : nullptr;
    const float weight = partial ? exp2_fast(__ldcg(partial + row) - reference) : 0.0f;
    if (partial) sum += weight * __ldcg(partial + S::ROWS + row);
    const int n = min(32, count - base);
#pragma unroll 8
    for (int i = 0; i < n; i++) {
      const float* from = reinterpret_cast<const float*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(partial), i));
      const float w = __shfl_sync(~0u, weight, i);
      if (from) {
        float x[PER_LANE];
        RowIO<S>::load(x, from + 2 * S::ROWS + row * S::D, lane);
#pragma unroll
        for (int j = 0; j < PER_LANE; j++) v[j] = fmaf(w, x[j], v[j]);
      }
    }
  }
#pragma unroll
  for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
}

// What a warp knows of the unit it works on, and its running softmax. Lane (g, q) = (lane / 4, lane % 4) has the scores of
// query rows q, q + 4, .. and tokens g, g + 8 of a tile, and the outputs of those rows at coordinates 64 i + 8 g + 0..7.
template <class S> struct RowBlock {
  static constexpr int RT = S::ROW_TILES, D = S::D;
  using Key = KeyCodes<S::KEY_BITS, D>;
  using Value = ValueCodes<S::VALUE_BITS, D>;
  using R = Row<D>;

  uint32_t query[RT][Key::STEPS][2];       // operand B of the scores
  float query_scale[RT], query_shift[RT];  // score = (MAGIC + 128 high + low) * query_scale + query_shift, times the key scale
  float reference[RT];                     // weights are exp2(score - reference)
  float sum[RT];                           // of this lane's weights
  float weighted[RT];                      // of this lane's weights times value scales
  float output[RT][Value::M_TILES][2][4];
  int row_begin[RT], row_end[RT];          // positions that the row sees
  int begin, end, all_begin, all_end;      // positions that any row sees, and that all rows see

  __device__ __forceinline__ void prepare(const DecodeParams& p, const Cursor& c, uint8_t* bytes_, float* raw, float* scratch, int lane) {
    const int q = lane & 3, g = lane >> 2;
    const int num_rows = c.request.query_len * p.group_size;
    __syncwarp();
#pragma unroll
    for (int r = 0; r < S::ROWS; r++) {
      const int index = c.row_block * S::ROWS + r;
      const bool real = index < num_rows;
      const int token = c.request.query_start + index / p.group_size, head = c.head * p.group_size + index % p.group_size;
      const int64_t base = token * p.query_stride_token + head * p.query_stride_head;
      float v[R::PER_LANE];
#pragma unroll
      for (int j = 0; j < R::PER_LANE; j++)
        v[j] = real && R::valid(lane, j) ? load_float(p.query, base + R::element(lane, j), p.dtype) : 0.0f;
      if (p.key_offset) {
#pragma unroll
        for (int j = 0; j < R::PER_LANE; j++)
          if (R::valid(lane, j)) raw[r * D + R::element(lane, j)] = v[j];
      }
      R::rotate(v, lane, scratch);
      uint32_t largest = 0;
#pragma unroll
      for (int j = 0; j < R::PER_LANE; j++) largest = max(largest, __float_as_uint(v[j]) & 0x7fffffffu);
      const float maximum = __uint_as_float(__reduce_max_sync(~0u, largest));
      const float inverse = maximum > 0 ? QUERY_MAX / maximum : 0.0f;
      int total = 0;
#pragma unroll
      for (int j = 0; j < R::PER_LANE; j++)
        if (R::valid(lane, j)) {
          const int n = __float2int_rn(v[j] * inverse), high = (n + 64) >> 7;
          total += n;
          bytes_[(2 * r) * D + R::element(lane, j)] = uint8_t(high);
          bytes_[(2 * r + 1) * D + R::element(lane, j)] = uint8_t(n - 128 * high);
        }
      total = __reduce_add_sync(~0u, total);
      if (q == r % 4) {
        const float scale = maximum * (1.0f / QUERY_MAX) * rsqrtf(float(D)) * p.softmax_scale * LOG2_E * centroid_unit<S::KEY_BITS>();
        query_scale[r / 4] = scale;
        query_shift[r / 4] = ((HAS_HALF<S::KEY_BITS> ? 0.5f * total : 0.0f) - MAGIC) * scale;
        const int position = c.request.seq_len - c.request.query_len + index / p.group_size;
        row_end[r / 4] = real ? position + 1 : c.request.seq_len;
        row_begin[r / 4] = real && p.sliding_window > 0 ? position - p.sliding_window + 1 : 0;
      }
    }
    __syncwarp();
    const int first_index = c.row_block * S::ROWS / p.group_size;
    const int last_index = min(c.row_block * S::ROWS + S::ROWS, num_rows) - 1;
    const int first_position = c.request.seq_len - c.request.query_len + first_index;
    const int last_position = c.request.seq_len - c.request.query_len + last_index / p.group_size;
    begin = p.sliding_window > 0 ? first_position - p.sliding_window + 1 : 0;
    all_begin = p.sliding_window > 0 ? last_position - p.sliding_window + 1 : 0;
    end = min(last_position + 1, c.request.seq_len);
    all_end = first_position + 1;
#pragma unroll
    for (int t = 0; t < RT; t++) {
#pragma unroll
      for (int s = 0; s < Key::STEPS; s++) {
        const int group = Key::group_of(q, s);
        const uint8_t* from = bytes_ + (2 * (4 * t + (g >> 1)) + (g & 1)) * D + 8 * group;
        uint2 w = make_uint2(0, 0);
        if (D % 32 == 0 || group < D / 8) w = *reinterpret_cast<const uint2*>(from);
        query[t][s][0] = w.x, query[t][s][1] = w.y;
      }
      reference[t] = NOTHING, sum[t] = 0, weighted[t] = 0;
#pragma unroll
      for (int i = 0; i < Value::M_TILES; i++)
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
          for (int j = 0; j < 4; j++) output[t][i][h][j] = 0;
    }
  }

  // Add the tokens of a group, first position `position`, whose records stand in `stage`; offset: added to every score.
  __device__ __forceinline__ void add(const uint8_t* stage, int position, const float (&offset)[RT], float soft_cap, int lane) {
    const int q = lane & 3, g = lane >> 2;
    const bool edge = position < all_begin || position + TILE_TOKENS * S::TILES > all_end;
    float score[S::TILES][RT][2], value_scale[S::TILES][2];
#pragma unroll
    for (int t = 0; t < S::TILES; t++) {
      const uint8_t* tile = stage + t * S::TILE_BYTES;
      int product[RT][4];
#pragma unroll
      for (int c = 0; c < Key::STEPS / Key::CHUNK; c++) {
        Key first, second;
        first.load(tile, g, c, q);
        second.load(tile, g + 8, c, q);
#pragma unroll
        for (int i = 0; i < Key::CHUNK; i++) {
          uint32_t a[4];
          first.get(i, a[0], a[2]);
          second.get(i, a[1], a[3]);
          const int s = c * Key::CHUNK + i;
#pragma unroll
          for (int r = 0; r < RT; r++)
            if (s == 0)
              mma_s8_first(product[r], a[0], a[1], a[2], a[3], query[r][s][0], query[r][s][1]);
            else
              mma_s8(product[r], a[0], a[1], a[2], a[3], query[r][s][0], query[r][s][1]);
        }
      }
      const __half* key_scale = reinterpret_cast<const __half*>(tile + S::Page::KEY_SCALE);
      const __half* scale_of_value = reinterpret_cast<const __half*>(tile + S::Page::VALUE_SCALE);
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float scale = __half2float(key_scale[g + 8 * h]);
        value_scale[t][h] = __half2float(scale_of_value[g + 8 * h]);
#pragma unroll
        for (int r = 0; r < RT; r++) {
          const float x = fmaf(__int_as_float(product[r][2 * h]) - MAGIC, 128.0f, __int_as_float(product[r][2 * h + 1]));
          score[t][r][h] = fmaf(fmaf(x, query_scale[r], query_shift[r]), scale, offset[r]);
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
          for (int h = 0; h < 2; h++) score[t][r][h] = c - __fdividef(2 * c, 1 + exp2_fast(score[t][r][h] * inverse));  // c tanh(s / c)
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
        for (int i = 0; i < Value::M_TILES; i++)
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

    int product[RT][Value::M_TILES][4][4];
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
              weights[r][s][j][k] = prmt(w, 0, 0x4444 - (4 << 4 * j) + (s + 2 * k << 4 * j));
      }
#pragma unroll
      for (int i = 0; i < Value::M_TILES; i++) {
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
      for (int i = 0; i < Value::M_TILES; i++)
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
          for (int j = 0; j < 4; j++) {
            const int* n = product[r][i][j] + 2 * h;
            const float x = fmaf(__int_as_float(n[0]) - MAGIC, 128.0f, __int_as_float(n[1]) - MAGIC);
            output[r][i][h][j] = fmaf(x, unit[r], output[r][i][h][j]);
          }
  }

  __device__ __forceinline__ void write(float* partial, int lane) {
    const int q = lane & 3, g = lane >> 2;
#pragma unroll
    for (int t = 0; t < RT; t++) {
      const int row = 4 * t + q;
      const float total = sum_over_tokens(sum[t]);
      const float half = HAS_HALF<S::VALUE_BITS> ? 0.5f * sum_over_tokens(weighted[t]) : 0.0f;
      if (g == 0) __stcg(partial + row, reference[t]), __stcg(partial + S::ROWS + row, total);
#pragma unroll
      for (int i = 0; i < Value::M_TILES; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int group = 8 * i + g;
          const float* x = output[t][i][h];
          constexpr float u = centroid_unit<S::VALUE_BITS>();
          if (D % 64 == 0 || group < D / 8)
            __stcg(reinterpret_cast<float4*>(partial + 2 * S::ROWS + row * D + 8 * group + 4 * h),
                   make_float4((x[0] + half) * u, (x[1] + half) * u, (x[2] + half) * u, (x[3] + half) * u));
        }
    }
  }
};

// q . key_offset of the segment that holds `position`, for the rows of this lane, in units of the scores.
template <class S>
__device__ __forceinline__ void offset_scores(const DecodeParams& p, int head, int position, const float* raw,
                                              float (&offset)[S::ROW_TILES], int lane) {
  using R = Row<S::D>;
  const int segment = min(position / SEGMENT_TOKENS, p.num_segments - 1);
  const int64_t base = segment * p.offset_stride_segment + head * p.offset_stride_head;
  float part[S::ROWS] = {};
#pragma unroll
  for (int j = 0; j < R::PER_LANE; j++)
    if (R::valid(lane, j)) {
      const float x = load_float(p.key_offset, base + R::element(lane, j), p.offset_dtype);
#pragma unroll
      for (int r = 0; r < S::ROWS; r++) part[r] = fmaf(x, raw[r * S::D + R::element(lane, j)], part[r]);
    }
  const bool bit0 = lane & 1, bit1 = lane & 2;
#pragma unroll
  for (int t = 0; t < S::ROW_TILES; t++) {
    const float* x = part + 4 * t;
    const float a = (bit0 ? x[1] : x[0]) + __shfl_xor_sync(~0u, bit0 ? x[0] : x[1], 1);
    const float b = (bit0 ? x[3] : x[2]) + __shfl_xor_sync(~0u, bit0 ? x[2] : x[3], 1);
    const float c = (bit1 ? b : a) + __shfl_xor_sync(~0u, bit1 ? a : b, 2);
    offset[t] = sum_over_tokens(c) * p.softmax_scale * LOG2_E;
  }
}

template <class S>
__global__ void __launch_bounds__(32 * S::MAX_WARPS, 1) decode_kernel(const __grid_constant__ DecodeParams p, int warp_bytes) {
  extern __shared__ __align__(128) uint8_t shared[];
  constexpr int GROUP = TILE_TOKENS * S::TILES;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, num_warps = blockDim.x >> 5;
  Piece* pieces = reinterpret_cast<Piece*>(shared);  // [num_warps][2]
  uint8_t* mine = shared + num_warps * 2 * sizeof(Piece) + warp * warp_bytes;
  uint64_t* barriers = reinterpret_cast<uint64_t*>(mine);
  uint8_t* ring = mine + 16;
  uint8_t* query_bytes = ring + S::STAGES * S::STAGE_BYTES;
  float* scratch = reinterpret_cast<float*>(query_bytes + S::QUERY_BYTES);
  float* raw = scratch + Row<S::D>::SCRATCH_FLOATS;

  if (lane < S::STAGES) Copier::init(barriers + lane);
  Copier::fence_init();
  if (lane < 2) pieces[2 * warp + lane].num_groups = 0;
  __syncwarp();

  const Shares shares{total_work<S>(p, lane), int(gridDim.x) * num_warps};
  if (shares.total == 0) return;
  const int share = blockIdx.x * num_warps + warp;
  const int begin = shares.begin(share), end = shares.begin(share + 1);
  auto partial_of = [&](int s, int unit_begin) {
    return p.workspace + (int64_t(s) * 2 + (unit_begin <= shares.begin(s) ? 0 : 1)) * S::PARTIAL_FLOATS;
  };

  if (begin < end) {
    Cursor current = seek<S>(p, begin, lane), ahead = current;
    int to_load = end - begin, stage = 0;
    uint32_t parity = 0;
    // The block of this lane's tile of the group at `ahead`.
    int block = 0, tile_of_block = 0;
    bool valid = false;
    auto find = [&] {
      const int tile = (ahead.request.first_group + ahead.group) * S::TILES + lane;
      valid = lane < S::TILES && tile * TILE_TOKENS < ahead.request.seq_len;
      const int column = p.block_magic ? __umulhi(tile, p.block_magic) : tile;
      tile_of_block = tile - column * p.tiles_per_block;
      if (valid) block = p.block_table[ahead.request.index * p.block_table_stride + column];
    };
    auto load = [&](int into) {
      if (to_load == 0) {
        Copier::nothing();
        return;
      }
      const uint8_t* from = p.kv_cache + block * p.cache_stride_block + ahead.head * p.cache_stride_head +
                            tile_of_block * S::TILE_BYTES;
      Copier::copy<S::TILE_BYTES>(ring + into * S::STAGE_BYTES + lane * S::TILE_BYTES, from, valid, barriers + into, lane);
      if (--to_load) ahead.next_group<S>(p), find();
    };
    find();
#pragma unroll
    for (int s = 0; s < S::STAGES; s++) load(s);

    RowBlock<S> rows;
    for (int at = begin; at < end;) {
      const int unit_begin = at - current.group, count = min(end - at, current.request.num_groups - current.group);
      rows.prepare(p, current, query_bytes, raw, scratch, lane);
      float offset[S::ROW_TILES] = {};
      for (int i = 0; i < count; i++) {
        const int position = (current.request.first_group + current.group + i) * GROUP;
        if (p.key_offset) offset_scores<S>(p, current.head, position, raw, offset, lane);
        Copier::wait<S::STAGES>(barriers + stage, parity);
        rows.add(ring + stage * S::STAGE_BYTES, position, offset, p.logits_soft_cap, lane);
        __syncwarp();
        load(stage);
        if (++stage == S::STAGES) stage = 0, parity ^= 1;
      }
      const int slot = unit_begin <= begin ? 0 : 1;
      float* partial = p.workspace + (int64_t(share) * 2 + slot) * S::PARTIAL_FLOATS;
      rows.write(partial, lane);
      const Piece piece{unit_begin, current.request.num_groups, current.request.query_start,
                        current.request.query_len * p.group_size, current.head, current.row_block};
      __syncwarp();
      if (count == piece.num_groups) {
        for (int row = 0; row < S::ROWS && piece.row_block * S::ROWS + row < piece.num_rows; row++) {
          float v[Row<S::D>::PER_LANE];
          RowIO<S>::load(v, partial + 2 * S::ROWS + row * S::D, lane);
          RowIO<S>::finish(p, piece, row, v, __ldcg(partial + row), __ldcg(partial + S::ROWS + row), lane, scratch);
        }
      } else if (lane == 0) {
        pieces[2 * warp + slot] = piece;
      }
      __syncwarp();
      at += count;
      if (at < end) current.next_unit<S>(p);
    }
  }
  __syncthreads();

  // One warp a row: merge the pieces of this CTA.
  const int cta_share = blockIdx.x * num_warps;
  const Shares ctas{shares.total, int(gridDim.x)};
  const int cta_begin = ctas.begin(blockIdx.x), cta_end = ctas.begin(blockIdx.x + 1);
  float* cta_partials = p.workspace + int64_t(shares.num_shares) * 2 * S::PARTIAL_FLOATS;
  for (int task = warp; task < num_warps * 2 * S::ROWS; task += num_warps) {
    const int row = task % S::ROWS, owner = task / S::ROWS / 2;
    const Piece piece = pieces[task / S::ROWS];
    if (piece.num_groups == 0 || piece.row_block * S::ROWS + row >= piece.num_rows) continue;
    const int first = shares.owner(max(piece.unit_begin, cta_begin));
    if (first != cta_share + owner) continue;
    const int last = shares.owner(min(piece.unit_begin + piece.num_groups, cta_end) - 1);
    float v[Row<S::D>::PER_LANE], reference, sum;
    merge_row<S>(
        row, last - first + 1,
        [&](int i) -> const float* {
          return shares.begin(first + i) < shares.begin(first + i + 1) ? partial_of(first + i, piece.unit_begin) : nullptr;
        },
        v, reference, sum, lane);
    const int first_cta = ctas.owner(piece.unit_begin), last_cta = ctas.owner(piece.unit_begin + piece.num_groups - 1);
    if (first_cta != last_cta) {
      auto cta_partial = [&](int c) {
        return cta_partials + (int64_t(c) * 2 + (piece.unit_begin <= ctas.begin(c) ? 0 : 1)) * S::PARTIAL_FLOATS;
      };
      float* partial = cta_partial(blockIdx.x);
      if (lane == 0) __stcg(partial + row, reference), __stcg(partial + S::ROWS + row, sum);
#pragma unroll
      for (int j = 0; j < Row<S::D>::PER_LANE; j++)
        if (Row<S::D>::valid(lane, j)) __stcg(partial + 2 * S::ROWS + row * S::D + Row<S::D>::element(lane, j), v[j]);
      __threadfence();
      __syncwarp();
      // A unit's CTAs count at its first one, which holds the beginning of no other unit that goes on in another CTA.
      const unsigned contributors = shares.total >= ctas.num_shares ? last_cta - first_cta + 1 : piece.num_groups;
      unsigned arrived = 0;
      if (lane == 0) arrived = atomicInc(p.counters + first_cta * 16 + row, contributors - 1);
      if (__shfl_sync(~0u, arrived, 0) != contributors - 1) continue;
      __threadfence();
      merge_row<S>(
          row, last_cta - first_cta + 1,
          [&](int i) -> const float* {
            return ctas.begin(first_cta + i) < ctas.begin(first_cta + i + 1) ? cta_partial(first_cta + i) : nullptr;
          },
          v, reference, sum, lane);
    }
    RowIO<S>::finish(p, piece, row, v, reference, sum, lane, scratch);
  }
}

}  // namespace tq
