# Adds what SSD_RUNTIME_BACKENDS names to the library. A library may have all of them: TensorRT's libraries are opened
# when a model is, so one that has the backend tensorrt also loads where there is no TensorRT.
foreach(backend IN LISTS SSD_RUNTIME_BACKENDS)
  if(NOT backend MATCHES "^(onnxruntime|tensorrt|tensorrt-rtx)$")
    message(FATAL_ERROR "unknown backend ${backend}: -DSSD_RUNTIME_BACKENDS takes any of "
                        "\"onnxruntime;tensorrt;tensorrt-rtx\"")
  endif()
endforeach()
if(NOT SSD_RUNTIME_BACKENDS)
  message(FATAL_ERROR "no backend: -DSSD_RUNTIME_BACKENDS takes any of \"onnxruntime;tensorrt;tensorrt-rtx\"")
endif()

if("onnxruntime" IN_LIST SSD_RUNTIME_BACKENDS)
  include(FindOnnxRuntime) # ONNXRUNTIME_INCLUDE_DIR, ONNXRUNTIME_LIBRARY
  # A program finds the system's library by itself, another one only beside libssd_runtime.so.
  if(CMAKE_CROSSCOMPILING OR onnxruntime_file MATCHES "^(/usr)?/lib")
    set(is_elsewhere OFF)
  else()
    set(is_elsewhere ON)
  endif()
  option(SSD_RUNTIME_BUNDLE_ONNXRUNTIME "install ONNX Runtime's library beside libssd_runtime.so" ${is_elsewhere})
  target_sources(ssd_runtime PRIVATE src/ort/ort_devices.cpp src/ort/ort_runner.cpp src/ort/ort_session.cpp)
  add_subdirectory(operators)
  target_sources(ssd_runtime PRIVATE ${ssd_operator_objects})
  target_compile_definitions(ssd_runtime PRIVATE SSD_HAS_ONNXRUNTIME)
  target_include_directories(ssd_runtime PRIVATE operators)
  target_include_directories(ssd_runtime SYSTEM PRIVATE ${ONNXRUNTIME_INCLUDE_DIR})
  target_link_libraries(ssd_runtime PRIVATE ${ONNXRUNTIME_LIBRARY})
endif()

# nvinfer.cpp against the headers of one flavor. The other files of src/trt see none of them.
function(ssd_add_nvinfer flavor include_dir)
  add_library(ssd_nvinfer_${flavor} OBJECT src/trt/nvinfer.cpp)
  set_target_properties(ssd_nvinfer_${flavor} PROPERTIES CXX_EXTENSIONS OFF CXX_VISIBILITY_PRESET hidden
                        VISIBILITY_INLINES_HIDDEN ON POSITION_INDEPENDENT_CODE ON)
  target_compile_features(ssd_nvinfer_${flavor} PRIVATE cxx_std_17)
  target_compile_options(ssd_nvinfer_${flavor} PRIVATE
    $<TARGET_PROPERTY:ssd_runtime,COMPILE_OPTIONS> $<TARGET_PROPERTY:ssd_runtime,INTERFACE_COMPILE_OPTIONS>)
  target_include_directories(ssd_nvinfer_${flavor} PRIVATE include src)
  target_include_directories(ssd_nvinfer_${flavor} SYSTEM PRIVATE ${include_dir} ${CUDA_INCLUDE_DIR})
  target_sources(ssd_runtime PRIVATE $<TARGET_OBJECTS:ssd_nvinfer_${flavor}>)
endfunction()

if("tensorrt" IN_LIST SSD_RUNTIME_BACKENDS OR "tensorrt-rtx" IN_LIST SSD_RUNTIME_BACKENDS)
  include(${CMAKE_CURRENT_SOURCE_DIR}/../plugins/cmake/FindCudaHeaders.cmake) # CUDA_INCLUDE_DIR
  set(noise_kernel ${CMAKE_CURRENT_SOURCE_DIR}/../ssd_export/kernels/gumbel_noise.ptx)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${noise_kernel})
  file(READ ${noise_kernel} SSD_NOISE_KERNEL_PTX)
  configure_file(src/trt/noise_kernel.cpp.in noise_kernel.cpp @ONLY)
  target_sources(ssd_runtime PRIVATE
    ${CMAKE_CURRENT_BINARY_DIR}/noise_kernel.cpp
    src/trt/buffer_plan.cpp
    src/trt/captured_work.cpp
    src/trt/cuda_device.cpp
    src/trt/device_noise.cpp
    src/trt/engine_files.cpp
    src/trt/engine_manifest.cpp
    src/trt/loaded_engines.cpp
    src/trt/prompt_rows.cpp
    src/trt/trt_runner.cpp
    src/trt/window_pass.cpp
    src/trt/workspace.cpp)
  target_include_directories(ssd_runtime SYSTEM PRIVATE ${CUDA_INCLUDE_DIR})
endif()
if("tensorrt" IN_LIST SSD_RUNTIME_BACKENDS)
  option(SSD_FETCH_TENSORRT_HEADERS "download TensorRT's public headers if none are installed" OFF)
  set(TENSORRT_ROOT "$ENV{TENSORRT_ROOT}" CACHE PATH "a TensorRT SDK, or a folder with its include/")
  include(${CMAKE_CURRENT_SOURCE_DIR}/../plugins/cmake/FindTensorRTHeaders.cmake) # TENSORRT_INCLUDE_DIR
  target_compile_definitions(ssd_runtime PRIVATE SSD_HAS_TENSORRT)
  ssd_add_nvinfer(tensorrt ${TENSORRT_INCLUDE_DIR})
endif()
if("tensorrt-rtx" IN_LIST SSD_RUNTIME_BACKENDS)
  include(FindTensorRTRtxHeaders) # TENSORRT_RTX_INCLUDE_DIR
  target_compile_definitions(ssd_runtime PRIVATE SSD_HAS_TENSORRT_RTX)
  ssd_add_nvinfer(rtx ${TENSORRT_RTX_INCLUDE_DIR})
  target_compile_definitions(ssd_nvinfer_rtx PRIVATE SSD_TENSORRT_RTX)
endif()
