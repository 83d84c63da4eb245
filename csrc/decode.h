// Arguments of attention to codes; tq_vllm/ops/cuda_attention.py fills the same struct.
#pragma once

#include "store_kv.h"

namespace tq {

struct DecodeParams {
  const void* query;           // [num_tokens, num_heads, head_dim] dtype
  const uint8_t* kv_cache;     // [num_blocks, num_kv_heads, block_size, slot_bytes]
  const int* block_table;      // [num_reqs, max_blocks]
  const int* seq_lens;         // [num_reqs]
  const int* query_start_loc;  // [num_reqs + 1]
  const void* key_offset;      // [num_segments, num_kv_heads, head_dim] offset_dtype; or null
  const void* sinks;           // [num_heads] sinks_dtype; or null
  void* out;                   // [num_tokens, num_heads, head_dim] dtype
  float* lse;                  // [num_heads, num_tokens]; or null
  float* workspace;            // DecodeLaunch::workspace_bytes
  int64_t query_stride_token, query_stride_head;  // in elements
  int64_t out_stride_token, out_stride_head;      // in elements
  int64_t lse_stride_head;                        // in elements
  int64_t cache_stride_block, cache_stride_head;  // in bytes
  int64_t offset_stride_segment, offset_stride_head;  // in elements
  int64_t block_table_stride;                     // in elements
  int num_reqs, num_kv_heads, group_size, tiles_per_block, num_segments, sliding_window;
  uint32_t block_magic;        // tile / tiles_per_block = tile * block_magic >> 32; 0 where tiles_per_block is 1
  float softmax_scale, logits_soft_cap;
  DType dtype, offset_dtype, sinks_dtype;
  int vector_rows, vector_offsets;  // 1: rows of query and out, of key_offset, start at multiples of 16 bytes
  // num_slots > 0: every request has one query token, whose key and value are written first (newest_token.cuh). Its positions
  // come from seq_lens.
  StoreParams store;
};

// An instantiation and its grid.
struct DecodeLaunch {
  int key_bits, value_bits, head_dim;
  int key_sketch;       // 1: keys have one
  int rows;             // query rows a unit of work has: 4, 8, 16, 24 or 32; of head size 256, 4 or 16; with a key sketch not above 8
  int max_query_len;    // of a request
  int num_ctas;         // one a multiprocessor
  int shared_bytes;     // what a CTA may have
  int workspace_bytes;  // out: needed for partial results
};

}  // namespace tq
