// The instructions of the kernels that CUDA C++ has no name for; tests/simt has the same for a CPU.
#pragma once
#include <cstdint>

namespace tq {

constexpr int MAGIC_BITS = 0x4B400000;  // 1.5 * 2^23: MAGIC_BITS + n are the bits of the float MAGIC + n for |n| < 2^22
constexpr float MAGIC = 12582912.0f;

// Four bytes of b:a, picked by the nibbles of selector; a nibble with its top bit set gives eight copies of the sign bit.
__device__ __forceinline__ uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

// A word of shared memory, by its address there.
__device__ __forceinline__ uint32_t load_shared(uint32_t address) {
  uint32_t x;
  asm("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address));
  return x;
}

__device__ __forceinline__ void prefetch_l2(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// d += A B, m16n8k32.
__device__ __forceinline__ void mma_s8(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                       uint32_t b1) {
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

// d += A B, m16n8k16, of bfloat16 or float16.
__device__ __forceinline__ void mma_16bit(float (&d)[4], bool bfloat16, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                          uint32_t b0, uint32_t b1) {
  if (bfloat16)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Two numbers n as float16, from 1024 + 128 + n.
__device__ __forceinline__ uint32_t half_bytes(uint32_t x) {
  uint32_t y;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(x), "r"(0xE480E480u));
  return y;
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

// Loads past the L1, which may hold a line from before another kernel wrote it.
__device__ __forceinline__ float load_fresh(const float* at) {
  float x;
  asm volatile("ld.relaxed.gpu.f32 %0, [%1];" : "=f"(x) : "l"(at) : "memory");
  return x;
}
__device__ __forceinline__ float4 load_fresh_4(const float* at) {
  float4 x;
  asm volatile("ld.relaxed.gpu.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "l"(at) : "memory");
  return x;
}

// Copies tile records into a ring of stages: the bulk copy engine and one mbarrier a stage from sm_90 on, cp.async below.
struct Copier {
#if __CUDA_ARCH__ >= 900
  static __device__ __forceinline__ void init(uint64_t* barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"((uint32_t)__cvta_generic_to_shared(barrier)) : "memory");
  }
  static __device__ __forceinline__ void fence_init() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
  // What this lane has written to global memory may be copied by a lane that it meets at a barrier afterwards.
  static __device__ __forceinline__ void publish() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
  // The cache is read once: its lines are the first to leave the L2 (4 to 9 % faster on an H100).
  static constexpr uint64_t EVICT_FIRST = 0x12F0000000000000;
  static __device__ __forceinline__ void expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
  }
  template <int BYTES> static __device__ __forceinline__ void start(uint8_t* to, const uint8_t* from, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
            (uint32_t)__cvta_generic_to_shared(to)),
        "l"(from), "r"(BYTES), "r"(barrier), "l"(EVICT_FIRST)
        : "memory");
  }
  // Lanes with `valid` copy their record; all lanes call.
  template <int BYTES>
  static __device__ __forceinline__ void copy(uint8_t* to, const uint8_t* from, bool valid, uint64_t* barrier, int lane) {
    const uint32_t bar = (uint32_t)__cvta_generic_to_shared(barrier);
    const int count = __popc(__ballot_sync(~0u, valid));
    if (lane == 0) expect(bar, count * BYTES);
    if (valid) start<BYTES>(to, from, bar);
  }
  // One copy for the warp.
  template <int BYTES>
  static __device__ __forceinline__ void copy_whole(uint8_t* to, const uint8_t* from, uint64_t* barrier, int lane) {
    if (lane != 0) return;
    const uint32_t bar = (uint32_t)__cvta_generic_to_shared(barrier);
    expect(bar, BYTES);
    start<BYTES>(to, from, bar);
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
  template <int BYTES> static __device__ __forceinline__ void start(uint32_t to, uint64_t from, int lane) {
#pragma unroll
    for (int i = lane * 16; i < BYTES; i += 512)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + i), "l"(from + i) : "memory");
  }
  static __device__ __forceinline__ void init(uint64_t*) {}
  static __device__ __forceinline__ void fence_init() {}
  static __device__ __forceinline__ void publish() {}  // the barrier is enough
  template <int BYTES>
  static __device__ __forceinline__ void copy(uint8_t* to, const uint8_t* from, bool valid, uint64_t*, int lane) {
    uint32_t lanes = __ballot_sync(~0u, valid);
    while (lanes) {
      const int source = __ffs(lanes) - 1;
      lanes &= lanes - 1;
      const uint64_t src = __shfl_sync(~0u, reinterpret_cast<uint64_t>(from), source);
      const uint32_t dst = __shfl_sync(~0u, (uint32_t)__cvta_generic_to_shared(to), source);
      start<BYTES>(dst, src, lane);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
  template <int BYTES>
  static __device__ __forceinline__ void copy_whole(uint8_t* to, const uint8_t* from, uint64_t*, int lane) {
    start<BYTES>((uint32_t)__cvta_generic_to_shared(to), reinterpret_cast<uint64_t>(from), lane);
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
  template <int STAGES> static __device__ __forceinline__ void wait(uint64_t*, uint32_t) {
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
    __syncwarp();
  }
  static __device__ __forceinline__ void nothing() { asm volatile("cp.async.commit_group;" ::: "memory"); }
#endif
};

}  // namespace tq
