// Launch of attention to codes; the kernels of each head size are compiled on their own (decode_instance.cu).
#include <cuda_runtime.h>

#include "decode.h"

namespace tq {

#define TQ_HEAD_DIMS(X) X(64) X(128) X(256)
#define TQ_DECLARE(D) int launch_decode_##D(const DecodeParams* params, DecodeLaunch& launch, cudaStream_t stream);
TQ_HEAD_DIMS(TQ_DECLARE)

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
  switch (launch->head_dim) {
#define TQ_CASE(D) case D: return launch_decode_##D(params, *launch, stream);
    TQ_HEAD_DIMS(TQ_CASE)
  }
  return cudaErrorInvalidValue;
}

extern "C" int tq_decode_params_bytes() { return sizeof(tq::DecodeParams); }
