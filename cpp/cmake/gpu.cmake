# GPU kernels. A build links exactly one of cuda/ and hip/, as a static library, so that none of their compilers' flags
# mix with the extension's; both define usaf::gpu (cpp/kernel_api.h). Contraction is off, as everywhere.
#
# USAF_CUDA, USAF_HIP   AUTO: with a torch of that kind, and (CUDA) nvcc. ON: also with another torch.
# CMAKE_CUDA_ARCHITECTURES, USAF_HIP_ARCHITECTURES   the chips to compile for, if not all that the compiler knows.
# Target usaf_hip_objects compiles hip/ alone, wherever there is a HIP compiler; nothing links the result.
include(CheckLanguage)

set(USAF_HIP_ARCHITECTURES "" CACHE STRING "AMD chips, e.g. gfx1030;gfx1100; empty: all that the compiler knows")

set(usaf_cuda OFF)
if(USAF_CUDA STREQUAL "ON" OR (USAF_CUDA STREQUAL "AUTO" AND USAF_TORCH_GPU STREQUAL "cuda"))
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(usaf_cuda ON)
  elseif(USAF_CUDA STREQUAL "ON")
    message(FATAL_ERROR "USAF_CUDA=ON, but no CUDA compiler (nvcc) was found: set CUDACXX or CMAKE_CUDA_COMPILER")
  else()
    message(WARNING "A CUDA torch, but no CUDA compiler (nvcc): the ops will run on the CPU only")
  endif()
endif()

find_program(USAF_HIPCC hipcc HINTS ENV ROCM_PATH PATHS /opt/rocm PATH_SUFFIXES bin)
set(usaf_hip OFF)
if(USAF_HIP STREQUAL "ON" OR (USAF_HIP STREQUAL "AUTO" AND USAF_TORCH_GPU STREQUAL "hip"))
  find_library(USAF_AMDHIP64 amdhip64 HINTS "${USAF_TORCH_ROOT}/lib" ENV ROCM_PATH PATHS /opt/rocm PATH_SUFFIXES lib)
  if(USAF_HIPCC AND USAF_AMDHIP64)
    set(usaf_hip ON)
  elseif(USAF_HIP STREQUAL "ON")
    message(FATAL_ERROR "USAF_HIP=ON, but hipcc or libamdhip64 was not found: set ROCM_PATH")
  else()
    message(WARNING "A ROCm torch, but no hipcc or libamdhip64: the ops will run on the CPU only")
  endif()
endif()
if(usaf_cuda AND usaf_hip)
  message(FATAL_ERROR "USAF_CUDA and USAF_HIP are both on: a build links exactly one of them")
endif()

if(usaf_cuda)
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    # 90 and 120 as PTX too, for chips between and after.
    set(CMAKE_CUDA_ARCHITECTURES 75-real 80-real 86-real 89-real 90 120)
  endif()
  if(NOT DEFINED CMAKE_CUDA_RUNTIME_LIBRARY)
    set(CMAKE_CUDA_RUNTIME_LIBRARY Static)  # imports on a machine without a driver
  endif()
  enable_language(CUDA)
  file(GLOB usaf_cuda_sources CONFIGURE_DEPENDS cuda/*.cu)
  add_library(usaf_gpu STATIC ${usaf_cuda_sources})
  set_target_properties(usaf_gpu PROPERTIES CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON CUDA_VISIBILITY_PRESET hidden)
  target_include_directories(usaf_gpu PRIVATE cpp cuda)
  target_compile_options(usaf_gpu PRIVATE -fmad=false -Xfatbin=-compress-all --threads=2 -Xcompiler=-Wall,-Wextra)
  target_link_libraries(_C PRIVATE usaf_gpu)
  target_compile_definitions(_C PRIVATE USAF_WITH_GPU=1 USAF_GPU_NAME="cuda")
  message(STATUS "GPU kernels: CUDA ${CMAKE_CUDA_COMPILER_VERSION} for ${CMAKE_CUDA_ARCHITECTURES}")
endif()

# HIP through a custom command: Debian's package has no hip-lang CMake files, so enable_language(HIP) cannot work there.
if(USAF_HIPCC)
  include(cpp/cmake/hip_compiler.cmake)
  file(GLOB usaf_hip_sources CONFIGURE_DEPENDS hip/*.hip)
  set(hip_flags -std=c++20 -O3 -ffp-contract=off -fPIC -fvisibility=hidden -Wall -Wextra
    "-I${PROJECT_SOURCE_DIR}/cpp" "-I${PROJECT_SOURCE_DIR}/hip")
  foreach(arch IN LISTS usaf_hip_chips)
    list(APPEND hip_flags "--offload-arch=${arch}")
  endforeach()
  set(usaf_hip_outputs "")
  foreach(source IN LISTS usaf_hip_sources)
    get_filename_component(stem "${source}" NAME_WE)
    set(object "${CMAKE_CURRENT_BINARY_DIR}/hip/${stem}.o")
    add_custom_command(OUTPUT "${object}" DEPENDS "${source}" DEPFILE "${object}.d" COMMENT "HIP ${stem}" VERBATIM
      COMMAND "${CMAKE_COMMAND}" -E make_directory "${CMAKE_CURRENT_BINARY_DIR}/hip"
      COMMAND ${usaf_hip_command} ${hip_flags} -MD -MT "${object}" -MF "${object}.d" -c "${source}" -o "${object}")
    list(APPEND usaf_hip_outputs "${object}")
  endforeach()
  set_source_files_properties(${usaf_hip_outputs} PROPERTIES EXTERNAL_OBJECT TRUE GENERATED TRUE)
  add_custom_target(usaf_hip_objects DEPENDS ${usaf_hip_outputs})
endif()

if(usaf_hip)
  add_library(usaf_gpu STATIC ${usaf_hip_outputs})
  set_target_properties(usaf_gpu PROPERTIES LINKER_LANGUAGE CXX)
  target_link_libraries(_C PRIVATE usaf_gpu "${USAF_AMDHIP64}")
  target_compile_definitions(_C PRIVATE USAF_WITH_GPU=1 USAF_GPU_NAME="hip")
  message(STATUS "GPU kernels: HIP for ${usaf_hip_chips}")
endif()
