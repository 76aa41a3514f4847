#include "expert_store.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "../errors.h"

namespace usaf {
namespace {

int64_t total_bytes(int64_t num_layers, int64_t num_experts, const PageLayout& layout) {
  if (num_layers < 1 || num_experts < 1 || layout.hidden_size < 1 || layout.intermediate_size < 1) {
    throw std::invalid_argument(
        "ExpertStore: num_layers, num_experts, hidden_size and intermediate_size must be at "
        "least 1, got " +
        std::to_string(num_layers) + ", " + std::to_string(num_experts) + ", " + std::to_string(layout.hidden_size) +
        ", " + std::to_string(layout.intermediate_size));
  }
  int64_t pages = 0, bytes = 0;
  if (__builtin_mul_overflow(num_layers, num_experts, &pages) ||
      __builtin_mul_overflow(pages, layout.page_bytes, &bytes)) {
    throw StoreError("ExpertStore: more than 2^63 bytes");
  }
  return bytes;
}

}  // namespace

ExpertStore::ExpertStore(int64_t num_layers, int64_t num_experts, const PageLayout& layout)
    : num_layers_(num_layers), num_experts_(num_experts), layout_(layout) {
  const int64_t size = total_bytes(num_layers, num_experts, layout);
  void* mapping = mmap(nullptr, static_cast<size_t>(size), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) {
    throw StoreError("ExpertStore: cannot map " + std::to_string(size) + " bytes: " + std::strerror(errno));
  }
  base_ = static_cast<uint8_t*>(mapping);
}

ExpertStore::ExpertStore(int64_t num_layers, int64_t num_experts, const PageLayout& layout,
                         std::unique_ptr<PageFiles> files)
    : num_layers_(num_layers), num_experts_(num_experts), layout_(layout), files_(std::move(files)), sealed_(true) {
  total_bytes(num_layers, num_experts, layout);
  if (files_->num_pages() != num_layers * num_experts) {
    throw std::invalid_argument("ExpertStore: expected files with " + std::to_string(num_layers * num_experts) +
                                " pages, they have " + std::to_string(files_->num_pages()));
  }
}

ExpertStore::~ExpertStore() {
  const bool gone = registration_ && registration_->is_left_behind();
  registration_.reset();
  if (base_ && !gone) munmap(base_, static_cast<size_t>(bytes()));
}

int64_t ExpertStore::page_number(int64_t layer, int64_t expert) const {
  if (layer < 0 || layer >= num_layers_ || expert < 0 || expert >= num_experts_) {
    throw StoreError("no page for layer " + std::to_string(layer) + ", expert " + std::to_string(expert) +
                     ": the store has " + std::to_string(num_layers_) + " layers of " + std::to_string(num_experts_) +
                     " experts");
  }
  return layer * num_experts_ + expert;
}

const uint8_t* ExpertStore::page(int64_t layer, int64_t expert) const {
  const int64_t number = page_number(layer, expert);
  if (on_disk()) throw StoreError("the store is on disk: its pages have no place in memory");
  return base_ + number * layout_.page_bytes;
}

void ExpertStore::read_page(int64_t layer, int64_t expert, uint8_t* buffer) const {
  const int64_t number = page_number(layer, expert);
  if (!on_disk()) throw StoreError("the store is in memory: its pages need no reading");
  try {
    files_->read(number, buffer);
  } catch (const StoreError& error) {
    throw StoreError("layer " + std::to_string(layer) + ", expert " + std::to_string(expert) + ": " + error.what());
  }
}

uint8_t* ExpertStore::writable_page(int64_t layer, int64_t expert) {
  const uint8_t* found = page(layer, expert);
  if (sealed_) throw StoreError("the store is sealed: its pages are read-only");
  return const_cast<uint8_t*>(found);
}

void ExpertStore::seal() {
  if (sealed_) return;
  protect(registration_ ? registration_->bytes() : 0, PROT_READ);
  sealed_ = true;
}

void ExpertStore::protect(int64_t from, int access) const {
  const int64_t start = std::min(round_up(from, sysconf(_SC_PAGESIZE)), bytes());
  if (start < bytes() && mprotect(base_ + start, static_cast<size_t>(bytes() - start), access) != 0) {
    throw StoreError(std::string("ExpertStore: cannot change the protection of the pages: ") + std::strerror(errno));
  }
}

const HostRegistration& ExpertStore::register_with(std::shared_ptr<Device> device) {
  if (on_disk()) throw StoreError("the store is on disk: there is no memory to register");
  if (!registration_) {
    // Drivers pin memory for writing too. What they take stays writable: its protection must not change any more.
    if (sealed_) protect(0, PROT_READ | PROT_WRITE);
    registration_.emplace(std::move(device), base_, bytes(), layout_.page_bytes);
    if (sealed_) protect(registration_->bytes(), PROT_READ);
  }
  return *registration_;
}

}  // namespace usaf
