#include "work_folder.hpp"

#include <errno.h>
#include <fcntl.h>
#include <sys/fsuid.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include <system_error>

#include "isolation.hpp"
#include "must.hpp"
#include "process.hpp"
#include "system_calls.hpp"
#include "unique_fd.hpp"

namespace rlef {
namespace {

constexpr std::uint64_t kPage = 4096;
constexpr std::uint64_t kMostNewFiles = 10'000;

/// Looks at files with a program's eyes while it lives. Does nothing where the user cannot be changed.
class AsUser {
  public:
    explicit AsUser(uid_t user) : user_(::setfsuid(user)), group_(::setfsgid(user)) {}
    ~AsUser() {
        ::setfsuid(static_cast<uid_t>(user_));
        ::setfsgid(static_cast<gid_t>(group_));
    }
    AsUser(const AsUser&) = delete;
    AsUser& operator=(const AsUser&) = delete;

  private:
    int user_;
    int group_;
};

UniqueFd work_folder() {
    UniqueFd folder(::open(kWorkFolder, O_PATH | O_DIRECTORY | O_CLOEXEC));
    must(static_cast<bool>(folder), "open the working folder");
    return folder;
}

std::uint64_t whole_pages(std::uint64_t bytes) {
    return (bytes + kPage - 1) / kPage * kPage;
}

void make_folders(int folder, const std::string& name) {
    for (auto slash = name.find('/'); slash != std::string::npos; slash = name.find('/', slash + 1)) {
        const auto part = name.substr(0, slash);
        must(::mkdirat(folder, part.c_str(), 0755) == 0 || errno == EEXIST,
             ("make the folder " + part).c_str());
    }
}

void write_file(int folder, const GivenFile& given) {
    make_folders(folder, given.name);
    const UniqueFd file(
        ::openat(folder, given.name.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0755));
    must(static_cast<bool>(file), ("make the file " + given.name).c_str());
    write_whole(file.get(), given.content, "write the file " + given.name);
}

void put(const std::vector<GivenFile>& files, uid_t owner) {
    const AsUser as_owner(owner);
    const auto folder = work_folder();
    for (const auto& file : files) write_file(folder.get(), file);
}

struct OpenHow {  // struct open_how, which older headers lack
    std::uint64_t flags;
    std::uint64_t mode;
    std::uint64_t resolve;
};

/// The program made what is there: no link is followed, and nothing is waited for.
UniqueFd open_output(int folder, const std::string& name) {
    constexpr std::uint64_t kBeneath = 0x08, kNoLinks = 0x04 | 0x02, kNoOtherMounts = 0x01;
    const OpenHow how{O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC, 0, kBeneath | kNoLinks | kNoOtherMounts};
    return UniqueFd(static_cast<int>(::syscall(SYS_openat2, folder, name.c_str(), &how, sizeof how)));
}

}  // namespace

WorkFolder::WorkFolder(const WorkFolderContent& content, uid_t owner)
    : owner_(owner), size_(whole_pages(static_cast<std::uint64_t>(content.free_bytes)) + kPage) {
    auto inodes = 2 + (content.free_bytes > 0 ? kMostNewFiles : 0);
    for (const auto& file : content.files) {
        size_ += whole_pages(file.content.size());
        inodes += 1 + file.name.size() / 2;  // as many folders as the name has room for
    }
    const auto group = owner == ::geteuid() ? ::getegid() : owner;
    const auto options = "mode=755,uid=" + std::to_string(owner) + ",gid=" + std::to_string(group) +
                         ",size=" + std::to_string(size_) + ",nr_inodes=" + std::to_string(inodes);
    constexpr unsigned long kFlags = MS_NOSUID | MS_NODEV;
    must(::mount("none", kWorkFolder, "tmpfs", kFlags, options.c_str()) == 0, "mount the working folder");
    try {
        put(content.files, owner);
        if (content.free_bytes > 0) return;
        must(::mount(nullptr, kWorkFolder, nullptr, kFlags | MS_REMOUNT | MS_BIND | MS_RDONLY, nullptr) == 0,
             "make the working folder read-only");
    } catch (...) {
        ::umount2(kWorkFolder, MNT_DETACH);
        throw;
    }
}

WorkFolder::~WorkFolder() {
    ::umount2(kWorkFolder, MNT_DETACH);
}

std::vector<File> WorkFolder::read(const std::vector<std::string>& names) const {
    const AsUser as_owner(owner_);
    const auto folder = work_folder();
    std::vector<File> found;
    for (const auto& name : names) {
        const auto file = open_output(folder.get(), name);
        struct stat facts{};
        const bool is_file = file && ::fstat(file.get(), &facts) == 0 && S_ISREG(facts.st_mode);
        // A file with holes may claim to be larger than memory.
        if (is_file && static_cast<std::uint64_t>(facts.st_size) <= size_) {
            found.push_back({name, read_whole(file.get())});
        }
    }
    return found;
}

}  // namespace rlef
