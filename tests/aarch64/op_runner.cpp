// Test-only: runs one CPU kernel on arguments from a file, for a processor that is not this one (under qemu-user).
//
//   op_runner CALL_FILE
//
// CALL_FILE: the launcher's name (32 bytes, zero padded); int64 struct size, number of buffers and of pointer fields;
// the argument struct; for each pointer field int64 offset and buffer; for each buffer int64 bytes and its bytes. The
// buffers are written back in place. tests/kernel_calls.py writes and reads it.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <fstream>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernel_api.h"

namespace {

using Launch = std::function<void(const std::vector<char>&)>;

template <class Args>
Launch launcher(void (*run)(const Args&, void*)) {
  return [run](const std::vector<char>& bytes) {
    if (bytes.size() != sizeof(Args)) throw std::runtime_error("the argument struct has another size");
    Args args;
    std::memcpy(&args, bytes.data(), sizeof args);
    run(args, nullptr);
  };
}

const std::map<std::string, Launch> kLaunchers = {
    {"encode_rows", launcher(usaf::cpu::encode_rows)},
    {"decode_rows", launcher(usaf::cpu::decode_rows)},
    {"sort_by_expert", launcher(usaf::cpu::sort_by_expert)},
    {"gather_rows", launcher(usaf::cpu::gather_rows)},
    {"combine_rows", launcher(usaf::cpu::combine_rows)},
    {"combine_rows_backward", launcher(usaf::cpu::combine_rows_backward)},
    {"scatter_add_rows", launcher(usaf::cpu::scatter_add_rows)},
    {"glu", launcher(usaf::cpu::glu)},
    {"glu_backward", launcher(usaf::cpu::glu_backward)},
    {"row_gradient", launcher(usaf::cpu::row_gradient)},
    {"row_importance", launcher(usaf::cpu::row_importance)},
    {"masked_adam", launcher(usaf::cpu::masked_adam)},
    {"decode_moments8", launcher(usaf::cpu::decode_moments8)},
    {"squares_of_rows", launcher(usaf::cpu::squares_of_rows)},
    {"router_uniform", launcher(usaf::cpu::router_uniform)},
};

int64_t read_int(std::istream& in) {
  int64_t value = 0;
  in.read(reinterpret_cast<char*>(&value), sizeof value);
  return value;
}

std::vector<char> read_bytes(std::istream& in, int64_t count) {
  std::vector<char> bytes(static_cast<size_t>(count));
  in.read(bytes.data(), count);
  return bytes;
}

void run(const char* path) {
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.exceptions(std::ios::failbit | std::ios::badbit | std::ios::eofbit);
  const std::string name(read_bytes(file, 32).data());
  const int64_t struct_size = read_int(file), num_buffers = read_int(file), num_pointers = read_int(file);
  std::vector<char> args = read_bytes(file, struct_size);
  std::vector<std::pair<int64_t, int64_t>> pointers;
  for (int64_t i = 0; i < num_pointers; ++i) {
    const int64_t offset = read_int(file);
    pointers.emplace_back(offset, read_int(file));
  }
  std::vector<std::vector<char>> buffers;
  std::vector<std::streampos> positions;
  for (int64_t i = 0; i < num_buffers; ++i) {
    const int64_t bytes = read_int(file);
    positions.push_back(file.tellg());
    buffers.push_back(read_bytes(file, bytes));
  }
  for (const auto& [offset, buffer] : pointers) {
    void* data = buffers.at(static_cast<size_t>(buffer)).data();
    std::memcpy(args.data() + offset, &data, sizeof data);
  }
  kLaunchers.at(name)(args);
  for (size_t i = 0; i < buffers.size(); ++i) {
    file.seekp(positions[i]);
    file.write(buffers[i].data(), static_cast<std::streamsize>(buffers[i].size()));
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    if (argc != 2) throw std::runtime_error("expected one argument: the call file");
    run(argv[1]);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "op_runner: %s\n", error.what());
    return 1;
  }
}
