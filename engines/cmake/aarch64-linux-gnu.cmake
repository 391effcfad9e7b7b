# Cross-compiles for 64-bit Arm with Debian's g++-aarch64-linux-gnu:
#
#   engines/scripts/fetch_aarch64_sysroot.sh build/aarch64-root
#   cmake -S engines -B build/aarch64 -DCMAKE_TOOLCHAIN_FILE=engines/cmake/aarch64-linux-gnu.cmake
#         -DSSD_SYSROOT=$PWD/build/aarch64-root
#
# SSD_SYSROOT holds the libraries; the C and C++ library are the compiler's own, which may be older
# than the sysroot's: what is built runs on both.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_TRY_COMPILE_PLATFORM_VARIABLES SSD_SYSROOT)
set(CMAKE_LIBRARY_ARCHITECTURE aarch64-linux-gnu)
list(APPEND CMAKE_FIND_ROOT_PATH ${SSD_SYSROOT})
set(CMAKE_CXX_STANDARD_INCLUDE_DIRECTORIES ${SSD_SYSROOT}/usr/include/aarch64-linux-gnu) # OpenSSL's configuration
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)
set(ENV{PKG_CONFIG_SYSROOT_DIR} ${SSD_SYSROOT})
set(ENV{PKG_CONFIG_LIBDIR} ${SSD_SYSROOT}/usr/lib/aarch64-linux-gnu/pkgconfig:${SSD_SYSROOT}/usr/share/pkgconfig)
set(ONNXRUNTIME_ROOT ${SSD_SYSROOT}/usr CACHE PATH "where ONNX Runtime is")
set(ONNXRUNTIME_LIBRARY ${SSD_SYSROOT}/usr/lib/aarch64-linux-gnu/libonnxruntime.so CACHE FILEPATH "")
# Libraries of the sysroot may want a newer C library than the compiler's: they find it when they run.
set(CMAKE_EXE_LINKER_FLAGS_INIT "-Wl,--allow-shlib-undefined")
set(CMAKE_SHARED_LINKER_FLAGS_INIT "-Wl,--allow-shlib-undefined")
