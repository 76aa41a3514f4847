// The pages of a store in its files on disk, read by pread: never mapped, so that a file cut off is an error and not a
// SIGBUS, and so that what is read counts only where it was read to.
//
// O_DIRECT where the file system has it (tried when a file is opened) and the file's pages start at multiples of 4096;
// elsewhere through the page cache, which is told to drop each page again. A page is not compared with its checksum
// here: that is done once, when the store is opened (usaf_ext/store.py).
#pragma once
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace usaf {

struct PageFile {
  std::string path;
  int64_t bytes;  // the whole file
};

struct PagePlace {
  int64_t file;    // number of the file
  int64_t offset;  // of the page's first byte
};

class PageFiles {
 public:
  // `places`: by page. Opens every file. Throws StoreError for one that cannot be opened or has another size,
  // std::invalid_argument for a place outside its file.
  PageFiles(std::vector<PageFile> files, std::vector<PagePlace> places, int64_t page_bytes);
  ~PageFiles();

  // Read page `page` to `buffer`, which has room for it and is aligned to kPageAlign. From any thread. Throws
  // StoreError naming the file, without the page's name; the next read of that file opens it again by its name.
  void read(int64_t page, uint8_t* buffer) const;

  int64_t num_pages() const { return static_cast<int64_t>(places_.size()); }
  bool direct() const;  // are all files read past the page cache?

 private:
  struct Handle;
  struct File {
    PageFile file;
    bool aligned = true;  // its pages start at multiples of kPageAlign
    int64_t first_page = 0;
    std::mutex mutex;
    std::shared_ptr<const Handle> handle;  // null: to be opened by the next read
  };

  std::shared_ptr<const Handle> open(File& file) const;
  std::shared_ptr<const Handle> open_handle(const File& file) const;

  int64_t page_bytes_;
  std::vector<PagePlace> places_;
  std::vector<std::unique_ptr<File>> files_;
};

}  // namespace usaf
