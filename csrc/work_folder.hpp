#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <vector>

#include "command.hpp"

namespace rlef {

/// What lies in a command's working folder at first, and what may be added.
struct WorkFolderContent {
    std::vector<GivenFile> files;
    std::int64_t free_bytes;  // 0: nothing can be written
};

/// A file system of its own in memory, mounted at kWorkFolder as long as this object lives. One at a time.
class WorkFolder {
  public:
    /// The files belong to `owner`. Throws std::system_error.
    WorkFolder(const WorkFolderContent& content, uid_t owner);
    ~WorkFolder();
    WorkFolder(const WorkFolder&) = delete;
    WorkFolder& operator=(const WorkFolder&) = delete;

    /// Those of the named files that are there and are files.
    std::vector<File> read(const std::vector<std::string>& names) const;

    /// In bytes, what lies in it included.
    std::uint64_t size() const { return size_; }

  private:
    uid_t owner_;
    std::uint64_t size_;
};

}  // namespace rlef
