# Which command compiles hip/, and for which chips.
#
# in   USAF_HIPCC, USAF_HIP_ARCHITECTURES (empty: every chip of usaf_hip_all_chips that the compiler knows)
# out  usaf_hip_command: a compiler and its first arguments; usaf_hip_chips
#
# With any chip of RDNA2 comes gfx1030. PyTorch's ROCm packages and rocBLAS have code for no other: a gfx1031 (RX 6750 XT)
# runs with HSA_OVERRIDE_GFX_VERSION=10.3.0, and then the runtime asks our library for gfx1030, too.
# ROCm's hipcc knows them all. Debian's knows gfx1030 and gfx1031; Debian's clang++-19 knows the others too, given device
# libraries that name them (hip_device_libs.py).
set(usaf_hip_all_chips gfx1030 gfx1031 gfx1100 gfx1101 gfx1102 gfx1151 gfx1200 gfx1201)

# Sets `result` to whether `ARGN` compiles an empty source for all `chips`, which names device libraries of each.
function(usaf_hip_knows result chips)
  set(source "${CMAKE_CURRENT_BINARY_DIR}/hip/empty.hip")
  file(WRITE "${source}" "")
  list(TRANSFORM chips PREPEND "--offload-arch=")
  execute_process(COMMAND ${ARGN} ${chips} -nogpuinc -c "${source}" -o "${source}.o"
    RESULT_VARIABLE failed OUTPUT_QUIET ERROR_QUIET)
  if(failed)
    set(${result} OFF PARENT_SCOPE)
  else()
    set(${result} ON PARENT_SCOPE)
  endif()
endfunction()

set(usaf_hip_chips ${USAF_HIP_ARCHITECTURES})
if(NOT usaf_hip_chips)
  set(usaf_hip_chips ${usaf_hip_all_chips})
endif()
if(usaf_hip_chips MATCHES "gfx103[1-6]" AND NOT usaf_hip_chips MATCHES "gfx1030")
  list(PREPEND usaf_hip_chips gfx1030)
  message(STATUS "HIP: gfx1030 too, which chips of RDNA2 are taken for under HSA_OVERRIDE_GFX_VERSION=10.3.0")
endif()
set(usaf_hip_command "${CMAKE_COMMAND}" -E env HIP_PLATFORM=amd "${USAF_HIPCC}")
usaf_hip_knows(usaf_hip_known "${usaf_hip_chips}" ${usaf_hip_command})
set(usaf_hip_compiler "${USAF_HIPCC}")

find_program(USAF_HIP_CLANG NAMES clang++-21 clang++-20 clang++-19)
if(NOT usaf_hip_known AND USAF_HIP_CLANG)
  set(device_libs "${CMAKE_CURRENT_BINARY_DIR}/hip/device_libs")
  execute_process(RESULT_VARIABLE failed COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/hip_device_libs.py"
    "${USAF_HIP_CLANG}" "${device_libs}" ${usaf_hip_chips})
  if(NOT failed)
    # Code object version 4: the older of the two that Debian's HIP runtimes load.
    set(clang_command "${CMAKE_COMMAND}" -E env HIP_PLATFORM=amd "${USAF_HIP_CLANG}" -x hip
      "--rocm-device-lib-path=${device_libs}" -mcode-object-version=4)
    usaf_hip_knows(usaf_hip_known "${usaf_hip_chips}" ${clang_command})
    if(usaf_hip_known)
      set(usaf_hip_command ${clang_command})
      set(usaf_hip_compiler "${USAF_HIP_CLANG}")
    endif()
  endif()
endif()
if(NOT usaf_hip_known)
  if(USAF_HIP_ARCHITECTURES)
    message(FATAL_ERROR "USAF_HIP_ARCHITECTURES: expected chips that ${USAF_HIPCC} knows or, with its device libraries, "
      "clang++-19; got ${USAF_HIP_ARCHITECTURES}")
  endif()
  set(usaf_hip_chips gfx1030 gfx1031)
endif()
message(STATUS "HIP: ${usaf_hip_compiler} for ${usaf_hip_chips}")
