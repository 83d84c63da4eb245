// The write kernel for trellis codes on a CPU: csrc as it is, but for instructions that only fetch ahead.
#include "instructions.cuh"  // of this folder: before the macros below

#define __constant__
namespace tq {
alignas(128) uint4 table[2048];  // dynamic shared memory of store_kv_kernel
}
inline uint32_t __cvta_generic_to_shared(const void*) { return 0; }
inline float __fmaf_rd(float, float, float) { return 0; }  // of codes that are not trellis codes
#define volatile(...) ("")
#define asm(...)
#include "store_kv.cuh"

template <int D> void run(const tq::StoreParams& params) {
  for (unsigned role = 0; role < 2; role++)
    simt::launch(2, tq::STORE_THREADS / 32, [&] { tq::store_kv_kernel<D, tq::BLOCKS>(params); }, role);
}

extern "C" int simt_store_params_bytes() { return sizeof(tq::StoreParams); }

extern "C" int simt_store_kv(const tq::StoreParams* params) {
  if (params->head_dim == 64) run<64>(*params);
  if (params->head_dim == 128) run<128>(*params);
  if (params->head_dim == 256) run<256>(*params);
  return 0;
}
