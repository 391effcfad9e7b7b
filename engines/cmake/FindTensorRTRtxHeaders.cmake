# Sets TENSORRT_RTX_INCLUDE_DIR to a folder with NvInferRuntime.h of TensorRT-RTX, or stops with what is missing. NVIDIA
# publishes these headers in the SDK alone, not in a repository.
set(TENSORRT_RTX_ROOT "$ENV{TENSORRT_RTX_ROOT}" CACHE PATH "the SDK of TensorRT-RTX")
find_path(TENSORRT_RTX_INCLUDE_DIR NvInferRuntime.h
  HINTS ${TENSORRT_RTX_ROOT} PATH_SUFFIXES include
  PATHS /usr/local/tensorrt-rtx /usr/local/TensorRT-RTX /opt/tensorrt-rtx NO_CMAKE_SYSTEM_PATH
        NO_SYSTEM_ENVIRONMENT_PATH)
if(NOT TENSORRT_RTX_INCLUDE_DIR)
  message(FATAL_ERROR "the headers of TensorRT-RTX are missing: download its SDK from developer.nvidia.com/tensorrt-rtx "
                      "and configure with -DTENSORRT_RTX_ROOT=DIR")
endif()
file(READ ${TENSORRT_RTX_INCLUDE_DIR}/NvInferVersion.h rtx_version_header)
if(NOT rtx_version_header MATCHES "define TRT_MAJOR_RTX +([0-9]+)")
  message(FATAL_ERROR "${TENSORRT_RTX_INCLUDE_DIR} has the headers of another TensorRT than TensorRT-RTX; configure with "
                      "-DTENSORRT_RTX_ROOT=DIR (its SDK)")
endif()
set(rtx_major ${CMAKE_MATCH_1})
string(REGEX MATCH "define TRT_MINOR_RTX +([0-9]+)" _ "${rtx_version_header}")
message(STATUS "TensorRT-RTX ${rtx_major}.${CMAKE_MATCH_1} headers: ${TENSORRT_RTX_INCLUDE_DIR}")
