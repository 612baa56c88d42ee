# Adds the CUDA kernels to elang_ops. Architectures: TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX") where it is set, else these, of
# which those that nvcc does not know are left out; the newest also as PTX, for what comes after it.
set(ELANG_CUDA_DEFAULT_ARCHS 80 90 100 120)

execute_process(COMMAND ${ELANG_NVCC} --list-gpu-arch OUTPUT_VARIABLE known OUTPUT_STRIP_TRAILING_WHITESPACE)
string(REGEX MATCHALL "[0-9]+" known "${known}")
set(archs "")
if(DEFINED ENV{TORCH_CUDA_ARCH_LIST} AND NOT "$ENV{TORCH_CUDA_ARCH_LIST}" STREQUAL "")
  string(REGEX REPLACE "[ ,]+" ";" asked "$ENV{TORCH_CUDA_ARCH_LIST}")
  foreach(entry ${asked})
    if(NOT entry MATCHES "^([0-9]+)\\.([0-9])(a?)(\\+PTX)?$")
      message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST: got '${entry}', wanted entries like 8.0, 9.0 or 12.0+PTX")
    endif()
    set(arch ${CMAKE_MATCH_1}${CMAKE_MATCH_2}${CMAKE_MATCH_3})
    if(CMAKE_MATCH_4)
      list(APPEND archs ${arch})
    else()
      list(APPEND archs ${arch}-real)
    endif()
  endforeach()
else()
  foreach(arch ${ELANG_CUDA_DEFAULT_ARCHS})
    if(arch IN_LIST known)
      list(APPEND archs ${arch}-real)
    endif()
  endforeach()
  string(REGEX REPLACE "-real$" "" archs "${archs}")
endif()

set(CMAKE_CUDA_COMPILER ${ELANG_NVCC})
set(CMAKE_CUDA_FLAGS_RELEASE "-O3")  # without NDEBUG: an order that points outside stops the kernel
set(CMAKE_CUDA_ARCHITECTURES ${archs})
enable_language(CUDA)
find_package(CUDAToolkit 12 REQUIRED)

string(REPLACE ";" " " ELANG_CUDA_ARCHS "${archs}")
set(ELANG_CUDA_VERSION ${CUDAToolkit_VERSION})
message(STATUS "CUDA kernels: built with CUDA ${ELANG_CUDA_VERSION} for ${ELANG_CUDA_ARCHS}")

target_sources(elang_ops PRIVATE csrc/cuda/launch.cu csrc/cuda/ops.cpp csrc/cuda/device.cpp csrc/cuda/mailbox.cpp
               csrc/cuda/graph.cpp)
set_target_properties(elang_ops PROPERTIES
  CUDA_ARCHITECTURES "${archs}" CUDA_RUNTIME_LIBRARY Static CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_EXTENSIONS OFF
  CUDA_VISIBILITY_PRESET hidden)
# nvcc's host compiler warns of its own generated code; ptxas warns of what would be slow: spills and local memory.
target_compile_options(elang_ops PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:-Xptxas=-warn-spills,-warn-lmem-usage>")
if(ELANG_WERROR)
  target_compile_options(elang_ops PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings;-Xptxas=-Werror>")
endif()
target_link_libraries(elang_ops PRIVATE CUDA::cudart_static ${CMAKE_DL_LIBS})
# The static CUDA runtime is ours alone: torch has one of its own.
target_link_options(elang_ops PRIVATE -Wl,--exclude-libs,ALL)
