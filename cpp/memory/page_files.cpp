#include "page_files.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "../errors.h"
#include "page_layout.h"

namespace usaf {
namespace {

StoreError cannot_read(const std::string& path, const std::string& reason) {
  return StoreError(path + ": cannot be read: " + reason);
}

int open_file(const std::string& path, int flags) {
  int descriptor;
  do descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | flags);
  while (descriptor < 0 && errno == EINTR);
  return descriptor;
}

// pread that goes on after an interruption; -1 with errno.
ssize_t read_some(int descriptor, void* buffer, size_t bytes, int64_t offset) {
  ssize_t count;
  do count = pread(descriptor, buffer, bytes, offset);
  while (count < 0 && errno == EINTR);
  return count;
}

}  // namespace

struct PageFiles::Handle {
  Handle(int descriptor, bool direct) : descriptor(descriptor), direct(direct) {}
  Handle(const Handle&) = delete;
  ~Handle() { close(descriptor); }
  const int descriptor;
  const bool direct;
};

PageFiles::PageFiles(std::vector<PageFile> files, std::vector<PagePlace> places, int64_t page_bytes)
    : page_bytes_(page_bytes), places_(std::move(places)) {
  for (PageFile& file : files) {
    files_.push_back(std::make_unique<File>());
    files_.back()->file = std::move(file);
  }
  for (const PagePlace& place : places_) {
    if (place.file < 0 || place.file >= static_cast<int64_t>(files_.size()) || place.offset < 0 ||
        place.offset > files_[static_cast<size_t>(place.file)]->file.bytes - page_bytes) {
      throw std::invalid_argument("PageFiles: no " + std::to_string(page_bytes) + " bytes at " +
                                  std::to_string(place.offset) + " of file " + std::to_string(place.file));
    }
    File& file = *files_[static_cast<size_t>(place.file)];
    file.aligned = file.aligned && place.offset % kPageAlign == 0 && page_bytes % kPageAlign == 0;
    file.first_page = place.offset;
  }
  for (auto& file : files_) open(*file);
}

PageFiles::~PageFiles() = default;

std::shared_ptr<const PageFiles::Handle> PageFiles::open_handle(const File& file) const {
  const std::string& path = file.file.path;
  std::shared_ptr<const Handle> handle;
  if (const int descriptor = file.aligned ? open_file(path, O_DIRECT) : -1; descriptor >= 0) {
    handle = std::make_shared<const Handle>(descriptor, true);
    // Some file systems take the flag and refuse the reads.
    const std::unique_ptr<void, decltype(&std::free)> block(std::aligned_alloc(kPageAlign, kPageAlign), &std::free);
    if (!block) throw cannot_read(path, std::strerror(ENOMEM));
    if (read_some(descriptor, block.get(), kPageAlign, file.first_page) < 0) handle.reset();
  }
  if (!handle) {
    const int descriptor = open_file(path, 0);
    if (descriptor < 0) throw cannot_read(path, std::strerror(errno));
    handle = std::make_shared<const Handle>(descriptor, false);
  }
  struct stat found{};
  if (fstat(handle->descriptor, &found) != 0) throw cannot_read(path, std::strerror(errno));
  if (!S_ISREG(found.st_mode) || found.st_size != file.file.bytes) {
    throw cannot_read(path, "expected a file of " + std::to_string(file.file.bytes) + " bytes, it has " +
                                std::to_string(found.st_size));
  }
  return handle;
}

std::shared_ptr<const PageFiles::Handle> PageFiles::open(File& file) const {
  const std::lock_guard lock(file.mutex);
  if (!file.handle) file.handle = open_handle(file);
  return file.handle;
}

void PageFiles::read(int64_t page, uint8_t* buffer) const {
  const PagePlace& place = places_.at(static_cast<size_t>(page));
  File& file = *files_[static_cast<size_t>(place.file)];
  const auto handle = open(file);
  int64_t done = 0;
  ssize_t count = 1;
  while (done < page_bytes_ && count > 0) {
    count = read_some(handle->descriptor, buffer + done, static_cast<size_t>(page_bytes_ - done), place.offset + done);
    if (count > 0) done += count;
    // Past the cache a read ends inside a block only where the file does, and could not go on from there.
    if (handle->direct && done % kPageAlign != 0) count = 0;
  }
  const int error = errno;
  if (!handle->direct) posix_fadvise(handle->descriptor, place.offset, page_bytes_, POSIX_FADV_DONTNEED);
  if (done == page_bytes_) return;
  {
    const std::lock_guard lock(file.mutex);
    if (file.handle == handle) file.handle.reset();
  }
  throw cannot_read(file.file.path, count < 0 ? std::strerror(error) : "truncated");
}

bool PageFiles::direct() const {
  for (const auto& file : files_) {
    const std::lock_guard lock(file->mutex);
    if (!file->handle || !file->handle->direct) return false;
  }
  return true;
}

}  // namespace usaf
