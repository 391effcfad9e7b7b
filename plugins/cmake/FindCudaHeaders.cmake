# Sets CUDA_INCLUDE_DIR to the folder of cuda.h and cuda_runtime_api.h, or stops with what is missing. Only headers are
# needed: the driver is opened when a kernel is first launched.
find_path(CUDA_INCLUDE_DIR NAMES cuda_runtime_api.h
  HINTS ${CUDAToolkit_ROOT} $ENV{CUDA_HOME} $ENV{CUDA_PATH} PATH_SUFFIXES include
        targets/x86_64-linux/include targets/aarch64-linux/include
  PATHS /usr/local/cuda)
if(NOT CUDA_INCLUDE_DIR OR NOT EXISTS ${CUDA_INCLUDE_DIR}/cuda.h)
  message(FATAL_ERROR "cuda.h and cuda_runtime_api.h are missing: install the CUDA toolkit (JetPack has it), or configure "
                      "with -DCUDAToolkit_ROOT=DIR")
endif()
message(STATUS "CUDA headers: ${CUDA_INCLUDE_DIR}")
