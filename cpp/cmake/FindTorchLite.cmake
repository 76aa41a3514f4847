# Target usaf_torch: headers and libraries of the installed torch, without Caffe2Config (which wants a CUDA or ROCm
# toolkit for a GPU build of torch, even on a machine that only compiles).
execute_process(COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/torch_info.py"
  OUTPUT_VARIABLE torch_info OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE torch_result ERROR_VARIABLE torch_error)
if(NOT torch_result EQUAL 0)
  message(FATAL_ERROR "usaf_ext: PyTorch not found for ${Python_EXECUTABLE}.\n${torch_error}\n"
    "Install it first, e.g.: pip install torch==2.13.0")
endif()
list(GET torch_info 0 USAF_TORCH_ROOT)
list(GET torch_info 1 USAF_TORCH_VERSION)
list(GET torch_info 2 USAF_TORCH_GPU)
message(STATUS "torch ${USAF_TORCH_VERSION} (${USAF_TORCH_GPU}) at ${USAF_TORCH_ROOT}")
add_library(usaf_torch INTERFACE)
target_include_directories(usaf_torch SYSTEM INTERFACE "${USAF_TORCH_ROOT}/include")
target_link_libraries(usaf_torch INTERFACE
  "${USAF_TORCH_ROOT}/lib/libc10.so" "${USAF_TORCH_ROOT}/lib/libtorch_cpu.so" "${USAF_TORCH_ROOT}/lib/libtorch.so")
