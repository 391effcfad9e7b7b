# cmake --install, find_package(ssd_runtime), pkg-config, and packages by CPack.
include(CMakePackageConfigHelpers)
set(config_folder ${CMAKE_INSTALL_LIBDIR}/cmake/ssd_runtime)

install(TARGETS ssd_runtime EXPORT ssd_runtime_targets
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY include/ssd_runtime DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT ssd_runtime_targets NAMESPACE ssd_runtime:: DESTINATION ${config_folder})
configure_package_config_file(cmake/ssd_runtimeConfig.cmake.in ssd_runtimeConfig.cmake
  INSTALL_DESTINATION ${config_folder} NO_SET_AND_CHECK_MACRO)
write_basic_package_version_file(ssd_runtimeConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/ssd_runtimeConfig.cmake
              ${CMAKE_CURRENT_BINARY_DIR}/ssd_runtimeConfigVersion.cmake DESTINATION ${config_folder})
# From the folder of the .pc file, so that an installed tree may be moved.
if(IS_ABSOLUTE ${CMAKE_INSTALL_LIBDIR})
  set(prefix_from_pc ${CMAKE_INSTALL_PREFIX})
  set(libdir_of_pc ${CMAKE_INSTALL_LIBDIR})
else()
  file(RELATIVE_PATH up /prefix/${CMAKE_INSTALL_LIBDIR}/pkgconfig /prefix)
  string(REGEX REPLACE "/$" "" up ${up})
  set(prefix_from_pc "\${pcfiledir}/${up}")
  set(libdir_of_pc "\${prefix}/${CMAKE_INSTALL_LIBDIR}")
endif()
configure_file(cmake/ssd_runtime.pc.in ssd_runtime.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/ssd_runtime.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
if(SSD_RUNTIME_BUNDLE_ONNXRUNTIME)
  if(NOT "onnxruntime" IN_LIST SSD_RUNTIME_BACKENDS)
    message(FATAL_ERROR "SSD_RUNTIME_BUNDLE_ONNXRUNTIME brings the library of a backend that is not built: add "
                        "onnxruntime to SSD_RUNTIME_BACKENDS")
  endif()
  # Where only libssd_runtime.so looks, so that another program's ONNX Runtime is not replaced.
  install(FILES ${onnxruntime_file} RENAME libonnxruntime.so.1
    DESTINATION ${CMAKE_INSTALL_LIBDIR}/ssd_runtime)
endif()

set(CPACK_GENERATOR "DEB;TGZ")
set(CPACK_PACKAGE_NAME libssd-runtime-dev)
set(CPACK_PACKAGE_VENDOR "ssd-export")
set(CPACK_PACKAGE_CONTACT "ssd-export")
set(CPACK_PACKAGE_DESCRIPTION_SUMMARY "generates images from bundles of ssd-export")
set(CPACK_PACKAGING_INSTALL_PREFIX /usr)
set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
set(CPACK_DEBIAN_PACKAGE_SECTION libdevel)
set(CPACK_DEBIAN_PACKAGE_SHLIBDEPS OFF)
set(CPACK_DEBIAN_PACKAGE_DEPENDS "libc6, libstdc++6, libssl3, libpng16-16, libonig5")
include(CPack)
