# Sets TENSORRT_INCLUDE_DIR to a folder with NvInferRuntime.h of TensorRT 10.3 or newer (or TensorRT-RTX 1.x), or stops
# with what is missing. With SSD_FETCH_TENSORRT_HEADERS the headers of 10.3.0 are downloaded where none are installed: a
# library that was built against the oldest version loads in every newer one.
set(SSD_TENSORRT_HEADERS_URL "https://raw.githubusercontent.com/NVIDIA/TensorRT/v10.3.0/include"
    CACHE STRING "where SSD_FETCH_TENSORRT_HEADERS downloads from")
set(headers_sha256
  NvInferImpl.h          a087b95461cefbb7cd5f0c068a205fe845fe1f47ced4710d3b3e8a8fbcac1ef8
  NvInferLegacyDims.h    e750b4ff4bb726a2ecddef9ced01ec4ee23eedddb77c433d98b558b471db6ebe
  NvInferRuntime.h       397a64510a7a3fdf2b77bf63f9a3d137d028c6181c76b8932d39a9ba938b5e07
  NvInferRuntimeBase.h   d7a6dc0c2e9e755f91db8fe6811ee9f871375bd745aca7ffc5d540d14cc369db
  NvInferRuntimeCommon.h 75447ea65eb575ed92e98096b11b3e39d6e2a15fec65f85da9fd6f163c250370
  NvInferRuntimePlugin.h 6776cd7e27fc4437f64f116352541fc396999a7363b0eaf6fb5d80513653d149
  NvInferVersion.h       54f35bf74a8837581fbcab8cfe0e35c7730be76a8cb2095b0a6f180457221c1d)

# JetPack and Debian packages put the headers into /usr/include/<arch>-linux-gnu.
find_path(TENSORRT_INCLUDE_DIR NvInferRuntime.h
  HINTS ${TENSORRT_ROOT} PATH_SUFFIXES include
  PATHS /usr/include/${CMAKE_SYSTEM_PROCESSOR}-linux-gnu /usr/local/tensorrt /usr/local/TensorRT /opt/tensorrt
        /usr/src/tensorrt)

if(NOT TENSORRT_INCLUDE_DIR AND SSD_FETCH_TENSORRT_HEADERS)
  set(folder ${CMAKE_CURRENT_BINARY_DIR}/tensorrt_headers)
  while(headers_sha256)
    list(GET headers_sha256 0 name)
    list(GET headers_sha256 1 sha256)
    list(REMOVE_AT headers_sha256 0 1)
    file(DOWNLOAD ${SSD_TENSORRT_HEADERS_URL}/${name} ${folder}/${name} TIMEOUT 60 STATUS status)
    list(GET status 0 code)
    list(GET status 1 reason)
    if(code)
      message(FATAL_ERROR "cannot download ${SSD_TENSORRT_HEADERS_URL}/${name} (${reason}); copy TensorRT's include/ "
                          "here and configure with -DTENSORRT_ROOT=DIR")
    endif()
    file(SHA256 ${folder}/${name} given)
    if(NOT given STREQUAL sha256)
      message(FATAL_ERROR "${SSD_TENSORRT_HEADERS_URL}/${name} is not the file of TensorRT 10.3.0; configure with "
                          "-DTENSORRT_ROOT=DIR instead")
    endif()
  endwhile()
  set(TENSORRT_INCLUDE_DIR ${folder} CACHE PATH "folder of NvInferRuntime.h" FORCE)
endif()

if(NOT TENSORRT_INCLUDE_DIR)
  message(FATAL_ERROR "NvInferRuntime.h is missing: it comes with JetPack and the TensorRT SDK. Configure with "
                      "-DTENSORRT_ROOT=DIR (the SDK's folder), or with -DSSD_FETCH_TENSORRT_HEADERS=ON to download "
                      "NVIDIA's public headers")
endif()

# NV_TENSORRT_MAJOR is a number or, in newer headers, the name of another macro that is one.
file(READ ${TENSORRT_INCLUDE_DIR}/NvInferVersion.h version_header)
foreach(part MAJOR MINOR)
  set(version_${part} "")
  if(version_header MATCHES "define (NV_TENSORRT|TRT)_${part}(_ENTERPRISE|_RTX)? +([0-9]+)")
    set(version_${part} ${CMAKE_MATCH_3})
  endif()
endforeach()
set(tensorrt_version ${version_MAJOR}.${version_MINOR})
if(version_header MATCHES "TRT_MAJOR_RTX" AND NOT version_header MATCHES "TRT_MAJOR_ENTERPRISE")
  message(STATUS "TensorRT-RTX ${tensorrt_version} headers: ${TENSORRT_INCLUDE_DIR}")
elseif(tensorrt_version VERSION_LESS 10.3)
  message(FATAL_ERROR "${TENSORRT_INCLUDE_DIR} is TensorRT ${tensorrt_version}; plugins that write their inputs in place "
                      "need 10.3 (JetPack 6.2) or newer. Configure with -DTENSORRT_ROOT=DIR of a newer one")
else()
  message(STATUS "TensorRT ${tensorrt_version} headers: ${TENSORRT_INCLUDE_DIR}")
endif()
