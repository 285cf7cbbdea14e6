#include "memory_file.hpp"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <system_error>

#include "must.hpp"

namespace rlef {
namespace {

UniqueFd file_with(const char* name, unsigned flags) {
    UniqueFd file(::memfd_create(name, MFD_CLOEXEC | flags));
    must(static_cast<bool>(file), "memfd_create");
    return file;
}

}  // namespace

UniqueFd memory_file(const char* name) {
    return file_with(name, 0);
}

UniqueFd sealed_file(const char* name, std::string_view text) {
    auto file = file_with(name, MFD_ALLOW_SEALING);
    for (std::size_t at = 0; at < text.size();) {
        const ssize_t size = ::pwrite(file.get(), text.data() + at, text.size() - at, static_cast<off_t>(at));
        must(size > 0 || errno == EINTR, "write a test's input");
        if (size > 0) at += static_cast<std::size_t>(size);
    }
    constexpr int kSeals = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE;
    must(::fcntl(file.get(), F_ADD_SEALS, kSeals) == 0, "seal a test's input");
    return file;
}

std::size_t size_of(const UniqueFd& file) {
    struct stat facts{};
    must(::fstat(file.get(), &facts) == 0, "fstat");
    return static_cast<std::size_t>(facts.st_size);
}

std::string read_range(const UniqueFd& file, std::size_t begin, std::size_t end) {
    std::string text(end - begin, '\0');
    for (std::size_t at = 0; at < text.size();) {
        const ssize_t size = ::pread(file.get(), &text[at], text.size() - at, static_cast<off_t>(begin + at));
        must(size > 0 || errno == EINTR, "read a program's output");
        if (size > 0) at += static_cast<std::size_t>(size);
    }
    return text;
}

}  // namespace rlef
