// Launch of attention to codes; the kernels of each head size and block of query rows are compiled on their own
// (decode_instance.cu).
#include <cuda_runtime.h>

#include "decode.h"

namespace tq {

// Head size, query rows: what fits the registers. setup.py has the same list.
#define TQ_BLOCKS(X) X(64, 4) X(64, 8) X(64, 16) X(64, 24) X(64, 32) X(128, 4) X(128, 8) X(128, 16) X(128, 24) \
  X(128, 32) X(256, 4) X(256, 16)
#define TQ_DECLARE(D, R) int launch_decode_##D##_##R(const DecodeParams* params, DecodeLaunch& launch, cudaStream_t stream);
TQ_BLOCKS(TQ_DECLARE)

}  // namespace tq

// Enqueues attention on `stream`. With params null only fills launch->workspace_bytes. Returns a cudaError_t, 0 for success;
// cudaErrorInvalidValue: no such instantiation.
extern "C" int tq_attention(const tq::DecodeParams* params, tq::DecodeLaunch* launch, cudaStream_t stream) {
  using namespace tq;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&launch->num_ctas, cudaDevAttrMultiProcessorCount, device)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&launch->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device))
    return error;
#define TQ_CASE(D, R) \
  if (launch->head_dim == D && launch->rows == R) return launch_decode_##D##_##R(params, *launch, stream);
  TQ_BLOCKS(TQ_CASE)
  return cudaErrorInvalidValue;
}

extern "C" int tq_decode_params_bytes() { return sizeof(tq::DecodeParams); }
