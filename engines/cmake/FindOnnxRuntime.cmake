# Sets ONNXRUNTIME_INCLUDE_DIR and ONNXRUNTIME_LIBRARY, or stops with what is missing. Looks in ONNXRUNTIME_ROOT (an
# unpacked archive of ONNX Runtime), then where systems put it. The two may come from different places: the C API is
# versioned, and headers of one version serve every newer library, such as that of Python's onnxruntime package
# (-DONNXRUNTIME_LIBRARY=.../onnxruntime/capi/libonnxruntime.so.1.x.y).
option(SSD_FETCH_ONNXRUNTIME "download ONNX Runtime's official archive if none is installed" OFF)
set(ONNXRUNTIME_ROOT "$ENV{ONNXRUNTIME_ROOT}" CACHE PATH "an unpacked archive of ONNX Runtime")
set(SSD_ONNXRUNTIME_VERSION "1.22.0" CACHE STRING "what SSD_FETCH_ONNXRUNTIME downloads")
string(REPLACE "x86_64" "x64" archive_processor "${CMAKE_SYSTEM_PROCESSOR}")
set(archive onnxruntime-linux-${archive_processor}-${SSD_ONNXRUNTIME_VERSION})
set(SSD_ONNXRUNTIME_URL
    "https://github.com/microsoft/onnxruntime/releases/download/v${SSD_ONNXRUNTIME_VERSION}/${archive}.tgz"
    CACHE STRING "where SSD_FETCH_ONNXRUNTIME downloads from")

macro(ssd_find_onnxruntime)
  find_path(ONNXRUNTIME_INCLUDE_DIR onnxruntime_cxx_api.h
    HINTS ${ONNXRUNTIME_ROOT} PATH_SUFFIXES include include/onnxruntime include/onnxruntime/core/session onnxruntime)
  find_library(ONNXRUNTIME_LIBRARY onnxruntime HINTS ${ONNXRUNTIME_ROOT} PATH_SUFFIXES lib lib64)
endmacro()
ssd_find_onnxruntime()

if(SSD_FETCH_ONNXRUNTIME AND NOT (ONNXRUNTIME_INCLUDE_DIR AND ONNXRUNTIME_LIBRARY))
  set(folder ${CMAKE_CURRENT_BINARY_DIR}/onnxruntime)
  file(DOWNLOAD ${SSD_ONNXRUNTIME_URL} ${folder}/archive.tgz TIMEOUT 600 TLS_VERIFY ON STATUS status)
  list(GET status 0 code)
  list(GET status 1 reason)
  if(code)
    message(FATAL_ERROR "cannot download ${SSD_ONNXRUNTIME_URL} (${reason}); unpack ONNX Runtime yourself and configure "
                        "with -DONNXRUNTIME_ROOT=DIR")
  endif()
  execute_process(COMMAND ${CMAKE_COMMAND} -E tar xzf archive.tgz WORKING_DIRECTORY ${folder} RESULT_VARIABLE code)
  if(code)
    message(FATAL_ERROR "${SSD_ONNXRUNTIME_URL} is not an archive of ONNX Runtime; configure with "
                        "-DONNXRUNTIME_ROOT=DIR instead")
  endif()
  file(GLOB ONNXRUNTIME_ROOT ${folder}/onnxruntime-*)
  ssd_find_onnxruntime()
endif()

if(NOT ONNXRUNTIME_INCLUDE_DIR)
  message(FATAL_ERROR "onnxruntime_cxx_api.h is missing: install libonnxruntime-dev, configure with "
                      "-DONNXRUNTIME_ROOT=DIR (an unpacked archive of ONNX Runtime), or with "
                      "-DSSD_FETCH_ONNXRUNTIME=ON to download it")
endif()
if(NOT ONNXRUNTIME_LIBRARY)
  message(FATAL_ERROR "libonnxruntime.so is missing: configure with -DONNXRUNTIME_LIBRARY=FILE (Python's onnxruntime "
                      "package has one in onnxruntime/capi), -DONNXRUNTIME_ROOT=DIR or -DSSD_FETCH_ONNXRUNTIME=ON")
endif()

# Python's package has libonnxruntime.so.1.x.y alone, and programs look for libonnxruntime.so.1.
get_filename_component(onnxruntime_file ${ONNXRUNTIME_LIBRARY} REALPATH)
get_filename_component(onnxruntime_folder ${onnxruntime_file} DIRECTORY)
if(NOT EXISTS ${onnxruntime_folder}/libonnxruntime.so.1)
  set(onnxruntime_folder ${CMAKE_BINARY_DIR}/onnxruntime/lib)
  file(MAKE_DIRECTORY ${onnxruntime_folder})
  file(CREATE_LINK ${onnxruntime_file} ${onnxruntime_folder}/libonnxruntime.so.1 SYMBOLIC)
  set(ONNXRUNTIME_LIBRARY ${onnxruntime_folder}/libonnxruntime.so.1)
endif()
message(STATUS "ONNX Runtime: ${ONNXRUNTIME_INCLUDE_DIR}, ${onnxruntime_file}")
