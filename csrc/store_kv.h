// Arguments of the fused write of keys and values; tq_vllm/ops/cuda_ops.py fills the same struct.
#pragma once

#include <cstdint>

namespace tq {

constexpr int MAX_CANDIDATES = 16;
constexpr int MAX_TABLE_ROWS = 448;

enum DType : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
enum ScaleRule : int32_t { SCALE_NORM = 0, SCALE_UNBIASED = 1, SCALE_RAW = 2 };

// One of the two inputs, and where its parts stand in a tile record of the page (bytes).
struct StoreRole {
  const void* x;          // [num_tokens, num_kv_heads, head_dim], last dimension contiguous
  int64_t token_stride;   // elements
  int64_t head_stride;    // elements
  int32_t dtype;          // DType
  int32_t bits;           // 2, 3, 4, 5 or 8; TRELLIS + 2 or 3
  int32_t scale_rule;     // ScaleRule
  int32_t vector_loads;   // 1: x and its strides are multiples of 16 bytes
  int32_t plane[3];       // offset of a code plane; 2: of a key sketch
  int32_t token_bytes[3]; // keys: bytes between tokens of a plane; values: 4 (times value_token_order)
  int32_t word_bytes;     // between the words of a token
  int32_t scale;          // offset of the scales
  int32_t num_candidates; // of the scale search
  int32_t table_rows;     // cells of the level table: above the largest magnitude / (candidate * unit)
  int32_t sketch_scale;   // offset of the scales of a key sketch
  float sketch_gain;      // times the residual's norm is that scale; 0: no sketch
  float magnitude_cap;    // a magnitude from here on has the last level for every candidate
  float cells_per_unit[MAX_CANDIDATES];  // 1 / (candidate * unit)
};

struct StoreParams {
  StoreRole role[2];            // keys, values
  uint8_t* kv_cache;            // [num_blocks, num_kv_heads, block_size, slot_bytes]
  int64_t block_stride;         // bytes
  int64_t head_stride;          // bytes
  const int64_t* slot_mapping;  // [num_slots]
  const void* positions;        // [num_slots or more] int32 or int64; null without key_offset
  const void* key_offset;       // [num_segments, num_kv_heads, head_dim] or null, last dimension contiguous
  int64_t offset_segment_stride, offset_head_stride;  // elements
  int32_t offset_dtype;         // DType
  int32_t vector_offsets;       // as vector_loads
  int32_t positions_are_int64;
  int32_t num_segments;
  int32_t num_slots;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t block_size;
  int32_t tile_bytes;
};

}  // namespace tq
